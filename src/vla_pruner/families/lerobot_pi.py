"""LeRobot's pi0 and pi0.5 (`PI0Policy`, `PI05Policy`): a PaliGemma prefix and a flow-matching expert that reads its
cache.

The prefix [image blocks][text] runs once per action chunk, the expert once per denoising step over a copy of the
prefix' keys and values. Action attention is that of the expert's action rows, averaged over the denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy
from vla_pruner.families.base import check_decoder, siglip_encoder
from vla_pruner.families.lerobot_common import LeRobotFamily
from vla_pruner.replacements import Replacements


class LeRobotPi(LeRobotFamily):
    """LeRobot's `PI0Policy` and `PI05Policy`; every chunk that they predict is one control step."""

    classes = frozenset(
        {("lerobot.policies.pi0.modeling_pi0", "PI0Policy"), ("lerobot.policies.pi05.modeling_pi05", "PI05Policy")}
    )
    prepare = "_preprocess_images"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        anatomy = self.anatomy
        self.decoder = check_decoder(anatomy.decoder, model)
        self.readers = tuple(check_decoder(expert, model) for expert in anatomy.experts)
        vision = self._inner.paligemma_with_expert.paligemma.config.vision_config
        self._tokens_per_image = (vision.image_size // vision.patch_size) ** 2
        self.encoder = siglip_encoder(
            anatomy.towers[0], (self._inner, self.embed), vision, shown=lambda: self._in_order
        )
        # The suffix of pi0 is [state][actions]; pi0.5 has the state in its text.
        self._first_action_row = 1 if hasattr(self._inner, "state_proj") else 0
        self._led: dict[nn.Module, _ThroughModule] = {}

    @staticmethod
    def anatomy_of(model: Any) -> Anatomy:
        both = model.model.paligemma_with_expert
        seeing = both.paligemma.model
        return Anatomy(
            decoder=seeing.language_model,
            experts=(both.gemma_expert.model,),
            towers=(seeing.vision_tower,),
            projectors=(seeing.multi_modal_projector,),
        )

    @property
    def camera_tokens(self) -> tuple[int, ...]:
        return (self._tokens_per_image,) * len(self.cameras)

    def block_lengths(self, images: list[Tensor]) -> list[int]:
        return [self._tokens_per_image] * len(images)

    def reader_rows(self, length: int, rows: int, device: torch.device) -> Tensor:
        return torch.arange(self._first_action_row, length, device=device).expand(rows, -1)

    def normed(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        # LeRobot's norm also returns a gate, which is None in the prefix.
        norm: Any = layer.input_layernorm
        return norm(hidden)[0]

    def install(self) -> None:
        super().install()
        for decoder in (self.decoder, *self.readers):
            self._led[decoder] = _ThroughModule(decoder)
            self._replaced.put(decoder, "forward", self._led[decoder])

    def remove(self) -> None:
        super().remove()
        self._led.clear()

    def put_around(self, module: nn.Module, around: Callable[..., Any], replaced: Replacements) -> None:
        led = self._led.get(module)
        if led is None:
            super().put_around(module, around, replaced)
        else:
            replaced.put(led, "compute", lambda _, original, *args, **kwargs: around(original, *args, **kwargs))


class _ThroughModule:
    """Leads LeRobot's calls of `decoder.forward(...)`, which pass every hook, through `decoder(...)`, which calls
    `forward` again.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder = decoder
        self._inside = False

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._inside:
            return self.compute(original, *args, **kwargs)
        self._inside = True
        try:
            return self._decoder(*args, **kwargs)
        finally:
            self._inside = False

    def compute(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make the call itself, after hooks on the module ran."""
        return original(*args, **kwargs)
