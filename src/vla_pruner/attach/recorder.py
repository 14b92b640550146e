"""Reads chosen rows of attention beside the model's own kernel, at chosen layers only.

The wanted attention modules get their own shallow copy of the config, whose attention implementation is `NAME`. The
rest of the model keeps its config, so masks are made as before and no other layer runs through this file.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.methods.scores import attention_probabilities

NAME = "vla_pruner_recorder"
_TAP = "_vla_pruner_tap"
_users = 0


@dataclass(frozen=True)
class Attention:
    """The arguments of one attention kernel call.

    Attributes:
        query: (B, H, Q, d) rotated queries.
        key: (B, G, S, d) rotated keys, from the cache if there is one.
        mask: (B or 1, H or 1, Q, S) bool or additive float, or None.
        causal: whether the kernel masks later keys by itself (aligned at the first key, as sdpa does).
        scaling: factor on the logits.
        softcap: bound on the logits, if any.
        weights: (B, H, Q, S) the probabilities themselves, in the model's dtype, if the kernel returns them.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    causal: bool
    scaling: float
    softcap: float | None
    weights: Tensor | None = None


@dataclass(frozen=True)
class _Tap:
    kernel: Callable[..., Any]
    callbacks: list[Callable[[Attention], None]]


class Recorder:
    """Taps on attention modules; `remove` leaves every module and the registry of attention functions as they were."""

    def __init__(self) -> None:
        self._configs: list[tuple[nn.Module, Any]] = []

    def watch(
        self,
        module: nn.Module,
        backend: str,
        callback: Callable[[Attention], None],
        kernel: Callable[..., Any] | None = None,
    ) -> None:
        """Call `callback` after each kernel call of a transformers attention module that runs `backend`.

        Args:
            module: an attention module; its config names the attention function that it runs.
            backend: name of this function.
            callback: called with each kernel call.
            kernel: the function that the module runs if it does not ask transformers for one by name; None: it asks.
        """
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        global _users
        config: Any = module.config
        tap = getattr(config, _TAP, None)
        if tap is not None:
            tap.callbacks.append(callback)
            return
        if not self._configs:
            _users += 1
            ALL_ATTENTION_FUNCTIONS[NAME] = _record
        kernel = kernel or kernel_of(module, backend)
        tapped = copy.copy(config)
        # The property's setter would also reach into configs that the copy shares with the original.
        tapped._attn_implementation_internal = NAME
        setattr(tapped, _TAP, _Tap(kernel, [callback]))
        self._configs.append((module, config))
        module.config = tapped

    def remove(self) -> None:
        """Undo every `watch`."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        global _users
        if not self._configs:
            return
        for module, config in reversed(self._configs):
            module.config = config
        self._configs.clear()
        _users -= 1
        if _users == 0:
            del ALL_ATTENTION_FUNCTIONS[NAME]


def kernel_of(module: nn.Module, backend: str) -> Callable[..., Any]:
    """Return the attention function that a transformers attention module runs under this name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager)


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    tap: _Tap = getattr(module.config, _TAP)
    result = tap.kernel(module, query, key, value, attention_mask, **kwargs)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    scaling = kwargs.get("scaling")
    attention = Attention(
        query=query,
        key=key,
        mask=attention_mask,
        causal=bool(causal) and attention_mask is None and query.shape[2] > 1,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        weights=result[1],
    )
    for callback in tap.callbacks:
        callback(attention)
    return result


def known_rows(attention: Attention, rows: Tensor | None) -> Tensor:
    """Return the same as `rows_of`, taken from the kernel if it computed the probabilities itself."""
    weights = attention.weights
    if weights is None:
        return rows_of(attention, rows)
    if rows is not None:
        index = rows.to(weights.device)[:, None, :, None]
        weights = weights.gather(2, index.expand(-1, weights.shape[1], -1, weights.shape[3]))
    return weights.float()


def rows_of(attention: Attention, rows: Tensor | None) -> Tensor:
    """Probabilities (B, H, R, S) of the given query rows (B, R), or of all of them."""
    query, mask = attention.query, attention.mask
    batch, heads, length, dim = query.shape
    if mask is not None:
        mask = mask.expand(batch, *mask.shape[1:])
    if rows is not None:
        rows = rows.to(query.device)
        query = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, dim))
        if mask is not None and mask.shape[2] > 1:
            mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    if mask is not None:
        mask = mask[..., : attention.key.shape[2]]
    if attention.causal:
        positions = torch.arange(length, device=query.device).expand(batch, -1) if rows is None else rows
        keys = torch.arange(attention.key.shape[2], device=query.device)
        mask = (keys <= positions[..., None])[:, None]
    return attention_probabilities(query, attention.key, mask, attention.scaling, attention.softcap)
