"""The base of the memory-free methods: one budget, and an optional warm-up at the start of an episode."""

from __future__ import annotations

from dataclasses import dataclass, field

from vla_pruner.checks import is_count
from vla_pruner.errors import OptionError
from vla_pruner.methods.base import Keep, Method, check_keep, resolve_keep
from vla_pruner.methods.schedule import Schedule


@dataclass(frozen=True)
class Budgeted(Method):
    """A method with a `keep`. A subclass adds options and `select`.

    Attributes:
        keep: visual tokens kept, as a fraction in (0, 1] (float) or a number of tokens (int); one budget for all
            cameras, or a mapping of camera names to budgets.
        warmup_steps: control steps at the start of an episode that are not pruned. The methods need none. With the
            `window` of a `VLAPruner` here, both prune the same steps and can be compared at equal `keep`. In a batch
            nothing is pruned until no row is in its warm-up, as in VLAPruner's `warmup="full"`.
        layer, pruned: see `Method`.
    """

    keep: Keep = 0.25
    warmup_steps: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        if not is_count(self.warmup_steps, 0):
            raise OptionError(
                f"warmup_steps={self.warmup_steps!r} was given; it is the number of unpruned control steps at the "
                "start of an episode: an int of 0 or more."
            )

    def budget(self, tokens: int) -> int:
        return resolve_keep(self.keep, tokens)

    @property
    def schedule(self) -> Schedule:
        return Schedule(warm_up=self.warmup_steps)
