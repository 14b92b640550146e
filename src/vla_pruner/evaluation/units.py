"""The units that every arm runs: one task from one initial state, with one seed for the policy's own noise."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_pruner.evaluation.errors import EvaluationError
from vla_pruner.simulators.base import Task

MOST_UNITS = 1_000_000
"""The most episodes of one arm in a run. More is a typing error or a damaged file, and would take all memory first."""


@dataclass(frozen=True, order=True)
class Unit:
    """One episode that every arm runs.

    Attributes:
        suite: name of the suite.
        task_id: the task's place in the suite.
        task: its name.
        initial_state: its number; a function of the episode's index alone.
        policy_seed: of a policy's draws.
    """

    suite: str
    task_id: int
    task: str
    initial_state: int
    policy_seed: int

    def __str__(self) -> str:
        return f"{self.suite} task {self.task_id} ({self.task}) from initial state {self.initial_state}"

    def check(self) -> None:
        """Refuse numbers that no episode has.

        Raises:
            ValueError: it names one of them.
        """
        for name in ("task_id", "initial_state", "policy_seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"its {name} is {getattr(self, name)}, not 0 or more")

    def noise_seed(self, control_step: int, stream: int = 0) -> int:
        """Return the seed of torch's generator in a control step: below 2**63, another one for every unit, step and
        stream, and the same in every arm of one stream.
        """
        words = (zlib.crc32(self.suite.encode()), self.task_id, self.initial_state, self.policy_seed)
        drawn = np.random.SeedSequence((*words, control_step, stream)).generate_state(1, np.uint64)[0]
        return int(drawn) >> 1


def plan(tasks: Sequence[Task], episodes: int, first: int, policy_seed: int) -> list[Unit]:
    """Return all units, tasks taking turns, so that a run that ends early has seen every task about equally often.

    Args:
        tasks: of all suites.
        episodes: of each task and arm.
        first: initial states are `first`, `first + 1`, ...
        policy_seed: of all units.

    Raises:
        EvaluationError: a task has not that many initial states, or these are more than `MOST_UNITS` episodes.
    """
    if episodes * len(tasks) > MOST_UNITS:
        raise EvaluationError(
            f"{episodes:,} episodes of {len(tasks)} tasks are asked for, and an evaluation has at most {MOST_UNITS:,}; "
            "ask for fewer with --episodes."
        )
    for task in tasks:
        if task.initial_states is not None and first + episodes > task.initial_states:
            raise EvaluationError(
                f"{task.suite} has {task.initial_states} initial states a task, and initial states {first} to "
                f"{first + episodes - 1} were asked for; repeated ones would count the same episode twice. Ask for at "
                f"most {task.initial_states} with --episodes and --first."
            )
    return [
        Unit(task.suite, task.index, task.name, first + episode, policy_seed)
        for episode in range(episodes)
        for task in tasks
    ]


def shard(units: Sequence[Unit], number: int, count: int) -> list[Unit]:
    """Return the units of shard `number` (from 1) of `count`: every `count`-th of each task."""
    seen: dict[tuple[str, int], int] = {}
    chosen = []
    for unit in units:
        place = seen.setdefault((unit.suite, unit.task_id), 0)
        seen[unit.suite, unit.task_id] += 1
        if (place + unit.task_id) % count == number - 1:
            chosen.append(unit)
    return chosen
