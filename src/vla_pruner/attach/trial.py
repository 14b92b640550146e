"""A trial of whether pruning is faster on a user's own control steps, timed unpruned and pruned in turns."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

log = logging.getLogger("vla_pruner")

STEPS = 10
"""Control steps of each kind that are timed."""
UNTIMED = 2 * STEPS
"""Control steps in a row outside of any call that is timed, after which a warning says so."""
PASSED_OVER = 3
"""First control steps of each kind that are discarded: compiling, capturing and allocating are no part of a step."""


@dataclass(frozen=True)
class Verdict:
    """The result of a trial.

    Attributes:
        unpruned_ms, pruned_ms: medians of whole control steps, in milliseconds.
        steps: timed control steps of each kind.
        rows: robots in each control step.
    """

    unpruned_ms: float
    pruned_ms: float
    steps: int
    rows: int

    @property
    def faster(self) -> bool:
        """True if pruned control steps are faster."""
        return self.pruned_ms < self.unpruned_ms

    def __str__(self) -> str:
        robots = "" if self.rows == 1 else f" of {self.rows} robots"
        return (
            f"a pruned control step{robots} took {self.pruned_ms:.1f} ms and an unpruned one {self.unpruned_ms:.1f} ms "
            f"(medians of {self.steps} each, in turns)"
        )


@dataclass
class Trial:
    """Runs every other control step that the method would prune unpruned, until enough of both kinds were timed.

    Warm-up steps and other steps that the method itself leaves unpruned are not timed. For the memory, an unpruned step
    counts as a refresh. Batches of different sizes are timed apart; the first size with enough steps decides.

    Attributes:
        clock: waits until the device is done and returns the time in seconds; called at both ends of a step.
        calls: the names of the calls that are timed, in words.
        verdict: the result; None until it is known.
        told: whether the session has acted on the result.
    """

    clock: Callable[[], float]
    calls: str
    verdict: Verdict | None = None
    told: bool = False
    _taken: dict[int, dict[bool, list[float]]] = field(default_factory=dict)
    _opened: list[tuple[int, bool]] = field(default_factory=list)
    _timing: bool = False
    _untimed: int = 0

    def prunes(self, rows: int, prunes: bool) -> bool:
        """Register a control step that opens, and return True if it is pruned.

        Args:
            rows: robots in the control step.
            prunes: whether the method prunes it.
        """
        if not self._timing:
            if self.verdict is None:
                self._warn_untimed()
            return prunes  # the model was called by hand, or the verdict is known
        self._untimed = 0
        if not prunes:
            self._opened.append((0, False))
            return False
        taken = self._taken.setdefault(rows, {True: [], False: []})
        pruned = len(taken[True]) <= len(taken[False])
        self._opened.append((rows, pruned))
        return pruned

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time a policy's own call. A call that fails, or that is not exactly one control step, does not count."""
        if self.verdict is not None:
            yield
            return
        self._opened.clear()
        self._timing = True
        try:
            start = self.clock()
            yield
            seconds = self.clock() - start
        finally:
            self._timing = False
        if len(self._opened) != 1:
            return
        ((rows, pruned),) = self._opened
        if rows:
            self._taken[rows][pruned].append(seconds)
            self._decide(rows)

    def _warn_untimed(self) -> None:
        self._untimed += 1
        if self._untimed == UNTIMED:
            log.warning(
                "only_if_faster: %d control steps in a row were not timed, since none ran within %s. Pruning goes on, "
                "and nothing decides whether it is faster: make such a call in every control step, or time your own "
                "steps with and without a session.",
                UNTIMED,
                self.calls,
            )

    def _decide(self, rows: int) -> None:
        counted = {kind: taken[PASSED_OVER:] for kind, taken in self._taken[rows].items()}
        if min(map(len, counted.values())) >= STEPS:
            pruned, unpruned = (1e3 * statistics.median(counted[kind][:STEPS]) for kind in (True, False))
            self.verdict = Verdict(unpruned, pruned, STEPS, rows)
