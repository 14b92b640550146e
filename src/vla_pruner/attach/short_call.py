"""Pruning before the first layer: the call of the decoder itself is made short, so every layer and every cache is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vla_pruner.anatomy import layers_of
from vla_pruner.attach.layout import in_each
from vla_pruner.attach.shortening import Shortening, pad_columns
from vla_pruner.caches import buffer_width, cache_in


def short_prompt(
    given: dict[str, Any], embeds: Tensor, shortening: Shortening, decoder: Any, additive: bool
) -> dict[str, Any]:
    """Return the arguments of a decoder's call that runs a prompt, for the kept positions alone.

    Args:
        given: the call's arguments by name.
        embeds: (B, N, D) input embeddings of the whole prompt.
        shortening: its sequence after pruning.
        decoder: of the call.
        additive: whether masks are added to the scores (eager), instead of saying what is visible (sdpa).

    Returns:
        new arguments. Positions are the original ones and the mask is always explicit: with positions that are not
            consecutive and no mask, transformers would take the pieces for packed sequences.
    """
    rows, length, _ = embeds.shape
    short = _without(given, "input_ids", "cache_position", "inputs_embeds")
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=embeds.device)[None]
    short["inputs_embeds"] = shortening.live_rows(embeds)
    short["position_ids"] = in_each(lambda one: shortening.live_rows(one.expand(rows, -1)), positions, 2)
    causal = bool(getattr(layers_of(decoder)[0].self_attn, "is_causal", True))
    width = buffer_width(cache_in(given))
    short["attention_mask"] = _mask(given.get("attention_mask"), shortening, causal, width, embeds.dtype, additive)
    return short


def short_token(given: dict[str, Any], shortening: Shortening, past: int, device: torch.device) -> dict[str, Any]:
    """Return the arguments of a call that decodes one token after a prompt that was made short.

    Args:
        given: the call's arguments by name.
        shortening: of the prompt.
        past: positions before this one, dropped ones included.
        device: of the input.
    """
    short = _without(given, "cache_position")
    if short.get("position_ids") is None:
        # The cache is shorter than the sequence, so its length is not the position.
        short["position_ids"] = torch.full((1, 1), past, device=device)
    if given.get("attention_mask") is not None:
        width = buffer_width(cache_in(given))
        short["attention_mask"] = _token_mask(given["attention_mask"], shortening, past + 1, width)
    return short


def _token_mask(mask: Any, shortening: Shortening, length: int, width: int | None) -> Any:
    if isinstance(mask, dict):
        return {
            kind: None if one is None else _token_mask(one, shortening, length, width) for kind, one in mask.items()
        }
    if mask.dim() == 2:
        return torch.cat([mask.gather(1, shortening.prefix), mask[:, shortening.length :]], dim=1)
    if width is None and mask.shape[-1] == length:
        return shortening.reader_mask(mask, None)
    # The mask was made from the short cache's length, so its padding of the whole prompt is in other columns.
    return shortening.token_mask(mask, length - shortening.length, width)


def _mask(
    mask: Any, shortening: Shortening, causal: bool, width: int | None, dtype: torch.dtype, additive: bool
) -> Any:
    if isinstance(mask, dict):
        return {
            kind: _mask(one, shortening, causal, width, dtype, additive) if one is not None or causal else None
            for kind, one in mask.items()
        }
    if mask is not None and mask.dim() == 4:
        return shortening.prefill_mask(mask, causal, width)
    keys, queries = shortening.prefix[:, None, :], shortening.kept[:, :, None]
    visible = keys <= queries if causal else torch.ones_like(keys <= queries)
    if mask is not None:
        visible = visible & mask.gather(1, shortening.prefix).bool()[:, None, :]
        # A padded query sees itself, so that no row is empty.
        visible = visible | (keys == queries)
    visible = pad_columns(visible[:, None], width)
    if not additive:
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def _without(given: dict[str, Any], *names: str) -> dict[str, Any]:
    flat = {**given, **given.get("kwargs", {})}
    return {name: value for name, value in flat.items() if name not in (*names, "kwargs")}
