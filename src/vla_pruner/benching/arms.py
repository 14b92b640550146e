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
from vla_pruner.method_names import encoder_title, with_encoders
from vla_pruner.methods import EncoderReuse

BASELINE = "unpruned"


@dataclass(frozen=True)
class Arm:
    """One way to run the policy.

    Attributes:
        name: its name in reports; unique.
        kind: the method's name, or "unpruned".
        method: the method that is attached; None runs the untouched model.
        encoder: the patches that the vision encoder encodes; None: all. It never refreshes by itself, so that every
            step that is measured reuses patches.
    """

    name: str
    kind: str
    method: Any
    encoder: EncoderReuse | None = None

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
    for made, chosen in with_encoders(settings.chosen_methods(), settings.chosen_encoders()):
        # Every step that is measured reuses patches: no step but the first encodes all of them.
        encoder = None if chosen is None else replace(chosen, refresh_every=None)
        if any((made.method, encoder) == (arm.method, arm.encoder) for arm in arms):
            continue
        title = made.title + encoder_title(chosen)
        # Third-party methods may differ in options that no title shows.
        same = sum(arm.name.partition(" #")[0] == title for arm in arms)
        arms.append(Arm(f"{title} #{same + 1}" if same else title, made.name, made.method, encoder))
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
        with self.subject.attach(arm.method, arm.encoder) as session:
            if session is None:
                self.subject.step()
                return
            self.memories[arm.name] = warm(self.subject, session)
            self.kept[arm.name] = _kept(session)

    @contextmanager
    def open(self, arm: Arm) -> Iterator[Any]:
        """Open the arm's turn: yield its session (None for the untouched model), after one step that is not measured.

        This is the one place where an arm gets ready.
        """
        with self.subject.attach(arm.method, arm.encoder) as session:
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
            SessionError: it was not pruned, or not to as many tokens as before, or it encoded all patches although the
                arm reuses some.
        """
        kept = None if session is None else _kept(session)
        if kept != self.kept[arm.name]:
            raise SessionError(
                f"A step of {arm.name} kept {kept} visual tokens, not {self.kept[arm.name]}; it cannot be compared."
            )
        if arm.encoder is not None and session is not None and None in (session.encoded or (None,)):
            raise SessionError(f"A step of {arm.name} encoded all patches; it cannot be compared.")


def _kept(session: Any) -> int | None:
    return None if session.kept is None else int(session.kept.shape[1])
