"""The times of the parts of a control step, for every reply."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vla_pruner.attach.family import Family
from vla_pruner.policies.base import Policy
from vla_pruner.timing import StageTimer, watched_of


class StepTimer(StageTimer):
    """A stage timer that also knows when the first stage of a step began, and keeps no more than the last step."""

    def __init__(self, policy: Policy, family: Family) -> None:
        super().__init__(policy, watched_of(family))
        self._first: float | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """See `StageTimer.stage`."""
        if self._first is None:
            self._first = self._read()
        with super().stage(name):
            yield

    @contextmanager
    def step(self) -> Iterator[None]:
        """See `StageTimer.step`."""
        self.steps.clear()
        self._first = None
        with super().step():
            self._start = self._read()
            yield

    def timing(self) -> dict[str, float]:
        """Return the milliseconds of the last step, by the names that replies have."""
        step = self.steps[-1]
        before = 0.0 if self._first is None else self._first - self._start
        return {
            "infer_ms": step.total,
            "preprocess_ms": 1e3 * before,
            "vision_ms": step.vision,
            "prune_ms": step.pruning,
            "prefill_ms": step.prefill,
            "action_ms": step.decode,
        }
