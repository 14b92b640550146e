"""The schedule of a method: which control steps of an episode are pruned."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vla_pruner.checks import is_count
from vla_pruner.errors import OptionError, SessionError
from vla_pruner.methods.memory import Memory

GATED_FROM = 2
"""The control steps at the start of an episode that a motion gate leaves unpruned."""
LONGEST_STREAK = 3
"""The control steps in a row that a motion gate lets be pruned."""


@dataclass(frozen=True)
class Schedule:
    """The control steps of an episode that a method prunes. All rows of a batch share one shape, so an unpruned step of
    one row is unpruned for all.

    Attributes:
        warm_up: control steps at the start of an episode that run unpruned; None: all of them do.
        refresh_every: the first step of an episode and every n-th after it run unpruned; None: no such steps.
        gate: tau of a motion gate: a step is pruned unless the arm's path in the last one is the shortest of the last
            tau; None: whatever the arm does.

    Raises:
        OptionError: `refresh_every` or `gate` is out of its range.
    """

    warm_up: int | None = 0
    refresh_every: int | None = None
    gate: int | None = None

    def __post_init__(self) -> None:
        if self.refresh_every is not None and not is_count(self.refresh_every, 2):
            raise OptionError(f"refresh_every={self.refresh_every!r} was given; it is None or an int of 2 or more.")
        if self.gate is not None and not is_count(self.gate, 2):
            raise OptionError(
                f"gate={self.gate!r} was given; it is None, or the number of control steps whose paths are compared: "
                "an int of 2 or more."
            )

    def prunes(self, memory: Memory) -> bool:
        """Return True if the next control step is pruned. Only counters on the CPU are read.

        Raises:
            SessionError: there is a gate, and an arm's motion was not reported after every step that counts.
        """
        steps = memory.steps.tolist()
        if self.warm_up is None or min(steps) < self.warm_up:
            return False
        if self.refresh_every is not None and any(step % self.refresh_every == 0 for step in steps):
            return False
        return self.gate is None or _moves_far(memory)


def _moves_far(memory: Memory) -> bool:
    """Return True if the gate is open in every row."""
    steps = memory.steps.tolist()
    if min(steps) < GATED_FROM or max(memory.streak.tolist()) >= LONGEST_STREAK:
        return False
    paths = [row[-step:] for row, step in zip(memory.motion.tolist(), steps, strict=True)]
    if any(math.isnan(path) for row in paths for path in row):
        raise SessionError(
            "The method prunes by how far the arm moves, but was not told after every control step; call "
            "session.moved(distance) after each, or attach the method with gate=None."
        )
    return all(row[-1] > min(row) for row in paths)
