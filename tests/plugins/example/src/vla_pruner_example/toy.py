"""A toy policy around a decoder of transformers, and the family that says where things are in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.families.decoder_lm import DecoderLM


class ToyPolicy(nn.Module):
    """Embeddings of an image and a sentence in, one action out.

    Args:
        decoder: a decoder-only language model of transformers without a head, of width D.
        tokens: visual tokens M.
    """

    def __init__(self, decoder: nn.Module, tokens: int) -> None:
        super().__init__()
        self.brain: Any = decoder
        self.tokens = tokens

    @torch.no_grad()
    def act(self, image: Tensor, sentence: Tensor) -> Tensor:
        """Image (B, M, D) and sentence (B, T, D) to actions (B, D)."""
        prompt = torch.cat([image, sentence], dim=1)
        return self.brain(inputs_embeds=prompt, use_cache=False).last_hidden_state[:, -1]


class Toy(DecoderLM):
    """`ToyPolicy`: [visual tokens][sentence], and the last position acts."""

    def __init__(self, model: nn.Module) -> None:
        policy: Any = model
        super().__init__(policy.brain, visual=slice(0, policy.tokens))
        self._policy = policy

    @property
    def whole_steps(self) -> tuple[tuple[Any, str], ...]:
        return ((self._policy, "act"),)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(model, ToyPolicy)
