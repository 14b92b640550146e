"""The reference of pruning: the model at full length, in which the layers from the pruning layer on cannot use the
pruned tokens. Nothing is gathered, so it shares no arithmetic with pruning itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.anatomy import entry_of, layers_of
from vla_pruner.attach.layout import Layout
from vla_pruner.caches import cache_in
from vla_pruner.checks import check_choice
from vla_pruner.families import family_of
from vla_pruner.fate import WITHIN_A_STEP, Fate

Hook = tuple[tuple[Any, ...], dict[str, Any]] | None


class FullLength:
    """While it is open, a policy acts as if pruned, at full length. A context manager that leaves no trace.

    "drop": from `layer` on, the decoder's layers and those of its readers cannot attend to the visual tokens that are
    not kept, in prompts (also repeated ones), decode steps and denoising steps. "freeze": at every layer after `layer`
    the rows of these tokens are normalised, projected and read as they entered `layer`.

    Args:
        model: as `Method.attach` takes it, with no session attached.
        layout: of the control step that was pruned (`session.step.layout`); the next ones must be like it.
        kept: (B, k) or (k,) ids of the visual tokens that stay.
        layer: the pruning layer.
        then: if pruning is progressive, the tokens that stay from each later layer on: (B, k) or (k,) ids, fewer and
            fewer.
        pruned: "drop" or "freeze".
        **attach_options: as of `Method.attach`.

    Raises:
        UnsupportedModelError, OptionError: as `Method.attach`.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout,
        kept: Tensor,
        *,
        layer: int,
        then: Mapping[int, Tensor] | None = None,
        pruned: str = "drop",
        **attach_options: Any,
    ) -> None:
        check_choice("pruned", pruned, WITHIN_A_STEP)
        self._family: Any = family_of(model, **attach_options)
        self._layer = layer
        self._fate = Fate.of(pruned)
        self._length = layout.length
        stages = {layer: kept, **(then or {})}
        self._gone = {first: _gone(layout, ids) for first, ids in stages.items()}
        self._entered: Tensor | None = None
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> FullLength:
        family = self._family
        if self._fate.readable:
            for index in range(self._layer, len(layers_of(family.decoder))):
                self._register(entry_of(layers_of(family.decoder)[index]), partial(self._overwrite, index))
        elif family.anatomy.loop is not None:
            # A model that does not call its layers as modules hands over the masks it makes.
            for first, gone in self._gone.items():
                self._undo.append(family.edit_masks(first, partial(self._hide, gone)))
        else:
            for first, gone in self._gone.items() if hasattr(family, "edit_expert_masks") else ():
                self._undo.append(family.edit_expert_masks(first, partial(self._mask_out, gone)))
            for stack in (family.decoder, *family.readers):
                for index in range(self._layer, len(layers_of(stack))):
                    self._register(layers_of(stack)[index], partial(self._mask, index))
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()
        self._entered = None

    def _register(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _columns(self, gone: Tensor, like: Tensor) -> Tensor:
        """Return (B, W) bool: the key columns of a mask (..., W) that are gone; the prompt's come first."""
        return nn.functional.pad(gone.to(like.device), (0, like.shape[-1] - self._length))

    def _hide(self, gone: Tensor, visible: Tensor) -> Tensor:
        """Return (B or 1, Q, W) bool: the same without the columns that are gone."""
        return visible & ~self._columns(gone, visible)[:, None]

    def _mask_out(self, gone: Tensor, mask: Tensor) -> Tensor:
        """Return an additive mask (B or 1, H or 1, Q, W) with the columns of the tokens that are gone masked out."""
        return torch.where(self._columns(gone, mask)[:, None, None], torch.finfo(mask.dtype).min, mask)

    def _gone_at(self, index: int) -> Tensor | None:
        """Return (B, N) bool: the tokens that are gone at a layer; None before the first pruning layer."""
        return next((gone for first, gone in reversed(self._gone.items()) if first <= index), None)

    def _mask(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hook:
        """Hide the pruned tokens before a layer of the decoder or of a reader."""
        hidden = args[0] if args else kwargs["hidden_states"]
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = _unwritten(index, module, hidden, kwargs)
        if mask.dtype == torch.bool:
            # Additive, because a row that sees nothing would be NaN, and 0 x NaN is NaN for rows that do not attend to
            # it.
            lowest = torch.finfo(hidden.dtype).min
            mask = torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill(~mask, lowest)
        gone = self._gone_at(index)
        assert gone is not None
        return args, {**kwargs, "attention_mask": self._mask_out(gone, mask)}

    def _overwrite(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hook:
        """Restore the frozen rows before the norm that a layer makes its queries, keys and values from."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] != self._length:
            return None  # a decode step: the cache has the frozen keys and values
        gone = self._gone_at(index - 1)
        if gone is not None:
            assert self._entered is not None
            hidden = torch.where(gone.to(hidden.device)[..., None], self._entered.to(hidden.device), hidden)
        if index in self._gone:
            self._entered = hidden
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _gone(layout: Layout, kept: Tensor) -> Tensor:
    """Return (B, N) bool: prompt positions of the visual tokens that are not kept."""
    ids = torch.atleast_2d(kept).to(layout.visual.device).expand(layout.rows, -1)
    gone = torch.zeros_like(layout.prompt).scatter(1, layout.visual, True)
    return gone.scatter(1, layout.visual.gather(1, ids), False)


def _unwritten(index: int, module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Return (1, 1, Q, W) bool: the rule that the kernel applies if there is no mask."""
    cache, length = cache_in(kwargs), hidden.shape[1]
    past = 0 if cache is None else int(cache.get_seq_length(index))
    layers = getattr(cache, "layers", [])
    width = getattr(layers[index], "max_cache_len", past + length) if index < len(layers) else past + length
    attention: Any = module.self_attn
    keys = torch.arange(width, device=hidden.device)
    rows = torch.arange(past, past + length, device=hidden.device)
    if not getattr(attention, "is_causal", True):
        rows = rows.new_full((length,), past + length - 1)
    return (keys <= rows[:, None])[None, None]
