"""Compiled arms: each on a copy of the policy that shares its weights, compiled once and kept for the whole benchmark.

Compiled code lives as long as its session, so arms that take turns cannot share one policy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn

from vla_pruner.accelerators import now
from vla_pruner.benching.arms import Arm, Turns
from vla_pruner.benching.feeds import feed
from vla_pruner.benching.report import Compiling
from vla_pruner.benching.subject import Subject, warm
from vla_pruner.errors import SessionError, UnsupportedModelError
from vla_pruner.front import compiled
from vla_pruner.policies.base import module_of
from vla_pruner.wording import a_type

SETTLED = 3
"""Runs of each kind of step before anything is timed: on CUDA one warms a graph up, the next records it."""


class CompiledTurns(Turns):
    """Arms that are compiled, the untouched model too, each with a session of its own that stays attached. A context
    manager; compiled code goes when it closes.

    Args:
        subject: what is compiled, once an arm; it stays as it is itself.
        arms: as of `Turns`.
        backend: as in `torch.compile`.
        tell: told of each arm before it is compiled.

    Attributes:
        compiling: how many graphs each arm has, and the seconds that they took.

    Raises:
        UnsupportedModelError: the policy cannot be compiled, or not be copied without its weights.
    """

    def __init__(
        self, subject: Subject, arms: Sequence[Arm], backend: str, tell: Callable[[Arm], None] = lambda _: None
    ) -> None:
        self.compiling: dict[str, Compiling] = {}
        self._backend = backend
        self._tell = tell
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
        """The arm's own copy."""
        return self._subjects[arm.name]

    def _begin(self, arm: Arm) -> None:
        self._tell(arm)
        self.kept[arm.name] = None
        subject = self._subjects[arm.name] = twin(self.subject)
        session = self._sessions[arm.name] = self._compile(arm, subject)
        with _noting(subject) as spent:
            if session is not None:
                self._memories[arm.name] = warm(subject, session)
                self.kept[arm.name] = int(session.kept.shape[1])
            for _ in range(SETTLED):
                self.ready(arm, session)
                subject.step()
            if arm.refresh_every is not None:
                for _ in range(SETTLED):
                    self.make_fresh(arm, session)
                    subject.step()
        self.compiling[arm.name] = Compiling(spent.graphs, spent.seconds)

    def _compile(self, arm: Arm, subject: Subject) -> Any:
        if arm.method is None:
            self._open.enter_context(compiled(subject.policy, self._backend, **subject.feed.attach))
            return None
        session = self._open.enter_context(subject.attach(arm.method))
        session.compile(self._backend)
        return session

    @contextmanager
    def open(self, arm: Arm) -> Iterator[Any]:
        """The arm's turn, as of `Turns`.

        Raises:
            SessionError: something was compiled in it, so what was measured is not what a robot would wait for.
        """
        session, before = self._sessions[arm.name], graphs()
        if session is not None:
            session.memory = self._memories[arm.name]
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


def graphs() -> int:
    """How many graphs torch compiled in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def twin(subject: Subject) -> Subject:
    """The same policy and inputs once more, without the memory of its weights."""
    policy = sharing_copy(subject.policy)
    return Subject(policy, feed(policy, subject.settings, subject.device), subject.settings, subject.device)


def sharing_copy(policy: Any) -> Any:
    """A copy of a policy whose parameters and buffers are the original's own.

    Raises:
        UnsupportedModelError: some of them are made anew when the policy is copied.
    """
    module: nn.Module = module_of(policy)
    shared = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    copied = copy.deepcopy(module, dict(shared))  # what is in the memo is not copied
    held = chain(copied.named_parameters(), copied.named_buffers())
    own = [name for name, tensor in held if id(tensor) not in shared]
    if own:
        raise UnsupportedModelError(
            f"Each compiled arm needs {a_type(module)} of its own with the same weights, but a copy of it "
            f"makes {', '.join(own[:3])} anew; leave compile out."
        )
    if policy is module:
        return copied
    around = copy.copy(policy)
    around.module = copied
    return around


@dataclass
class _Spent:
    graphs: int = 0
    seconds: float = 0.0


@contextmanager
def _noting(subject: Subject) -> Iterator[_Spent]:
    """Adds up the steps in which something was compiled."""
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
