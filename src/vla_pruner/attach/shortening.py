"""The sequence of one control step after pruning: which rows run, and which columns a cache holds."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from vla_pruner.attach.layout import Layout


class Shortening:
    """The sequence of one pruned control step at the layers from a pruning layer on. It is never changed.

    The key-value cache of such a layer holds `prefix` in this order, then whatever is decoded: the kept positions, or,
    if the other tokens stay readable, the frozen ones and then the kept ones.

    Attributes:
        length: prompt positions N.
        kept: (B, n) int64, sorted positions that stay live: every non-visual one and the kept visual ones.
        frozen: (B, N - n) int64, sorted positions of the tokens that stay readable; None if the others are dropped.
        prefix: (B, n) or (B, N) int64, the prompt position behind each column of the cache.
        before: the sequence after an earlier stage, which this one makes shorter still; None for the first.

    Args:
        layout: of the prompt.
        kept_ids: (B, k) int64, sorted ids of the visual tokens that stay live.
        readable: whether the others stay readable.
        before: the sequence after an earlier stage.
    """

    def __init__(self, layout: Layout, kept_ids: Tensor, readable: bool, before: Shortening | None = None) -> None:
        self._prompt = layout.prompt
        self.length = layout.length
        self.before = before
        live = torch.ones_like(layout.prompt).scatter(1, layout.visual, False)
        live = live.scatter(1, layout.visual.gather(1, kept_ids), True)
        # A stable sort on "is not live" lists the live positions in their order, then the others in theirs.
        order = torch.sort((~live).to(torch.int8), dim=1, stable=True).indices
        count = layout.length - layout.tokens + kept_ids.shape[1]
        self.kept = order[:, :count].contiguous()
        self.frozen = order[:, count:] if readable else None
        self.prefix = self.kept if self.frozen is None else torch.cat([self.frozen, self.kept], dim=1)

    @property
    def graph_key(self) -> tuple[Hashable, ...]:
        """The part of a compiled program's key that it makes."""
        return self.kept.shape, self.prefix.shape, self.before is None

    def enter(self, hidden: Tensor, frozen: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Hidden states as they go on: live (B, n, D), and frozen (B, N - n, D; None if dropped).

        Args:
            hidden: (B, N, D) as they enter the layer, or, after an earlier stage, (B, n, D) of the rows that it kept.
            frozen: (B, N - n, D) of the rows that earlier stages froze.
        """
        if self.before is None:
            return self.live_rows(hidden), None if self.frozen is None else self.frozen_rows(hidden)
        held = hidden if frozen is None else torch.cat([frozen, hidden], dim=1)
        place = self.before.columns()
        live = _gather_rows(held, place.gather(1, self.kept))
        return live, None if self.frozen is None else _gather_rows(held, place.gather(1, self.frozen))

    def columns(self) -> Tensor:
        """Return (B, N) int64: the column of `prefix` that each prompt position is in; 0 where it is in none."""
        columns = torch.arange(self.prefix.shape[1], device=self.prefix.device).expand(len(self.prefix), -1)
        return columns.new_zeros(len(columns), self.length).scatter(1, self.prefix, columns)

    def live_rows(self, tensor: Tensor) -> Tensor:
        """Return the kept rows (B, n, ...) of a tensor (B or 1, N, ...)."""
        return _gather_rows(tensor, self.kept)

    def frozen_rows(self, tensor: Tensor) -> Tensor:
        """Return the frozen rows (B, N - n, ...) of a tensor (B or 1, N, ...)."""
        assert self.frozen is not None
        return _gather_rows(tensor, self.frozen)

    def row_index(self, positions: Tensor) -> Tensor:
        """Return the places (B, R) of prompt positions (B, R), all of them live, among the kept rows."""
        return torch.searchsorted(self.kept, positions)

    def restore(self, hidden: Tensor) -> Tensor:
        """Kept rows (B, n, D) put back at their positions: (B, N, D), zero elsewhere."""
        full = hidden.new_zeros(hidden.shape[0], self.length, hidden.shape[2])
        return full.scatter(1, self.kept.to(hidden.device)[..., None].expand_as(hidden), hidden)

    def prefill_mask(self, mask: Tensor | None, causal: bool, buffer: int | None) -> Tensor | None:
        """Return the prefill's mask for the shortened layers.

        Args:
            mask: (B or 1, H or 1, N, W) bool or additive float made for the full sequence, or None (the kernel's own
                causal rule).
            causal: whether None means causal.
            buffer: width of a static cache's key buffer, or None.

        Returns:
            (B, H or 1, n, W') or None if the kernel's own rule still says the same.
        """
        if mask is not None:
            return self._columns(_gather_rows(mask.transpose(1, 2), self.kept).transpose(1, 2), buffer)
        if self.frozen is None or not causal:
            return None
        visible = self.prefix[:, None, None, :] <= self.kept[:, None, :, None]
        return pad_columns(visible, buffer)

    def reader_mask(self, mask: Tensor | None, buffer: int | None) -> Tensor | None:
        """The same for query rows that come after the prompt (decoded tokens, an expert): only columns change."""
        return None if mask is None else self._columns(mask, buffer)

    def token_mask(self, like: Tensor, decoded: int, buffer: int | None) -> Tensor:
        """Return the mask (B, 1, 1, W) of a token that is decoded with a cache that is short in every layer: all
        columns but padding are visible.

        Args:
            like: a mask, bool or additive, whose type and device the new one has.
            decoded: tokens after the prompt, including this one.
            buffer: width of a static cache's key buffer, or None.
        """
        prompt = self._prompt.gather(1, self.prefix)
        visible = torch.cat([prompt, prompt.new_ones(len(prompt), decoded)], dim=1)
        visible = pad_columns(visible[:, None, None].to(like.device), buffer)
        if like.dtype == torch.bool:
            return visible
        return like.new_zeros(visible.shape).masked_fill(~visible, torch.finfo(like.dtype).min)

    def to_grid(self, columns: Tensor) -> Tensor:
        """Return values (B, n or N) by column of `prefix`, put back by prompt position: (B, N), zero where dropped."""
        return columns.new_zeros(columns.shape[0], self.length).scatter(1, self.prefix, columns)

    def _columns(self, mask: Tensor, buffer: int | None) -> Tensor:
        mask = mask.expand(self.kept.shape[0], *mask.shape[1:])
        prefix = self.prefix.to(mask.device)[:, None, None, :].expand(*mask.shape[:3], -1)
        # The tail's length is a variable of a compiled decode step, so nothing may be made of it but a slice.
        return pad_columns(torch.cat([mask.gather(3, prefix), mask[..., self.length :]], dim=3), buffer)


def restored(output: Any, shortenings: Iterable[Shortening]) -> Any:
    """Return a decoder's output with every short sequence of hidden states in it put back to the prompt's length.

    Callers index the output by position, so it keeps its length; no caller reads the rows of tokens that are gone.
    """
    if isinstance(output, Tensor):
        for shortening in shortenings:
            if output.dim() == 3 and output.shape[1] == shortening.kept.shape[1]:
                return shortening.restore(output)
        return output
    if isinstance(output, tuple):
        return tuple(restored(part, shortenings) for part in output)
    for name in ("last_hidden_state", "hidden_states"):
        if getattr(output, name, None) is not None:
            output[name] = restored(output[name], shortenings)
    return output


def _gather_rows(tensor: Tensor, index: Tensor) -> Tensor:
    if tensor.shape[1] == 1 and index.shape[1] != 1:
        return tensor
    tensor = tensor.expand(index.shape[0], *tensor.shape[1:])
    # A model may be spread over several devices.
    index = index.to(tensor.device)
    index = index.view(*index.shape, *(1,) * (tensor.dim() - 2))
    return tensor.gather(1, index.expand(-1, -1, *tensor.shape[2:]))


def pad_columns(mask: Tensor, width: int | None) -> Tensor:
    """Pad a mask to a static cache's whole buffer: the slots that pruning leaves empty at its end are masked."""
    if width is None or width <= mask.shape[-1]:
        return mask
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return torch.nn.functional.pad(mask, (0, width - mask.shape[-1]), value=hidden)
