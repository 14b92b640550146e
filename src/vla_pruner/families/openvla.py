"""OpenVLA, and OpenVLA-OFT with its parallel action chunk, as `vla_pruner.load_policy` loads them.

OpenVLA decodes its action: its rows are the last of the prompt and the decoded ones. OFT acts in one bidirectional
pass: its rows are those that the action head reads. With a diffusion head that pass is run again in every denoising
step; tokens are chosen in the first one, and action attention is the mean over all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy
from vla_pruner.attach.family import Call, Family, StepFunction
from vla_pruner.attach.layout import Layout
from vla_pruner.errors import OptionError, SessionError, UnsupportedModelError
from vla_pruner.families.base import check_example, is_one_of, tiles
from vla_pruner.families.decoder_lm import DecoderLM
from vla_pruner.replacements import Replacements

OPENVLA = ("vla_pruner.models.openvla.network", "OpenVLAForActionPrediction")
OFT = ("vla_pruner.models.openvla.oft", "OpenVLAOFT")


class OpenVLA(DecoderLM):
    """`OpenVLAForActionPrediction`: [BOS][visual tokens][instruction] and one decoded token a dimension."""

    def __init__(self, model: nn.Module) -> None:
        policy: Any = model
        start, each = policy.visual_slice.start, policy.patches
        cameras = {name: slice(start + i * each, start + (i + 1) * each) for i, name in enumerate(policy.cameras)}
        super().__init__(policy.language_model, visual=cameras, padding_side="right")
        self._policy = policy
        self.eye: nn.Module | None = policy.vision_backbone
        self._patches: int = policy.patches

    @property
    def anatomy(self) -> Anatomy:
        return replace(super().anatomy, towers=self._policy.vision_towers, projectors=(self._policy.projector,))

    @property
    def whole_steps(self) -> tuple[tuple[Any, str], ...]:
        return ((self._policy, "predict_action"),)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        if is_one_of(model, {OPENVLA}):
            return not is_one_of(model, {OFT})
        if any(kind.__name__ == OPENVLA[1] for kind in type(model).__mro__):
            raise UnsupportedModelError(
                f"{type(model).__module__}.{type(model).__name__} was given: OpenVLA through remote code, which does "
                "not see on current transformers. Load the same checkpoint with vla_pruner.load_policy(path)."
            )
        return False

    def patches(self, pixels: Tensor) -> Tensor:
        # Six channels a camera, of which SigLIP's last three are normalised to [-1, 1].
        images = pixels.unflatten(1, (-1, 6))[:, :, 3:] / 2 + 0.5
        return tiles(images.flatten(0, 1), self._patches).reshape(len(pixels), images.shape[1] * self._patches, -1)


class OpenVLAOFT(OpenVLA):
    """`OpenVLAOFT`: [BOS][visual tokens][proprio][instruction][placeholders][stop] in one bidirectional pass."""

    one_pass = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if self._policy.diffusion:
            # Every denoising step runs the prompt, with other keys and values in each.
            self.eye = None
        self._replaced = Replacements()

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return is_one_of(model, {OFT})

    def opens_step(self, call: Call) -> bool:
        return self._policy.denoising_step in (None, 0)

    def repeats_prompt(self, call: Call) -> bool:
        return True

    def install(self) -> None:
        self._replaced.put(self._policy, "forward", _refuse_forward)

    def remove(self) -> None:
        self._replaced.remove()

    def exported(self, example: Mapping[str, Any]) -> StepFunction:
        """Return the control step of a policy with an L1 head: from pixels, prompt and state to the normalised chunk.

        Raises:
            UnsupportedModelError: the policy has no L1 head.
            OptionError: an argument is missing or unknown, or the prompts are of unequal length.
        """
        policy = self._policy
        if policy.diffusion or policy.action_head is None:
            return Family.exported(self, example)
        names = ("input_ids", "pixel_values", *(() if policy.proprio_projector is None else ("proprio",)))
        given = check_example(example, names, ("attention_mask",))
        inputs = policy.prepared(**given)
        if inputs is None:
            raise OptionError("The example's prompts are of unequal length, and a program has one; give equal ones.")
        ids = inputs["input_ids"]
        return StepFunction(policy.chunk_of, inputs, "actions", Call(policy.length_of(ids), None, len(ids), ids.device))

    def action_rows(self, layout: Layout) -> Tensor | None:
        return self._policy.rows_in_sequence(layout.prompt)

    def placeholder_rows(self, layout: Layout) -> Tensor | None:
        return self._policy.rows_in_sequence(layout.prompt) + 1

    def _layout(self, call: Call) -> Layout:
        layout = super()._layout(call)
        # The first row that acts is the prompt's last token; the placeholders and the stop token behind it read no
        # prompt, although they see all of it.
        last = self._policy.rows_in_sequence(layout.prompt)[:, :1]
        positions = torch.arange(layout.length, device=layout.prompt.device)
        return replace(layout, readers=layout.prompt & (positions <= last))


def _refuse_forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise SessionError(
        "forward() of OpenVLA-OFT was called while a session is attached; it has no action rows. Call predict_action "
        "or act, or detach first."
    )
