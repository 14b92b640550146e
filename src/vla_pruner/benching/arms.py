"""The arms of a benchmark, and how they take turns on one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from vla_pruner.benching.settings import BenchSettings
from vla_pruner.benching.subject import Subject, warm
from vla_pruner.errors import SessionError
from vla_pruner.fate import Fate

BASELINE = "unpruned"


@dataclass(frozen=True)
class Arm:
    """One way to run the policy.

    Attributes:
        name: its name in reports; unique.
        kind: the method's name, or "unpruned".
        method: the method that is attached; None runs the untouched model.
    """

    name: str
    kind: str
    method: Any

    @property
    def layer(self) -> int:
        """Layers before this one run on every token."""
        return 0 if self.method is None else self.method.layer

    @property
    def pruned(self) -> str:
        """The fate of the tokens that are not kept."""
        return Fate.DROP if self.method is None else self.method.pruned

    @property
    def refresh_every(self) -> int | None:
        """The number of steps of which one runs unpruned; None: none does."""
        return None if self.method is None else self.method.schedule.refresh_every


def arms_of(settings: BenchSettings) -> tuple[Arm, ...]:
    """Return the untouched model first, then every method that the settings name."""
    arms = [Arm(BASELINE, BASELINE, None)]
    for made in settings.chosen_methods():
        if any(made.method == arm.method for arm in arms):
            continue
        # Third-party methods may differ in options that no title shows.
        same = sum(arm.name.partition(" #")[0] == made.title for arm in arms)
        arms.append(Arm(f"{made.title} #{same + 1}" if same else made.title, made.name, made.method))
    return tuple(arms)


def turn(arms: Sequence[Arm], round_number: int) -> list[Arm]:
    """Return the order of the arms in this round: another one begins each time."""
    first = round_number % len(arms)
    return [*arms[first:], *arms[:first]]


class Turns:
    """Runs any arm at any time: its session is attached for a turn and leaves no trace, its memory is kept between.

    Attributes:
        kept: visual tokens kept of each row, by arm; None of the untouched model.
        memories: the memory before a pruned step, by pruned arm.
    """

    def __init__(self, subject: Subject, arms: Sequence[Arm]) -> None:
        self.subject = subject
        self.arms = tuple(arms)
        self.kept: dict[str, int | None] = {}
        self.memories: dict[str, Any] = {}
        for arm in self.arms:
            self._begin(arm)

    def subject_of(self, arm: Arm) -> Subject:
        """Return the subject that the arm runs on."""
        return self.subject

    def _begin(self, arm: Arm) -> None:
        """Run an episode's first steps, which some methods do not prune."""
        self.kept[arm.name] = None
        with self.subject.attach(arm.method) as session:
            if session is None:
                self.subject.step()
                return
            self.memories[arm.name] = warm(self.subject, session)
            self.kept[arm.name] = int(session.kept.shape[1])

    @contextmanager
    def open(self, arm: Arm) -> Iterator[Any]:
        """Open the arm's turn: yield its session (None for the untouched model), after one step that is not measured.

        This is the one place where an arm gets ready.
        """
        with self.subject.attach(arm.method) as session:
            if session is not None:
                session.memory = self.memories[arm.name]
            self.subject.step()
            yield session

    def ready(self, arm: Arm, session: Any) -> None:
        """Run the steps that the method leaves unpruned, so that the next one is pruned."""
        while session is not None and not arm.method.prunes(session.memory):
            self.subject_of(arm).step()

    def make_fresh(self, arm: Arm, session: Any) -> None:
        """Make the next step one that its method leaves unpruned, by counting the steps before it as more."""
        memory = self.memories[arm.name]
        while arm.method.prunes(memory):
            memory = replace(memory, steps=memory.steps + 1)
        session.memory = memory

    def check(self, arm: Arm, session: Any) -> None:
        """Check that the step that was just measured is one of its arm.

        Raises:
            SessionError: it was not pruned, or not to as many tokens as before.
        """
        kept = None if session is None or session.kept is None else int(session.kept.shape[1])
        if kept != self.kept[arm.name]:
            raise SessionError(
                f"A step of {arm.name} kept {kept} visual tokens, not {self.kept[arm.name]}; it cannot be compared."
            )
