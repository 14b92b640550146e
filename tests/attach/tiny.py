"""Tiny random decoders, and the reference that pruning must agree with: the model's own layers at full length,
without hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vla_pruner.caches import cache_name, cache_of

VISUAL = slice(1, 25)
TOKENS = 24
LENGTH = 31
LAYERS = 6
K = 3
TYPES = ("llama", "mistral", "gemma", "qwen2", "qwen3", "gemma2")


def tiny_lm(kind: str = "llama", backend: str = "sdpa", seed: int = 0, **overrides: Any) -> nn.Module:
    """A decoder-only language model of 6 layers with grouped queries, in eval mode."""
    options: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        **overrides,
    }
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[kind](**options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=backend).eval()
    with torch.no_grad():
        # The default initialisation is so small that attention is uniform, and nothing that pruning does would show.
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * (0.22 if "proj" in name else 0.6))
    return model


CACHE = cache_name(tiny_lm())
"""The installed transformers' name of the argument that is a cache."""


def prompt(rows: int = 2, padding: str | None = None, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Embeddings (B, N, D) and a mask (B, N); with `padding` "right" or "left", row b lacks b + 1 tokens on that
    side.
    """
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(rows, LENGTH, 32, generator=generator)
    mask = torch.ones(rows, LENGTH, dtype=torch.int64)
    for row in range(rows):
        if padding == "right":
            mask[row, LENGTH - row - 1 :] = 0
        elif padding == "left":
            mask[row, : row + 1] = 0
    return embeds, mask


def make_cache(kind: str, model: nn.Module) -> Any:
    """An empty cache: "dynamic", or "static" with room for more than the prompt."""
    config: Any = model.config
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=LENGTH + 9)


def positions_of(mask: Tensor) -> Tensor:
    """Position ids that do not count padding, as `generate` makes them."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def decode(model: Any, embeds: Tensor, mask: Tensor | None, cache: Any, steps: int) -> tuple[Tensor, Tensor]:
    """One control step by hand: a prefill and `steps` greedy tokens after the first. Returns tokens (B, 1 + steps)
    and logits.
    """
    rows, length, _ = embeds.shape
    with torch.no_grad():
        ids = None if mask is None else positions_of(mask)
        out = model(inputs_embeds=embeds, attention_mask=mask, position_ids=ids, **{CACHE: cache}, use_cache=True)
        last = torch.full((rows,), length - 1) if mask is None else (mask * torch.arange(length)).argmax(-1)
        logits = [out.logits[torch.arange(rows), last]]
        for _ in range(steps):
            token = logits[-1].argmax(-1, keepdim=True)
            if mask is not None:
                mask = torch.cat([mask, torch.ones(rows, 1, dtype=mask.dtype)], dim=1)
                ids = positions_of(mask)[:, -1:]
            out = model(input_ids=token, attention_mask=mask, position_ids=ids, **{CACHE: cache_of(out)})
            logits.append(out.logits[:, -1])
    stacked = torch.stack(logits, dim=1)
    return stacked.argmax(-1), stacked


def reference_hidden(decoder: Any, embeds: Tensor, mask: Tensor, gone: Tensor, layer: int, frozen: bool) -> Tensor:
    """Final hidden states (B, N, D) of the unmodified layers, run one after the other at full length.

    Args:
        decoder: the bare model.
        embeds: (B, N, D).
        mask: (B, N), 0 for padding.
        gone: (B, N) bool, positions dropped or frozen at `layer`.
        layer: the pruning layer.
        frozen: freeze (their rows are overwritten before every later layer) instead of drop (masked as keys).
    """
    length = embeds.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = causal[None, None] & mask.bool()[:, None, None, :]
    # A padded query sees itself, so that no row is empty.
    visible = visible | torch.eye(length, dtype=torch.bool)
    hidden = embeds
    angles = decoder.rotary_emb(hidden, positions_of(mask))
    entered = None
    for index, block in enumerate(decoder.layers):
        seen = visible
        if index == layer:
            entered = hidden
        if index >= layer and frozen:
            hidden = torch.where(gone[..., None], entered, hidden)
        elif index >= layer:
            seen = (visible & ~gone[:, None, None, :]) | torch.eye(length, dtype=torch.bool)
        additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        hidden = block(hidden, attention_mask=additive, position_embeddings=angles, position_ids=positions_of(mask))
    return decoder.norm(hidden)
