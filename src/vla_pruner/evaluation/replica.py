"""A policy with its environments, able to run any unit: in this process, or as a worker of many."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vla_pruner.conditions import version
from vla_pruner.evaluation.arms import Arm, check_layers
from vla_pruner.evaluation.episode import CRASHES, describe, is_crash, run_episode
from vla_pruner.evaluation.lockstep import check_batch, run_together, shares
from vla_pruner.evaluation.maps import with_score_maps
from vla_pruner.evaluation.policies import PolicySource, check_fits, fingerprint, refused_instructions, sees_images
from vla_pruner.evaluation.records import Record
from vla_pruner.evaluation.traces import Trace, Tracer
from vla_pruner.evaluation.units import Unit
from vla_pruner.simulators import find_suite
from vla_pruner.simulators.base import Convention, Environment, Suite
from vla_pruner.wording import said_by

_PACKAGES = ("vla-pruner", "torch", "transformers", "numpy", "lerobot")
Work = list[tuple[Unit, list[tuple[str, int]]]]
"""Units, and for each the arms that are left with the number of the attempt, in the order in which they run."""

_OPEN = 8
"""Environments kept open at once: each holds a simulator and a rendering context."""


@dataclass(frozen=True)
class Recipe:
    """The parts that a replica is made from; small, so that it can be sent to workers.

    Attributes:
        policy: its source.
        suites: names.
        suite_options: for `find_suite`.
        arms: every arm of the run.
        max_steps, horizon: in place of the suites' own.
        traced: initial states whose episodes are traced.
        batch: episodes of an arm that share forward passes.
        find: makes a suite of its name and options; a stand-in for tests.
    """

    policy: PolicySource
    suites: tuple[str, ...]
    suite_options: Mapping[str, Any]
    arms: tuple[Arm, ...]
    max_steps: int | None = None
    horizon: int | None = None
    traced: range = range(0)
    batch: int = 1
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
            check_fits(policy, suite, self._conventions[name])
        if sees_images(policy := self._policy(recipe.suites[0])):
            check_layers(recipe.arms, policy)
        check_batch(policy, recipe.batch)
        self._open: OrderedDict[tuple[str, int, int], Environment] = OrderedDict()

    def _policy(self, suite: str) -> Any:
        held = suite if self.recipe.policy.scripted else ""
        if held not in self._policies:
            self._policies[held] = self.recipe.policy.load(self.suites[suite])
        return self._policies[held]

    def describe(self) -> dict[str, Any]:
        """Return the facts that make results comparable: the suites' tasks, a fingerprint of the weights, the
        conventions of the suites, and versions; and the tasks whose instruction the policy refuses.
        """
        policy = self._policy(self.recipe.suites[0])
        return {
            "tasks": {name: suite.tasks for name, suite in self.suites.items()},
            "weights": fingerprint(policy),
            "horizons": {name: convention.horizon for name, convention in self._conventions.items()},
            "versions": {name: self.versions(name) for name in self.suites},
            "refused": refused_instructions(policy, (task for suite in self.suites.values() for task in suite.tasks)),
        }

    def versions(self, suite: str) -> dict[str, str | None]:
        """Return the versions of our packages and of the suite's."""
        ours = {name: version(name) for name in _PACKAGES}
        return {**{name: found for name, found in ours.items() if found}, **self.suites[suite].versions()}

    def run_units(self, work: Work, run: str) -> Iterator[tuple[Record, Trace | None]]:
        """Run units with some arms, one record each, with the trace of an episode that is traced and came to its end.

        Args:
            work: units, and for each (key, attempt) of its arms in the order in which they run. Episodes of one arm
                share forward passes if several units are given and the arm allows it.
            run: identity of the run.

        Raises:
            VLAPrunerError, SimulatorUnavailable: it cannot run at all.
        """
        known = {arm.key: arm for arm in self.recipe.arms}
        for key in dict.fromkeys(key for _, arms in work for key, _ in arms):
            missing = [(unit, attempt) for unit, arms in work for arm, attempt in arms if arm == key]
            for group in self._groups(known[key], missing):
                yield from self._run_group(known[key], group, run)

    def _groups(self, arm: Arm, missing: Sequence[tuple[Unit, int]]) -> Iterator[list[tuple[Unit, int]]]:
        """Yield groups that run side by side: of one suite, and none that is traced, or has crashed, since a crash of
        the policy ends all that share its pass.
        """
        alike: dict[Any, list[tuple[Unit, int]]] = {}
        for number, (unit, attempt) in enumerate(missing):
            alone = not shares(arm) or unit.initial_state in self.recipe.traced or attempt > 1
            alike.setdefault((unit.suite, number if alone else None), []).append((unit, attempt))
        yield from alike.values()

    def _run_group(
        self, arm: Arm, group: Sequence[tuple[Unit, int]], run: str
    ) -> Iterator[tuple[Record, Trace | None]]:
        suite = group[0][0].suite
        versions = self.versions(suite)
        ready: list[tuple[Unit, int, Environment]] = []
        for unit, attempt in group:
            try:
                ready.append((unit, attempt, self._environment(unit, [place for *_, place in ready])))
            except CRASHES as crash:
                if not is_crash(crash):
                    raise
                yield lost(unit, arm.key, run, attempt, describe(crash)), None
        if not ready:
            return
        policy, convention = self._policy(suite), self._conventions[suite]
        common: Any = {"run": run, "max_steps": self.recipe.max_steps, "versions": versions}
        units, attempts, environments = zip(*ready, strict=True)
        tracer = None
        if len(ready) == 1:
            tracer = Tracer(tuple(policy.cameras)) if units[0].initial_state in self.recipe.traced else None
            # If an arm's other episodes shared passes, the milliseconds of a few would pass for its own.
            common |= {"attempt": attempts[0], "tracer": tracer, "record_latency": self.recipe.batch == 1}
            records = iter([(0, run_episode(policy, environments[0], convention, arm, units[0], **common))])
        else:
            records = run_together(policy, environments, convention, arm, units, attempts=attempts, **common)
        for place, record in records:
            if record.crashed:  # after a crash it may be in any state
                self._close(environments[place])
            yield record, None if record.crashed else _trace(tracer, record, policy, arm.kind == "baseline")

    def _environment(self, unit: Unit, taken: Sequence[Environment]) -> Environment:
        """Return an environment of the unit's task that is not taken."""
        slot = sum(environment.task.index == unit.task_id for environment in taken)
        key = unit.suite, unit.task_id, slot
        if key not in self._open:
            while len(self._open) >= max(_OPEN, self.recipe.batch):
                self._close(next(one for one in self._open.values() if all(one is not other for other in taken)))
            self._open[key] = self.suites[unit.suite].make(unit.task_id)
        self._open.move_to_end(key)
        return self._open[key]

    def _close(self, environment: Environment) -> None:
        for key in [key for key, one in self._open.items() if one is environment]:
            del self._open[key]
        try:
            environment.close()
        except CRASHES:  # it crashed before, or its rendering did: it is gone either way
            return

    def close(self) -> None:
        """Close the environments."""
        for environment in list(self._open.values()):
            self._close(environment)


def _trace(tracer: Tracer | None, record: Record, policy: Any, whole_maps: bool) -> Trace | None:
    """Return the trace of a finished episode, if one is wanted and can be made: its record counts either way."""
    if tracer is None:
        return None
    try:
        trace = tracer.trace(record)
        return with_score_maps(policy, trace) if whole_maps else trace
    except Exception as error:
        warnings.warn(f"{record.arm} on {record.unit} was not traced: {said_by(error)}", stacklevel=2)
        return None


def lost(unit: Unit, arm: str, run: str, attempt: int, error: dict[str, str]) -> Record:
    """Return the record of an episode that crashed before its first step."""
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
