"""Where things are in the sequence of one control step, and what pruning makes of that sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vla_pruner.errors import SessionError


@dataclass(frozen=True)
class Layout:
    """Where the prompt of one control step has its visual tokens, computed by the family from what the model was
    called with.

    Attributes:
        visual: (B, M) int64, positions of the visual tokens in the sequence, by visual token id.
        valid: (B, M) bool, False for visual tokens that are masked out (an absent camera).
        prompt: (B, N) bool, True for real tokens, False for padding.
        cameras: visual tokens of each camera, in the order of the family's `cameras`; together M.
        absent: cameras, by their place in `cameras`, that the host knows to be absent in all rows.
        readers: (B, N) bool, the real tokens whose attention says what the prompt reads, and so the semantic score;
            None: all of `prompt`. Rows that only act, behind the prompt in the same pass, are not among them.
    """

    visual: Tensor
    valid: Tensor
    prompt: Tensor
    cameras: tuple[int, ...]
    absent: frozenset[int] = frozenset()
    readers: Tensor | None = None

    @property
    def reading(self) -> Tensor:
        """(B, N) bool: the rows that the semantic score is of."""
        return self.prompt if self.readers is None else self.readers

    @property
    def rows(self) -> int:
        """Number of rows B."""
        return self.prompt.shape[0]

    @property
    def length(self) -> int:
        """Number of prompt positions N, padding included."""
        return self.prompt.shape[1]

    @property
    def tokens(self) -> int:
        """Number of visual tokens M."""
        return self.visual.shape[1]

    @property
    def present_tokens(self) -> int:
        """Number of visual tokens of the cameras that are not known to be absent."""
        return sum(count for camera, count in enumerate(self.cameras) if camera not in self.absent)

    def last(self) -> Tensor:
        """(B, 1) int64: position of each row's last reading token; the one that emits the first action token, where
        tokens are decoded.
        """
        positions = torch.arange(self.length, device=self.prompt.device)
        return torch.where(self.reading, positions, -1).amax(dim=1, keepdim=True)

    def text(self) -> Tensor:
        """(B, N) bool: the reading, non-visual tokens after the image. Those before it cannot see it.

        Raises:
            SessionError: a row has no such token.
        """
        positions = torch.arange(self.length, device=self.prompt.device)
        end = torch.where(self.valid, self.visual, -1).amax(dim=1, keepdim=True)
        text = (self.reading & (positions > end)).scatter(1, self.visual, False)
        ensure(text.any(dim=1).all(), NO_TEXT)
        return text


NO_TEXT = (
    "The method scores visual tokens by the attention of the text after the image, but a row has no text after its "
    'last visual token; choose semantic_queries="all" or "last", or a method that reads no text.'
)


class Shortening:
    """What one pruned control step does to the sequence at the layers from the pruning layer on.

    The key-value cache of such a layer holds `prefix` in this order, then whatever is decoded: for "drop" the kept
    positions, for "freeze" the frozen ones and then the kept ones.

    Attributes:
        kept: (B, n) int64, sorted positions that stay live: every non-visual one and the kept visual ones.
        frozen: (B, N - n) int64, sorted positions of frozen tokens; None where the others are dropped.
        prefix: (B, n) or (B, N) int64, the prompt position behind each column of the cache.
        before: what an earlier stage made of the sequence, which this one makes shorter still; None for the first.
    """

    def __init__(self, layout: Layout, kept_ids: Tensor, freeze: bool, before: Shortening | None = None) -> None:
        self.length = layout.length
        self.before = before
        live = torch.ones_like(layout.prompt).scatter(1, layout.visual, False)
        live = live.scatter(1, layout.visual.gather(1, kept_ids), True)
        # A stable sort on "is not live" lists the live positions in their order, then the others in theirs.
        order = torch.sort((~live).to(torch.int8), dim=1, stable=True).indices
        count = layout.length - layout.tokens + kept_ids.shape[1]
        self.kept = order[:, :count].contiguous()
        self.frozen = order[:, count:] if freeze else None
        self.prefix = self.kept if self.frozen is None else torch.cat([self.frozen, self.kept], dim=1)

    def enter(self, hidden: Tensor, frozen: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Hidden states as they go on, live (B, n, D) and frozen (B, N - n, D; None if dropped).

        Args:
            hidden: (B, N, D) as they enter the layer, or, after an earlier stage, (B, n, D) of what that kept.
            frozen: (B, N - n, D) of what earlier stages froze.
        """
        if self.before is None:
            return self.live_rows(hidden), None if self.frozen is None else self.frozen_rows(hidden)
        held = hidden if frozen is None else torch.cat([frozen, hidden], dim=1)
        place = self.before.columns()
        live = _gather_rows(held, place.gather(1, self.kept))
        return live, None if self.frozen is None else _gather_rows(held, place.gather(1, self.frozen))

    def columns(self) -> Tensor:
        """(B, N) int64: the column of `prefix` that each prompt position is in; 0 where it is in none."""
        columns = torch.arange(self.prefix.shape[1], device=self.prefix.device).expand(len(self.prefix), -1)
        return columns.new_zeros(len(columns), self.length).scatter(1, self.prefix, columns)

    def live_rows(self, tensor: Tensor) -> Tensor:
        """The kept rows (B, n, ...) of a tensor (B or 1, N, ...)."""
        return _gather_rows(tensor, self.kept)

    def frozen_rows(self, tensor: Tensor) -> Tensor:
        """The frozen rows (B, N - n, ...) of a tensor (B or 1, N, ...)."""
        assert self.frozen is not None
        return _gather_rows(tensor, self.frozen)

    def row_index(self, positions: Tensor) -> Tensor:
        """Where the prompt positions (B, R), all of them live, are among the kept rows."""
        return torch.searchsorted(self.kept, positions)

    def restore(self, hidden: Tensor) -> Tensor:
        """Kept rows (B, n, D) put back at their positions: (B, N, D), zero elsewhere."""
        full = hidden.new_zeros(hidden.shape[0], self.length, hidden.shape[2])
        return full.scatter(1, self.kept.to(hidden.device)[..., None].expand_as(hidden), hidden)

    def prefill_mask(self, mask: Tensor | None, causal: bool, buffer: int | None) -> Tensor | None:
        """The prefill's mask for the shortened layers.

        Args:
            mask: (B or 1, H or 1, N, W) bool or additive float made for the full sequence, or None (the kernel's own
                causal rule).
            causal: whether None means causal.
            buffer: width of a static cache's key buffer, or None.

        Returns:
            (B, H or 1, n, W') or None where the kernel's own rule still says the same.
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

    def to_grid(self, columns: Tensor) -> Tensor:
        """Values (B, n or N) by column of `prefix`, put back by prompt position: (B, N), zero where dropped."""
        return columns.new_zeros(columns.shape[0], self.length).scatter(1, self.prefix, columns)

    def _columns(self, mask: Tensor, buffer: int | None) -> Tensor:
        mask = mask.expand(self.kept.shape[0], *mask.shape[1:])
        prefix = self.prefix.to(mask.device)[:, None, None, :].expand(*mask.shape[:3], -1)
        # The tail's length is a variable of a compiled decode step, so nothing may be made of it but a slice.
        return pad_columns(torch.cat([mask.gather(3, prefix), mask[..., self.length :]], dim=3), buffer)


def restored(output: Any, shortenings: dict[int, Shortening]) -> Any:
    """A decoder's output with every short sequence of hidden states in it put back to the prompt's length.

    Callers index the output by position, so it keeps its length; nobody reads the rows of tokens that are gone.
    """
    if isinstance(output, Tensor):
        for shortening in shortenings.values():
            if output.dim() == 3 and output.shape[1] == shortening.kept.shape[1]:
                return shortening.restore(output)
        return output
    if isinstance(output, tuple):
        return tuple(restored(part, shortenings) for part in output)
    for name in ("last_hidden_state", "hidden_states"):
        if getattr(output, name, None) is not None:
            output[name] = restored(output[name], shortenings)
    return output


def in_each(function: Callable[[Tensor], Tensor], tensor: Tensor, dims: int) -> Tensor:
    """`function` of a tensor of so many dimensions; of several stacked in front, as positions in time, height and width
    are, of each.
    """
    return function(tensor) if tensor.dim() == dims else torch.stack([function(one) for one in tensor])


def ensure(condition: Tensor, message: str) -> None:
    """Raise SessionError with `message` unless `condition` (a bool scalar) holds; on an accelerator, without waiting
    for it.
    """
    if torch.compiler.is_compiling():
        return  # A session looks before it runs a graph.
    if condition.device.type != "cpu":
        torch._assert_async(condition, message)
    elif not condition:
        raise SessionError(message)


def _gather_rows(tensor: Tensor, index: Tensor) -> Tensor:
    if tensor.shape[1] == 1 and index.shape[1] != 1:
        return tensor
    tensor = tensor.expand(index.shape[0], *tensor.shape[1:])
    # A model may be spread over several devices.
    index = index.to(tensor.device)
    index = index.view(*index.shape, *(1,) * (tensor.dim() - 2))
    return tensor.gather(1, index.expand(-1, -1, *tensor.shape[2:]))


def pad_columns(mask: Tensor, width: int | None) -> Tensor:
    """A static cache always offers its whole buffer: the slots that pruning leaves empty at its end are masked."""
    if width is None or width <= mask.shape[-1]:
        return mask
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return torch.nn.functional.pad(mask, (0, width - mask.shape[-1]), value=hidden)
