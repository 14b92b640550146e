"""A toy policy around a decoder of transformers, and the family that describes its prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.families.decoder_lm import DecoderLM
from vla_pruner.feed import Feed
from vla_pruner.models.drawn import draw_weights
from vla_pruner.registry import PRESENT, Benchmark, Row
from vla_pruner.simulators.base import Convention


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

    row = Row(
        name="toy",
        title="the toy policy",
        family=f"{__name__}:Toy",
        policy=f"{__name__}:ToyPolicy",
        config={"model_type": "toy", "tokens": PRESENT},
        load=f"{__name__}:load_toy",
        random=f"{__name__}:random_toy",
        bench=Benchmark(feed=f"{__name__}:toy_feed"),
        conventions={"libero": f"{__name__}:toy_in_libero"},
    )
    """Its name is that of the entry point. Everything but `name`, `title`, `family` and `policy` may be left out."""

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


def random_toy(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> ToyPolicy:
    """A policy with random weights: `vla-pruner audit toy --random-weights`, `vla-pruner bench --model toy`."""
    from transformers import LlamaConfig, LlamaModel

    layers = 8 if size == "full" else 6
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, vocab_size=8
    )
    with torch.device(device):
        policy = ToyPolicy(LlamaModel(config), tokens=16)
    policy.to(dtype=dtype).eval()
    draw_weights(policy, seed)
    return policy


def load_toy(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> ToyPolicy:
    """The policy that a folder holds: here drawn, from the seed in its config.json."""
    seed = json.loads((folder / "config.json").read_text())["tokens"]
    return random_toy("tiny", torch.device(device), dtype or torch.float32, seed)


def toy_feed(policy: ToyPolicy, settings: Any, device: torch.device) -> Feed:
    """Return a benchmark's feed for it."""
    draw = torch.Generator().manual_seed(settings.seed)
    image = torch.randn(settings.batch, policy.tokens, 32, generator=draw).to(device)
    sentence = torch.randn(settings.batch, 5, 32, generator=draw).to(device)
    return Feed(lambda: policy.act(image, sentence).cpu(), visual=policy.tokens, other=5, uses_head=False)


def toy_in_libero(policy: ToyPolicy, center_crop: bool) -> Convention:
    """Return its convention for LIBERO."""
    return Convention({"image": "agentview"}, proprio=False, horizon=3)
