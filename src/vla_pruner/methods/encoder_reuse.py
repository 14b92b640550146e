"""Reuse inside the vision encoder: encode patches that changed or that the actions attended to; the rest stay as they
were in the last control step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vla_pruner.checks import is_count
from vla_pruner.errors import BudgetError, OptionError
from vla_pruner.methods.base import resolve_keep
from vla_pruner.methods.numbers import plain
from vla_pruner.methods.selection import top_ids


@dataclass(frozen=True)
class EncoderReuse:
    """In each control step only some patches of an image run through the layers of the vision encoder. The others keep
    the outputs of the last step, and their keys and values stay readable at every layer. It goes with a method that
    prunes the decoder: `VLAPruner(keep=0.25).attach(policy, encoder=EncoderReuse(keep=0.25))`.

    No paper. The mechanism is that of Eventful Transformers (Dutson et al., arXiv 2308.13494, video recognition) with a
    fixed number of patches in place of a threshold, so that shapes are static. Nobody has published what it does to the
    success of a robot policy without training. A patch whose pixels stayed would nevertheless change with its
    surroundings; that part of the change is missing until the patch is encoded again or everything is. Images that
    require a gradient are encoded whole.

    Rank of a patch: the change of its pixels since they were last encoded, as a share of the largest change in its
    image, plus `attended` times the attention of the last control step's actions to its visual token, as a share of the
    largest in its image.

    Attributes:
        keep: patches of each image that are encoded, as a fraction in (0, 1] (float) or a number of patches (int). 1.0
            encodes all of them, bit-identical to the untouched encoder.
        refresh_every: the first control step of an episode and every n-th after it encode everything and begin anew;
            1: all do. None: only the first.
        attended: weight of the actions' attention, 0 or more; 0 chooses by pixels alone. Methods that read no action
            attention have none to give.

    Raises:
        BudgetError: `keep` is neither.
        OptionError: another option is out of its range.
    """

    keep: float | int = 0.25
    refresh_every: int | None = 8
    attended: float = 0.5

    def __post_init__(self) -> None:
        for name in ("keep", "refresh_every", "attended"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        if not is_count(self.keep, 1) and not (isinstance(self.keep, float) and 0 < self.keep <= 1):
            raise BudgetError(
                f"keep={self.keep!r} was given; of a vision encoder it is a fraction of the patches of each image in "
                "(0, 1] as a float, or a number of patches as an int (so keep=1 is one patch and keep=1.0 is all)."
            )
        if self.refresh_every is not None and not is_count(self.refresh_every, 1):
            raise OptionError(f"refresh_every={self.refresh_every!r} was given; it is None or an int of 1 or more.")
        weight = self.attended
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise OptionError(f"attended={weight!r} was given; it is a finite number of 0 or more.")

    def budget(self, patches: int) -> int:
        """Return the number of patches encoded out of `patches` of an image.

        Raises:
            BudgetError: more are to be encoded than there are.
        """
        if not isinstance(self.keep, float) and self.keep > patches:
            raise BudgetError(
                f"keep={self.keep} patches was given, but an image of this vision encoder has {patches}; give at most "
                "that many."
            )
        return resolve_keep(self.keep, patches)

    def encodes_all(self, steps: int) -> bool:
        """Return True if a control step encodes everything.

        Args:
            steps: control steps since the last one that did; 0: there was none.
        """
        return steps == 0 or (self.refresh_every is not None and steps >= self.refresh_every)

    def select(self, change: Tensor, attention: Tensor | None, k: int) -> Tensor:
        """Return the ids (I, k) int64, sorted, of the patches of each image that are encoded; ties by the smaller id.

        Args:
            change: (I, P) float32 of 0 or more, how much the pixels of each patch changed since they were encoded.
            attention: (I, P) float32 of 0 or more, the last control step's action attention to the visual token that
                each patch is part of; None if there is none.
            k: how many.
        """
        rank = _shares(change)
        if attention is not None:
            rank = rank + self.attended * _shares(attention)
        return top_ids(rank, torch.ones_like(rank, dtype=torch.bool), k)


def _shares(amounts: Tensor) -> Tensor:
    """Return amounts (I, P) as shares of the largest in each row; 0 where all are."""
    amounts = amounts.float().nan_to_num(nan=torch.finfo(torch.float32).max)  # a NaN is to be seen, not to be missed
    return amounts / amounts.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
