"""Compiled arms: each on a copy of the policy that shares its weights, compiled once for the whole benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from vla_pruner.accelerators import now
from vla_pruner.benching.arms import Arm, Turns
from vla_pruner.benching.feeds import feed
from vla_pruner.benching.report import Compiling
from vla_pruner.benching.subject import Subject, warm
from vla_pruner.errors import SessionError
from vla_pruner.policies.compiled_copies import compiled_with, graphs, sharing_copy

SETTLED = 3
"""Runs of each kind of step before anything is timed: on CUDA one warms a graph up, the next records it."""


class CompiledTurns(Turns):
    """Arms that are compiled, the untouched model too, each with a session of its own that stays attached. A context
    manager; compiled code goes when it closes.

    Args:
        subject: compiled in one copy an arm; it stays as it is itself.
        arms: as of `Turns`.
        backend: as in `torch.compile`.
        tell: called with each arm before it is compiled.
        memories: by arm, the memory of the uncompiled arm before its first pruned step; the programs of the unpruned
            steps before it are then not compiled. None: each arm begins an episode of its own.

    Attributes:
        compiling: each arm's number of graphs, and the seconds that they took.

    Raises:
        UnsupportedModelError: the policy cannot be compiled, or not be copied without its weights.
    """

    def __init__(
        self,
        subject: Subject,
        arms: Sequence[Arm],
        backend: str,
        tell: Callable[[Arm], None] = lambda _: None,
        memories: Mapping[str, Any] | None = None,
    ) -> None:
        self.compiling: dict[str, Compiling] = {}
        self._backend = backend
        self._tell = tell
        self._given = memories
        self._subjects: dict[str, Subject] = {}
        self._sessions: dict[str, Any] = {}
        self._open = ExitStack()
        try:
            super().__init__(subject, arms)
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> CompiledTurns:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def subject_of(self, arm: Arm) -> Subject:
        """Return the arm's own copy."""
        return self._subjects[arm.name]

    def _begin(self, arm: Arm) -> None:
        self._tell(arm)
        self.kept[arm.name] = None
        subject = self._subjects[arm.name] = twin(self.subject)
        session = self._sessions[arm.name] = self._open.enter_context(
            compiled_with(arm.method, subject.policy, self._backend, **subject.feed.attach)
        )
        with _noting(subject) as spent:
            if session is not None:
                self.memories[arm.name] = self._memory_before(arm, subject, session)
                self.kept[arm.name] = int(session.kept.shape[1])
            for _ in range(SETTLED):
                self.ready(arm, session)
                subject.step()
            if arm.refresh_every is not None:
                for _ in range(SETTLED):
                    self.make_fresh(arm, session)
                    subject.step()
        self.compiling[arm.name] = Compiling(spent.graphs, spent.seconds)

    def _memory_before(self, arm: Arm, subject: Subject, session: Any) -> Any:
        """Run the arm up to a pruned step, and return the memory before it."""
        if self._given is None:
            return warm(subject, session)
        session.memory = memory = self._given[arm.name]
        subject.step()
        if session.kept is None:
            raise SessionError(f"A step of {arm.name} was not pruned, with a memory that has its unpruned steps in it.")
        return memory

    @contextmanager
    def open(self, arm: Arm) -> Iterator[Any]:
        """Open the arm's turn, as `Turns` does.

        Raises:
            SessionError: something was compiled in it, so the measured time is not that of a robot.
        """
        session, before = self._sessions[arm.name], graphs()
        if session is not None:
            session.memory = self.memories[arm.name]
        try:
            self.subject_of(arm).step()
            yield session
        finally:
            if session is not None:
                session.clock = None
        anew = graphs() - before
        if anew:
            raise SessionError(
                f"{anew} graphs of {arm.name} were compiled anew while it was measured, so its times mean nothing. "
                "A step must have the same shapes each time; leave compile out if it cannot."
            )


def twin(subject: Subject) -> Subject:
    """Return the same policy and inputs once more, without the memory of its weights."""
    policy = sharing_copy(subject.policy)
    return Subject(policy, feed(policy, subject.settings, subject.device), subject.settings, subject.device)


@dataclass
class _Spent:
    graphs: int = 0
    seconds: float = 0.0


@contextmanager
def _noting(subject: Subject) -> Iterator[_Spent]:
    """Add up the steps in which something was compiled."""
    step, spent = subject.step, _Spent()

    def noted() -> Any:
        before, start = graphs(), now(subject.device)
        result = step()
        anew = graphs() - before
        if anew:
            spent.graphs += anew
            spent.seconds += now(subject.device) - start
        return result

    subject.step = noted
    try:
        yield spent
    finally:
        subject.step = step
