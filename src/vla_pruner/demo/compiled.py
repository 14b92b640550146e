"""The demo's arms compiled: each on a copy of the policy that shares its weights, before the episodes and for all of
them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from vla_pruner.demo.arms import Arm
from vla_pruner.demo.probe import act, paces, until_pruned
from vla_pruner.families import family_of
from vla_pruner.observations import Observation
from vla_pruner.policies.compiled_copies import compiled_with, graphs, sharing_copy
from vla_pruner.wording import said_by

BACKEND = "inductor"

SETTLED = 2
"""Control steps of each kind after the first: on CUDA one warms a graph up, the next records it."""


@dataclass(frozen=True)
class Compiling:
    """The graphs that were compiled for the episodes.

    Attributes:
        backend: as in `torch.compile`.
        one_graph: whether the actions are decoded in the prompt's graph, so that both are timed as one.
        graphs: how many, by the arm's key.
        seconds: until every graph was there, by the arm's key.
        unpruned_ms: median milliseconds of an unpruned control step, uncompiled and compiled, in turns.
        anew: graphs that were compiled while episodes ran, which times of the arms have in them.
    """

    backend: str
    one_graph: bool
    graphs: dict[str, int]
    seconds: dict[str, float]
    unpruned_ms: tuple[float, float]
    anew: int = 0

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": {key: round(value, 1) for key, value in self.seconds.items()}}


class CompiledArms:
    """Every arm compiled, the unpruned one too, each with a session of its own that stays attached. A context manager;
    compiled code and copies go when it closes.

    Args:
        policy: it stays as it is.
        arms: of the demo.
        observation: what the steps run on in which the graphs are compiled.
        backend: as in `torch.compile`.
        tell: called with each arm, and the seconds that it took, when it is ready.

    Raises:
        UnsupportedModelError: the policy cannot be compiled, or not be copied without its weights. Torch raises errors
            of its own if it cannot compile.
    """

    def __init__(
        self,
        policy: Any,
        arms: Sequence[Arm],
        observation: Observation,
        backend: str = BACKEND,
        tell: Callable[[Arm, float], None] = lambda *_: None,
    ) -> None:
        self._backend = backend
        self._policies: dict[str, Any] = {}
        self._sessions: dict[str, Any] = {}
        self._memories: dict[str, Any] = {}
        self._graphs: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._open = ExitStack()
        family = family_of(policy)
        self._one_graph = family.acting is not None and family.anatomy.head is not None
        try:
            for arm in arms:
                self._add(arm, sharing_copy(policy), observation)
                tell(arm, self._seconds[arm.key])
        except BaseException:
            self.close()
            raise
        self._unpruned_ms = (math.nan, math.nan)
        unpruned = next((self._policies[arm.key] for arm in arms if arm.method is None), None)
        if unpruned is not None:
            self._unpruned_ms = paces(policy, unpruned, observation)
        self._compiled = graphs()

    def __enter__(self) -> CompiledArms:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach every session and let go of all that was compiled."""
        self._policies.clear()
        self._sessions.clear()
        self._open.close()

    @property
    def compiling(self) -> Compiling:
        """The graphs that were compiled so far."""
        anew = graphs() - self._compiled
        return Compiling(
            self._backend, self._one_graph, dict(self._graphs), dict(self._seconds), self._unpruned_ms, anew
        )

    def _add(self, arm: Arm, policy: Any, observation: Observation) -> None:
        began, before = time.monotonic(), graphs()
        session = self._open.enter_context(compiled_with(arm.method, policy, self._backend))
        if session is not None:
            until_pruned(policy, session, observation)
        for _ in range(1 + SETTLED):
            act(policy, observation)
        if session is not None:
            self._memories[arm.key] = session.memory.reset([0])
        self._policies[arm.key], self._sessions[arm.key] = policy, session
        self._graphs[arm.key], self._seconds[arm.key] = graphs() - before, time.monotonic() - began

    @contextmanager
    def open(self, arm: Arm, episode_seed: int) -> Iterator[tuple[Any, Any]]:
        """Begin an episode of an arm: yield its policy and its session, None for the untouched model.

        A method that draws at random draws from the number of the episode, which is the seed here: an option of the
        method would be fixed in its graph.
        """
        session = self._sessions[arm.key]
        if session is not None:
            session.reset()
            session.memory = replace(self._memories[arm.key], episode=torch.tensor([episode_seed]))
        try:
            yield self._policies[arm.key], session
        finally:
            if session is not None:
                session.clock = None


def why_not(backend: str = BACKEND) -> str | None:
    """Return why torch cannot compile on the CPU of this machine, and what to do; None if it can as far as is known."""
    if backend != BACKEND:
        return None
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:
        return None  # another torch: compiling will tell
    try:
        get_cpp_compiler()
    except Exception:  # torch has an error of its own for each system
        return (
            "No arm is compiled, since torch finds no C++ compiler here. Install one (Debian and Ubuntu: apt-get "
            "install g++; macOS: xcode-select --install), or name yours in the variable CXX; --no-compile leaves this "
            "sentence out."
        )
    return None


def failed(error: Exception) -> str:
    """Return the sentence for a policy that could not be compiled."""
    error = getattr(error, "inner_exception", error)  # the backend's own, within torch's
    told = said_by(error).strip().partition("\n")[0].rstrip(".")
    return (
        f"No arm is compiled, since compiling this policy failed ({type(error).__name__}: {told}); --no-compile leaves "
        "it out."
    )
