"""LeRobot's VLA-JEPA (`VLAJEPAPolicy`): a Qwen3-VL whose rows for embodied actions are read by a diffusion transformer.

The prompt [images][text][action tokens][embodied action tokens] runs once per action chunk. The head reads only the
embodied action tokens of the last layer's output. Action attention is that of these rows, in the same pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy
from vla_pruner.attach.family import Call
from vla_pruner.attach.hooks import HookWiring
from vla_pruner.attach.host import Host, Wiring
from vla_pruner.attach.layout import Layout
from vla_pruner.families.lerobot_qwen import RegistersHooks
from vla_pruner.replacements import Replacements


class VLAJEPA(RegistersHooks):
    """LeRobot's `VLAJEPAPolicy`; every chunk that it predicts is one control step."""

    named = ("lerobot.policies.vla_jepa.modeling_vla_jepa", "VLAJEPAPolicy")
    one_pass = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.inner = self._policy.model
        self._acting: Tensor | None = None

    @staticmethod
    def vlm_of(model: Any) -> Any:
        return model.model.qwen.model

    @staticmethod
    def anatomy_of(model: Any) -> Anatomy:
        """Return the parts of a `VLAJEPAPolicy`."""
        seeing = model.model.qwen.model.model
        return Anatomy(decoder=seeing.language_model, towers=(seeing.visual,))

    @property
    def anatomy(self) -> Anatomy:
        return self.anatomy_of(self._policy)

    @property
    def denoising(self) -> tuple[Any, ...]:
        return (self.inner.action_model.model,)

    @property
    def in_half(self) -> bool:
        return True  # it runs its decoder under autocast, whatever the dtype of its weights

    def wiring(self, host: Host) -> Wiring:
        return VLAJEPAWiring(host, self)

    def action_rows(self, layout: Layout) -> Tensor | None:
        return self._acting

    def layout(self, call: Call) -> Layout:
        ids = None if self._seen is None else self._seen[0]
        layout = super().layout(call)
        assert ids is not None
        acts = ids == self.inner.embodied_action_token_id
        count = self._policy.config.num_embodied_action_tokens_per_instruction
        self._acting = torch.sort((~acts).to(torch.int8), dim=1, stable=True).indices[:, :count].contiguous()
        return replace(layout, readers=layout.prompt & ~acts)

    def remove(self) -> None:
        super().remove()
        self._acting = None


class VLAJEPAWiring(HookWiring):
    """Hooks on the decoder as in other families; the last layer's output is put back at the prompt's positions. The
    head reads no dropped position.

    Args:
        host: receives every call.
        family: the model's family.
    """

    def __init__(self, host: Host, family: VLAJEPA) -> None:
        super().__init__(host, family)
        self._inner = family.inner
        self._replaced = Replacements()

    def install(self) -> None:
        super().install()
        self._replaced.put(self._inner, "_qwen_last_decoder_hidden", self._restore)

    def remove(self) -> None:
        self._replaced.remove()
        super().remove()

    def _restore(self, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        hidden = original(*args, **kwargs)
        step = self._host.step
        short = None if step is None else step.shortening
        return hidden if short is None else short.restore(hidden)
