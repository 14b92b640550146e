"""The reference policy (OpenVLA-shaped): image encoder, projector, Llama, action tokens decoded one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy
from vla_pruner.families.base import tiles
from vla_pruner.families.decoder_lm import DecoderLM


class Reference(DecoderLM):
    """`vla_pruner.reference_policy("autoregressive")`: [BOS][visual tokens][instruction][proprioception]
    and four decoded action tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        policy: Any = model
        super().__init__(policy.language_model, visual=slice(1, 1 + policy.config.num_visual_tokens))
        self.eye = policy.vision
        self.seeing, self.acting = (policy, "embed_prompt"), (policy, "decode")
        self._policy, self._tokens = policy, policy.config.num_visual_tokens

    @property
    def whole_steps(self) -> tuple[tuple[Any, str], ...]:
        return ((self._policy, "predict_action"),)

    @property
    def anatomy(self) -> Anatomy:
        return replace(super().anatomy, towers=self._policy.vision_towers, projectors=(self._policy.projector,))

    def patches(self, pixels: Tensor) -> Tensor:
        # The policy normalises colours to (c - 127.5) / 64.
        return tiles(pixels * 64 + 127.5, self._tokens)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return type(model).__name__ == "ReferencePolicy"
