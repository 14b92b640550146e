"""The base of the ablations with an action score: VLA-Pruner's estimate over time, and its warm-up."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from vla_pruner.checks import check_choice, is_count, is_number
from vla_pruner.errors import BudgetError, OptionError
from vla_pruner.methods.base import Evidence
from vla_pruner.methods.budgeted import Budgeted
from vla_pruner.methods.schedule import Schedule
from vla_pruner.methods.scores import temporal_estimate


@dataclass(frozen=True)
class Smoothed(Budgeted):
    """A method that reads the decayed mean of the last control steps' action attention. A subclass adds `select`.

    Attributes:
        keep: visual tokens kept; see `Budgeted`.
        window: control steps that are smoothed (paper: 3). At least as many steps run unpruned at the start of an
            episode, since without history there is nothing to choose by.
        decay: weight of a step against the next newer one, in (0, 1] (paper: 0.8).
        unseen: the score in the history of a token that was pruned away: "zero" (as published) or "carry" (the score at
            which it was last seen, times `decay` for each step since).
        refresh_every: run the first step of an episode and every n-th after it unpruned, so that every token is seen
            again, and begin the history anew there; None never does.
        warmup_steps: more unpruned steps at the start of an episode than `window`, if any.
        layer, pruned: see `Method`.
    """

    window: int = field(default=3, kw_only=True)
    decay: float = field(default=0.8, kw_only=True)
    unseen: str = field(default="zero", kw_only=True)
    refresh_every: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_count(self.window, 1):
            raise OptionError(f"window={self.window!r} was given; it is an int of 1 or more (the paper's is 3).")
        if not is_number(self.decay) or not 0 < self.decay <= 1:
            raise OptionError(f"decay={self.decay!r} was given; the decay is in (0, 1] (the paper's is 0.8).")
        check_choice("unseen", self.unseen, ("zero", "carry"))
        _ = self.schedule  # refuses values out of range
        if self.layer == 0 and self.refresh_every is None:
            raise BudgetError(
                "layer=0 was given without refresh_every: action attention comes from memory alone, and what is pruned "
                "away before the decoder would never be seen again; give refresh_every=4 or the like."
            )

    @property
    def history(self) -> int:
        return self.window

    @property
    def schedule(self) -> Schedule:
        return Schedule(max(self.window, self.warmup_steps), self.refresh_every)

    def action_estimate(self, evidence: Evidence) -> Tensor:
        """Return (B, M) float32: the action attention of this step, estimated from the steps before."""
        return temporal_estimate(
            evidence.memory, self.decay, self.unseen, steps=evidence.steps, refresh_every=self.refresh_every
        )
