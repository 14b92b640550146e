"""From episodes to the numbers of the table: one `ArmSummary` an arm, from the units that all arms finished."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vla_pruner.demo.arms import BASELINE, RECOMMENDED_ARM, Arm
from vla_pruner.demo.compiled import Compiling
from vla_pruner.demo.episodes import Episode, outcomes
from vla_pruner.demo.probe import ArmCost
from vla_pruner.statistics import PairedDifference, Rate, paired_difference, percentile, wilson
from vla_pruner.timing import STAGES, StepTime


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a set of control steps."""

    steps: int
    p50: float
    p99: float
    stages: dict[str, float]
    """The median of each stage. Medians of parts need not add up to the median of the whole."""

    @classmethod
    def of(cls, times: Sequence[StepTime]) -> Latency:
        totals = [time.total for time in times]
        stages = {stage: percentile([getattr(time, stage) for time in times], 50) for stage in STAGES}
        return cls(len(times), percentile(totals, 50), percentile(totals, 99), stages)


@dataclass(frozen=True)
class ArmSummary:
    """One column of the table."""

    arm: Arm
    success: Rate
    difference: PairedDifference | None
    """The difference to the baseline; None for the baseline itself."""
    all_steps: Latency
    pruned_steps: Latency
    """The latency of the pruned steps only; of all steps for the baseline."""
    mean_steps: float
    """The mean number of control steps of an episode."""
    cost: ArmCost
    by_task: dict[str, tuple[int, int]]
    """Task -> (successes, episodes)."""

    @property
    def is_baseline(self) -> bool:
        return self.arm.key == BASELINE

    @property
    def pruned_share(self) -> float:
        """The share of the control steps that were pruned, in [0, 1]."""
        if self.is_baseline or not self.all_steps.steps:
            return 0.0
        return self.pruned_steps.steps / self.all_steps.steps

    def to_json(self) -> dict[str, object]:
        return {
            "arm": self.arm.key,
            "title": self.arm.title,
            "method": repr(self.arm.method) if self.arm.method is not None else None,
            "success": dataclasses.asdict(self.success),
            "difference_to_unpruned": dataclasses.asdict(self.difference) if self.difference else None,
            "milliseconds_all_steps": dataclasses.asdict(self.all_steps),
            "milliseconds_pruned_steps": dataclasses.asdict(self.pruned_steps),
            "control_steps_an_episode": self.mean_steps,
            "cost": self.cost.to_json(),
            "by_task": {task: {"successes": s, "episodes": n} for task, (s, n) in self.by_task.items()},
        }


@dataclass(frozen=True)
class Summary:
    """The whole table, with everything needed to read it."""

    arms: list[ArmSummary]
    """The baseline first."""
    units: int
    layers: int
    """The number of decoder layers."""
    layer: int
    """The lowest pruning layer."""
    vision_flops: float
    chosen: str | None
    """The arm that differs from the random one in its choice alone; None without such a pair."""
    chosen_against_random: PairedDifference | None
    """The difference of that arm to the random one; None without such a pair."""
    compiling: Compiling | None = None
    """What was compiled; None: nothing, every arm ran as it is."""
    busy: bool = False
    """Whether other programs kept the machine busy, so that its milliseconds are no finding."""

    @property
    def baseline(self) -> ArmSummary:
        return self.arms[0]

    @property
    def recommended(self) -> ArmSummary | None:
        """The arm of the recommended setting; without one, the first that may prune."""
        return self.get(RECOMMENDED_ARM) or next((arm for arm in self.arms if not arm.is_baseline), None)

    def get(self, key: str) -> ArmSummary | None:
        return next((arm for arm in self.arms if arm.arm.key == key), None)

    @property
    def touchable_share(self) -> float:
        """The share of an unpruned step's time that pruning can touch: the prefill from the pruning layer on. nan if
        it cannot be timed, since the actions are decoded in the same graph.
        """
        if self.compiling is not None and self.compiling.one_graph:
            return math.nan
        latency = self.baseline.all_steps
        return latency.stages["prefill"] * (self.layers - self.layer) / self.layers / latency.p50

    @property
    def ceiling(self) -> float:
        """Amdahl's limit: the speed-up of a step if that share took no time at all and choosing were free."""
        return 1.0 / (1.0 - self.touchable_share)


def summarize(
    finished: Sequence[Mapping[str, Episode]],
    arms: Sequence[Arm],
    costs: Mapping[str, ArmCost],
    vision_flops: float,
    layers: int,
    compiling: Compiling | None = None,
    busy: bool = False,
) -> Summary:
    """Sum up the finished units; `compiling` is what was compiled for them, `busy` whether other programs ran beside.

    Raises:
        ValueError: nothing is finished.
    """
    if not finished:
        raise ValueError("No unit was finished by all arms: there is nothing to sum up.")
    base = outcomes(finished, BASELINE)
    columns = [_column([unit[arm.key] for unit in finished], arm, costs[arm.key], base) for arm in arms]
    layer = min((arm.method.layer for arm in arms if arm.method is not None), default=0)
    choice, chosen = None, _same_budget_as_random(arms)
    if chosen is not None:
        choice = paired_difference(outcomes(finished, "random"), outcomes(finished, chosen))
    return Summary(columns, len(finished), layers, layer, vision_flops, chosen, choice, compiling, busy)


def _same_budget_as_random(arms: Sequence[Arm]) -> str | None:
    budgets: dict[str, Any] = {
        arm.key: (arm.method.keep, arm.method.layer, arm.method.pruned)  # type: ignore[attr-defined]
        for arm in arms
        if hasattr(arm.method, "keep")
    }
    wanted = budgets.pop("random", None)
    return next((key for key, budget in budgets.items() if budget == wanted), None)


def _column(episodes: list[Episode], arm: Arm, cost: ArmCost, base: list[bool]) -> ArmSummary:
    success = [episode.success for episode in episodes]
    times = [time for episode in episodes for time in episode.times]
    kept = [count for episode in episodes for count in episode.kept]
    is_baseline = arm.key == BASELINE
    pruned = [time for time, count in zip(times, kept, strict=True) if is_baseline or count is not None]
    by_task: dict[str, tuple[int, int]] = {}
    for episode in episodes:
        successes, total = by_task.get(episode.unit.task, (0, 0))
        by_task[episode.unit.task] = (successes + episode.success, total + 1)
    return ArmSummary(
        arm=arm,
        success=wilson(sum(success), len(success)),
        difference=None if is_baseline else paired_difference(base, success),
        all_steps=Latency.of(times),
        pruned_steps=Latency.of(pruned),
        mean_steps=len(times) / len(episodes),
        cost=cost,
        by_task=by_task,
    )
