"""A policy with its environments, able to run any unit: in this process, or as a worker of many."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vla_pruner.conditions import version
from vla_pruner.errors import VLAPrunerError
from vla_pruner.evaluation.arms import Arm, check_layers
from vla_pruner.evaluation.episode import describe, run_episode
from vla_pruner.evaluation.maps import with_score_maps
from vla_pruner.evaluation.policies import PolicySource, fingerprint, sees_images
from vla_pruner.evaluation.records import Record
from vla_pruner.evaluation.traces import Trace, Tracer
from vla_pruner.evaluation.units import Unit
from vla_pruner.simulators import find_suite
from vla_pruner.simulators.base import Convention, Environment, SimulatorUnavailable, Suite

_PACKAGES = ("vla-pruner", "torch", "transformers", "numpy", "lerobot")
_OPEN = 8
"""Environments kept open at once: each holds a simulator and a rendering context."""


@dataclass(frozen=True)
class Recipe:
    """All that a replica is made from; small, so that it can be sent to workers.

    Attributes:
        policy: where the policy comes from.
        suites: names.
        suite_options: for `find_suite`.
        arms: every arm of the run.
        max_steps, horizon: in place of the suites' own.
        traced: initial states whose episodes are traced.
        find: makes a suite of its name and options; a stand-in for tests.
    """

    policy: PolicySource
    suites: tuple[str, ...]
    suite_options: Mapping[str, Any]
    arms: tuple[Arm, ...]
    max_steps: int | None = None
    horizon: int | None = None
    traced: range = range(0)
    find: Callable[..., Suite] = find_suite


class Replica:
    """One policy and the environments that it acts in.

    Attributes:
        suites: by name.

    Raises:
        VLAPrunerError, SimulatorUnavailable: suites, policy and arms do not go together.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.suites = {name: recipe.find(name, **recipe.suite_options) for name in recipe.suites}
        self._policies: dict[str, Any] = {}
        self._conventions: dict[str, Convention] = {}
        for name, suite in self.suites.items():
            policy = self._policy(name)
            self._conventions[name] = suite.convention(policy)
            if recipe.horizon is not None:
                self._conventions[name] = replace(self._conventions[name], horizon=recipe.horizon)
        if sees_images(policy := self._policy(recipe.suites[0])):
            check_layers(recipe.arms, policy)
        self._open: OrderedDict[tuple[str, int], Environment] = OrderedDict()

    def _policy(self, suite: str) -> Any:
        held = suite if self.recipe.policy.scripted else ""
        if held not in self._policies:
            self._policies[held] = self.recipe.policy.load(self.suites[suite])
        return self._policies[held]

    def describe(self) -> dict[str, Any]:
        """What makes results comparable: the suites' tasks, a fingerprint of the weights, how the suites are seen, and
        versions.
        """
        policy = self._policy(self.recipe.suites[0])
        return {
            "tasks": {name: suite.tasks for name, suite in self.suites.items()},
            "weights": fingerprint(policy),
            "horizons": {name: convention.horizon for name, convention in self._conventions.items()},
            "versions": {name: self.versions(name) for name in self.suites},
        }

    def versions(self, suite: str) -> dict[str, str | None]:
        """Of our packages and of the suite's."""
        ours = {name: version(name) for name in _PACKAGES}
        return {**{name: found for name, found in ours.items() if found}, **self.suites[suite].versions()}

    def run_unit(self, unit: Unit, arms: Sequence[tuple[str, int]], run: str) -> Iterator[tuple[Record, Trace | None]]:
        """Runs a unit with some arms, one record each, with the trace of an episode that is traced and came to its end.

        Args:
            arms: (key, attempt) of each, in the order in which they run.
            run: identity of the run.

        Raises:
            VLAPrunerError, SimulatorUnavailable: it cannot run at all.
        """
        known = {arm.key: arm for arm in self.recipe.arms}
        for key, attempt in arms:
            versions = self.versions(unit.suite)
            try:
                environment = self._environment(unit)
            except (VLAPrunerError, SimulatorUnavailable):
                raise
            except Exception as crash:
                yield lost(unit, key, run, attempt, describe(crash)), None
                continue
            policy = self._policy(unit.suite)
            tracer = Tracer(tuple(policy.cameras)) if unit.initial_state in self.recipe.traced else None
            record = run_episode(
                policy,
                environment,
                self._conventions[unit.suite],
                known[key],
                unit,
                run=run,
                attempt=attempt,
                max_steps=self.recipe.max_steps,
                versions=versions,
                tracer=tracer,
            )
            if record.crashed:  # what crashed may be in any state
                self._close((unit.suite, unit.task_id))
            yield record, None if record.crashed else _trace(tracer, record, policy, known[key].kind == "baseline")

    def _environment(self, unit: Unit) -> Environment:
        key = unit.suite, unit.task_id
        if key not in self._open:
            while len(self._open) >= _OPEN:
                self._close(next(iter(self._open)))
            self._open[key] = self.suites[unit.suite].make(unit.task_id)
        self._open.move_to_end(key)
        return self._open[key]

    def _close(self, key: tuple[str, int]) -> None:
        environment = self._open.pop(key, None)
        if environment is not None:
            try:
                environment.close()
            except Exception:  # it crashed before, or its rendering did: it is gone either way
                return

    def close(self) -> None:
        """Closes the environments."""
        for key in list(self._open):
            self._close(key)


def _trace(tracer: Tracer | None, record: Record, policy: Any, whole_maps: bool) -> Trace | None:
    """The trace of a finished episode, if one is wanted and can be made: its record counts either way."""
    if tracer is None:
        return None
    try:
        trace = tracer.trace(record)
        return with_score_maps(policy, trace) if whole_maps else trace
    except Exception as error:
        warnings.warn(f"{record.arm} on {record.unit} was not traced: {error}", stacklevel=2)
        return None


def lost(unit: Unit, arm: str, run: str, attempt: int, error: dict[str, str]) -> Record:
    """The record of an episode that crashed before its first step."""
    return Record(
        run=run,
        arm=arm,
        unit=unit,
        success=None,
        termination="error",
        steps=0,
        control_steps=0,
        sum_reward=0.0,
        max_reward=0.0,
        error=error,
        attempt=attempt,
    )
