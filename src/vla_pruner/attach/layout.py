"""The places of visual tokens, cameras and text in the sequence of one control step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vla_pruner.attach.graph_key import graph_key
from vla_pruner.errors import SessionError


@dataclass(frozen=True)
class Layout:
    """The places of the visual tokens in the prompt of one control step. The family computes them from the arguments of
    the model's call.

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

    @cached_property
    def graph_key(self) -> tuple[Hashable, ...]:
        """The part of a compiled program's key that it makes; a layout is never changed."""
        return graph_key(self)

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
        """Return (B, 1) int64: the position of each row's last reading token; if tokens are decoded, it emits the first
        action token.
        """
        positions = torch.arange(self.length, device=self.prompt.device)
        return torch.where(self.reading, positions, -1).amax(dim=1, keepdim=True)

    def text(self) -> Tensor:
        """Return (B, N) bool: the reading, non-visual tokens after the image. Those before it cannot see it.

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


def in_each(function: Callable[[Tensor], Tensor], tensor: Tensor, dims: int) -> Tensor:
    """`function` of a tensor of up to so many dimensions; of several stacked in front, as positions in time, height and
    width are, of each.
    """
    return function(tensor) if tensor.dim() <= dims else torch.stack([function(one) for one in tensor])


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
