"""DeepStack (Qwen3-VL): additions to visual tokens between the first layers, after some of them are gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vla_pruner.attach.host import Host
from vla_pruner.replacements import Replacements


class DeepStack:
    """Makes a decoder that adds to its visual tokens between layers do so for the live ones, and nothing for others.

    Args:
        host: has the sequence.
        decoder: of transformers.
    """

    def __init__(self, host: Host, decoder: Any) -> None:
        self._host = host
        self._decoder = decoder
        self._replaced = Replacements()

    def install(self) -> None:
        """Put it in place."""
        if hasattr(self._decoder, "_deepstack_process"):
            self._replaced.put(self._decoder, "_deepstack_process", self._add)

    def remove(self) -> None:
        """Take it away."""
        self._replaced.remove()

    def _add(self, original: Callable[..., Tensor], hidden: Tensor, mask: Tensor, added: Tensor) -> Tensor:
        """Hidden states (B, n, D) with what is `added` (M', D), row by row, to the visual positions of the whole
        prompt, which `mask` (B, N) marks.
        """
        step = self._host.step
        shortening = None if step is None else step.shortening
        if shortening is None or hidden.shape[1] == mask.shape[1]:
            return original(hidden, mask, added)
        with self._host.timed():
            return hidden + shortening.live_rows(_spread(hidden, mask, added))


def add_at_fixed_sizes(decoder: Any, replaced: Replacements) -> None:
    """Make a decoder that adds to its visual tokens between layers do so without picking rows by a mask: their number
    would depend on data, so no graph can do that. The sums are the same.

    Args:
        decoder: of transformers.
        replaced: records the replacement.
    """

    def add(original: Callable[..., Tensor], hidden: Tensor, mask: Tensor, added: Tensor) -> Tensor:
        if hidden.shape[1] != mask.shape[1]:
            return original(hidden, mask, added)  # a session's, see `DeepStack`
        return hidden + _spread(hidden, mask, added)

    if hasattr(decoder, "_deepstack_process"):
        replaced.put(decoder, "_deepstack_process", add)


def _spread(hidden: Tensor, mask: Tensor, added: Tensor) -> Tensor:
    """Return (B, N, D): rows of `added` (M', D) at the positions that `mask` (B, N) marks, zeros elsewhere."""
    whole = hidden.new_zeros(*mask.shape, hidden.shape[2])
    return whole.masked_scatter(mask.to(hidden.device)[..., None], added.to(hidden.device, hidden.dtype))
