"""Running the paired episodes: every arm from the same initial states, interleaved, with only the control steps
timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vla_pruner.demo.arms import Arm
from vla_pruner.timing import StageTimer, StepTime


class Environment(Protocol):
    """One task: `vla_pruner.demo.scenes.Scene`, or a fake in tests."""

    def reset(self, seed: int) -> Any: ...
    def step(self, chunk: np.ndarray) -> tuple[Any, bool, bool]: ...
    def render(self, size: int) -> np.ndarray: ...
    def close(self) -> None: ...


class OpenedArms(Protocol):
    """Something that begins an episode of an arm: `vla_pruner.demo.arms.UncompiledArms`, or
    `vla_pruner.demo.compiled.CompiledArms`.
    """

    def open(self, arm: Arm, episode_seed: int) -> AbstractContextManager[tuple[Any, Any]]: ...


@dataclass(frozen=True)
class Unit:
    """One task from one initial state, which every arm runs."""

    task: str
    seed: int


@dataclass(frozen=True)
class Trace:
    """The record of one episode: one entry a control step, and one more frame at its end."""

    frames: list[np.ndarray]
    """(size, n * size, 3) uint8, n cameras side by side."""
    kept: list[list[int] | None]
    """The ids of the visual tokens kept; None if the step was not pruned."""


@dataclass(frozen=True)
class Episode:
    """The result of one arm on one unit."""

    arm: str
    unit: Unit
    success: bool
    times: list[StepTime]
    """One entry a control step, without environment and rendering."""
    kept: list[int | None]
    """The number of visual tokens kept in each control step; None if the step was not pruned."""
    trace: Trace | None = field(default=None, repr=False)

    @property
    def steps(self) -> int:
        return len(self.times)


def plan(tasks: Sequence[str], episodes: int, seed: int) -> list[Unit]:
    """Return all units, tasks taking turns, so that a run that ends early has seen every task about equally often."""
    return [Unit(task, seed + index) for index in range(episodes) for task in tasks]


def run_episode(
    opened: OpenedArms, arm: Arm, environment: Environment, unit: Unit, trace_size: int | None = None
) -> Episode:
    """Run one episode to its end.

    Args:
        opened: gives the arm's policy, with `act(images, instruction, proprio)` and the submodules that `StageTimer`
            needs.
        trace_size: height of the frames to record; None records none.
    """
    observation = environment.reset(unit.seed)
    kept: list[int | None] = []
    trace = None if trace_size is None else Trace([], [])
    success = done = False
    with opened.open(arm, unit.seed) as (policy, session), StageTimer(policy) as timer:
        if session is not None:
            session.clock = timer.stage
        while not done:
            if trace is not None and trace_size is not None:
                trace.frames.append(environment.render(trace_size))
            with timer.step():
                chunk = policy.act(observation.images, observation.instruction, observation.proprio)
            ids = None if session is None else session.kept
            kept.append(None if ids is None else int(ids.shape[1]))
            if trace is not None:
                trace.kept.append(None if ids is None else ids[0].tolist())
            observation, success, done = environment.step(chunk)
        if trace is not None and trace_size is not None:
            trace.frames.append(environment.render(trace_size))
    return Episode(arm.key, unit, bool(success), timer.steps, kept, trace)


class Runner:
    """Runs units one by one, each with every arm; finished units stay available if it is interrupted.

    Args:
        arms: the baseline first.
        environments: makes the environment of a task; it is kept open until `close`.
        trace_size: records the first episode of each task with frames of this size.
    """

    def __init__(
        self, arms: Sequence[Arm], environments: Callable[[str], Environment], trace_size: int | None = None
    ) -> None:
        self.arms = arms
        self.finished: list[dict[str, Episode]] = []
        """One entry a unit that all arms have finished: arm key -> episode."""
        self._make = environments
        self._open: dict[str, Environment] = {}
        self._trace_size = trace_size

    def environment(self, task: str) -> Environment:
        if task not in self._open:
            self._open[task] = self._make(task)
        return self._open[task]

    def run(self, units: Sequence[Unit], opened: OpenedArms, minutes: float | None = None) -> Iterator[Episode]:
        """Run `units`, yielding each episode as it ends.

        Args:
            opened: begins the episodes of each arm.
            minutes: after these no further unit begins; None: all run.
        """
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        traced: set[str] = set()
        for index, unit in enumerate(units):
            if deadline is not None and self.finished and time.monotonic() > deadline:
                return
            trace_size = None if unit.task in traced else self._trace_size
            traced.add(unit.task)
            of_unit: dict[str, Episode] = {}
            # The order turns from unit to unit: no arm always runs on the machine that another has warmed up.
            turn = index % len(self.arms)
            for arm in (*self.arms[turn:], *self.arms[:turn]):
                episode = run_episode(opened, arm, self.environment(unit.task), unit, trace_size)
                of_unit[arm.key] = episode
                yield episode
            self.finished.append({arm.key: of_unit[arm.key] for arm in self.arms})

    def close(self) -> None:
        """Close the environments."""
        for environment in self._open.values():
            environment.close()
        self._open.clear()


def outcomes(finished: Sequence[Mapping[str, Episode]], arm: str) -> list[bool]:
    """Return the success of an arm in every finished unit, in order."""
    return [unit[arm].success for unit in finished]
