"""The two-camera reference policies (OpenVLA-OFT-shaped): one causal pass, whose last rows give a chunk of actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy
from vla_pruner.attach.family import Call, StepFunction
from vla_pruner.attach.layout import Layout
from vla_pruner.families.base import is_one_of, tiles
from vla_pruner.families.decoder_lm import DecoderLM
from vla_pruner.families.reference import trained_encoder, trained_step


class Chunk(DecoderLM):
    """`vla_pruner.models.chunk.ChunkPolicy`: [BOS][cameras][instruction][proprioception][action rows]."""

    one_pass = True

    def __init__(self, model: nn.Module) -> None:
        policy: Any = model
        super().__init__(policy.decoder, visual=policy.config.visual)
        self.eye = policy.vision
        self.seeing, self.acting = (policy, "embed_prompt"), (policy, "decode")
        self.encoder = trained_encoder(policy, policy.config.patches)
        self._policy = policy
        self._patches, self._rows = policy.config.patches, policy.config.chunk

    @property
    def whole_steps(self) -> tuple[tuple[Any, str], ...]:
        return ((self._policy, "predict_action"),)

    @property
    def anatomy(self) -> Anatomy:
        return replace(super().anatomy, towers=self._policy.vision_towers, projectors=(self._policy.projector,))

    def patches(self, pixels: Tensor) -> Tensor:
        # The policy normalises colours to (c - 127.5) / 64.
        batch, cameras = pixels.shape[:2]
        each = tiles(pixels.flatten(0, 1) * 64 + 127.5, self._patches)
        return each.reshape(batch, cameras * self._patches, -1)

    def action_rows(self, layout: Layout) -> Tensor | None:
        rows = torch.arange(layout.length - self._rows, layout.length, device=layout.prompt.device)
        return rows.repeat(layout.rows, 1)

    def _layout(self, call: Call) -> Layout:
        layout = super()._layout(call)
        positions = torch.arange(layout.length, device=layout.prompt.device)
        return replace(layout, readers=layout.prompt & (positions < layout.length - self._rows))

    def exported(self, example: Mapping[str, Any]) -> StepFunction:
        return trained_step(self._policy, example, self._policy.config.prompt_length + self._rows)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return is_one_of(model, {("vla_pruner.models.chunk.network", "ChunkPolicy")})
