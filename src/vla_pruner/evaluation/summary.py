"""From records to the numbers of the table: one `ArmSummary` an arm, each against the unpruned policy on its pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from vla_pruner.evaluation.records import Record
from vla_pruner.evaluation.run import Run
from vla_pruner.evaluation.units import Unit
from vla_pruner.statistics import (
    NEWCOMBE,
    MeanDifference,
    PairedDifference,
    Pairs,
    Rate,
    holm,
    paired_difference,
    paired_mean_difference,
    percentile,
    solved_within,
    steps_until,
    wilson,
)

LEVEL = 0.025
"""One-sided: a verdict agrees with the 95 % interval if there is one arm."""

NOT_WORSE, WORSE, INCONCLUSIVE = "not worse", "worse", "inconclusive"


@dataclass(frozen=True)
class Verdict:
    """The answer whether an arm is worse than the unpruned policy by the margin that was declared.

    Attributes:
        word: "not worse": a loss of the margin or more is ruled out; "worse": such a loss is shown; "inconclusive":
            neither, or there is nothing to lose.
        p_not_worse, p_worse: one-sided p-values of the two, adjusted by Holm over the arms of methods.
        more: if it is inconclusive, episodes a task that would decide it with a chance of .8 if the results so far are
            the truth; None: the difference is so close to the margin that no sensible number would.
        at_stake: whether the unpruned policy solved any of the pairs.
    """

    word: str
    p_not_worse: float
    p_worse: float
    more: int | None
    at_stake: bool = True


@dataclass(frozen=True)
class ArmSummary:
    """One row of the table.

    Attributes:
        success: of all episodes that did not crash.
        difference: to the unpruned policy, on the episodes that both finished, stratified by task.
        tango: Tango's interval of the same difference, without strata, as other tools report it.
        p_adjusted: McNemar's p-value, adjusted by Holm over the arms of methods; None for controls.
        verdict: of methods.
        against_random: a method's difference to a random choice of as many tokens in the same steps.
        against_drop: of a method that freezes tokens, the difference to the arm that drops them and is otherwise the
            same.
        time: (steps, share of episodes solved within them).
        slower: actions to success against the unpruned policy's, a failure counting as the longest episode of its task.
        latency_p50_ms, latency_p99_ms: over all control steps, pruned or not.
        kept: fewest and most tokens in a pruned step; empty if nothing was pruned.
        pruned_share: of the control steps.
        crashed: episodes that crashed, and count nowhere.
        by_task: successes and episodes of each "suite/task".
        difference_by_task: as `difference`, of each task alone.
    """

    key: str
    title: str
    kind: str
    success: Rate
    difference: PairedDifference | None
    tango: tuple[float, float] | None
    p_adjusted: float | None
    verdict: Verdict | None
    against_random: PairedDifference | None
    against_drop: PairedDifference | None
    time: list[tuple[float, float]]
    slower: MeanDifference | None
    latency_p50_ms: float
    latency_p99_ms: float
    visual_tokens: int | None
    kept: list[int]
    pruned_share: float
    crashed: int
    by_task: dict[str, tuple[int, int]]
    difference_by_task: dict[str, PairedDifference]

    @property
    def median_steps(self) -> float | None:
        """Actions within which half of the episodes were solved; None if fewer ever were."""
        return steps_until(self.time, 0.5)


@dataclass(frozen=True)
class Summary:
    """The whole table, with everything needed to read it.

    Attributes:
        arms: the unpruned policy first.
        planned: episodes an arm that the run set out for.
        tasks: their number.
        margin: declared before the run, as a fraction.
        for_claims: whether it is long enough to be evidence.
        extended: numbers of episodes a task that were asked for before.
        interval: of the differences, one of `statistics.INTERVALS`; verdicts use Newcombe's whichever it is.
        left: episodes that could still be added to every task, each from an initial state of its own; None: any number.
    """

    arms: list[ArmSummary]
    planned: int
    tasks: int
    margin: float
    for_claims: bool
    extended: tuple[int, ...]
    interval: str = NEWCOMBE
    left: int | None = None

    @property
    def baseline(self) -> ArmSummary:
        return self.arms[0]

    def of(self, kind: str) -> list[ArmSummary]:
        """Return the arms of a kind."""
        return [arm for arm in self.arms if arm.kind == kind]

    @property
    def crashed(self) -> int:
        return sum(arm.crashed for arm in self.arms)

    @property
    def complete(self) -> bool:
        """True if every planned episode of every arm is there, and none crashed."""
        return all(arm.success.total == self.planned for arm in self.arms)

    def to_json(self) -> dict[str, Any]:
        """For `json.dump`; a number that is not known is None."""
        return _plain(dataclasses.asdict(self))


@dataclass(frozen=True)
class _Outcomes:
    """One arm's finished episodes."""

    done: Mapping[Unit, Record]
    crashed: int
    longest: Mapping[tuple[str, int], int]

    def pairs_with(self, other: _Outcomes) -> list[Unit]:
        return sorted(unit for unit in self.done if unit in other.done)

    def success(self, units: Sequence[Unit]) -> list[bool]:
        return [bool(self.done[unit].success) for unit in units]

    def steps(self, units: Sequence[Unit]) -> list[float]:
        """Return the actions to success; a failure counts as the longest episode of its task."""
        return [
            float(record.steps if record.success else self.longest[record.unit.suite, record.unit.task_id])
            for record in (self.done[unit] for unit in units)
        ]


def summarize(run: Run, interval: str = NEWCOMBE) -> Summary:
    """Sum up a run's results so far.

    Args:
        interval: of the differences, one of `statistics.INTERVALS`.

    Raises:
        PackageMissing: scipy or statsmodels is not installed.
    """
    plan, limit = run.manifest.plan, run.manifest.identity["max_steps"]
    longest = {
        (task.suite, task.index): task.max_steps if limit is None else min(limit, task.max_steps) for task in plan.tasks
    }
    units = set(plan.units())
    arms = run.manifest.identity["arms"]
    records: dict[str, list[Record]] = {arm["key"]: [] for arm in arms}
    for (unit, key), record in run.records.items():
        if unit in units and key in records:
            records[key].append(record)
    outcomes = {}
    for arm in arms:
        mine = records[arm["key"]]
        done = {record.unit: record for record in mine if not record.crashed}
        outcomes[arm["key"]] = _Outcomes(done, len(mine) - len(done), longest)
    margin = run.manifest.identity["margin"]
    family = [arm["key"] for arm in arms if arm["kind"] == "method"]
    base = outcomes[arms[0]["key"]]
    pairs = {key: _pairs(base, outcomes[key]) for key in outcomes}
    verdicts = _verdicts({key: pairs[key] for key in family}, margin, len(plan.tasks))
    differences = {key: _difference(base, outcomes[key], interval) for key in outcomes}
    p_adjusted = dict(zip(family, holm([differences[key].p_value for key in family]), strict=True))
    rows = []
    for arm in arms:
        key, mine = arm["key"], outcomes[arm["key"]]
        random, dropped = _random_of(arm, arms), _dropped(arm, arms)
        rows.append(
            _row(
                arm,
                mine,
                difference=None if key == arms[0]["key"] else differences[key],
                tango=None if key == arms[0]["key"] else pairs[key].tango(),
                p_adjusted=p_adjusted.get(key),
                verdict=verdicts.get(key),
                against_random=None if random is None else _difference(outcomes[random], mine, interval),
                against_drop=None if dropped is None else _difference(outcomes[dropped], mine, interval),
                slower=None if key == arms[0]["key"] else _slower(base, mine),
                by_task={} if key == arms[0]["key"] else _by_task(base, mine, interval),
            )
        )
    stored = [task.initial_states for task in plan.tasks if task.initial_states is not None]
    left = min(stored) - plan.first - plan.episodes if stored else None
    return Summary(
        rows, len(units), len(plan.tasks), margin, run.manifest.for_claims, run.manifest.extended, interval, left
    )


def _row(
    arm: Mapping[str, str],
    mine: _Outcomes,
    difference: PairedDifference | None,
    tango: tuple[float, float] | None,
    p_adjusted: float | None,
    verdict: Verdict | None,
    against_random: PairedDifference | None,
    against_drop: PairedDifference | None,
    slower: MeanDifference | None,
    by_task: dict[str, PairedDifference],
) -> ArmSummary:
    done = list(mine.done.values())
    latency = [milliseconds for record in done for milliseconds in record.latency_ms]
    kept = [count for record in done for count in record.kept_tokens]
    tally: dict[str, tuple[int, int]] = {}
    for record in done:
        name = task_name(record.unit)
        solved, total = tally.get(name, (0, 0))
        tally[name] = (solved + bool(record.success), total + 1)
    return ArmSummary(
        key=arm["key"],
        title=arm["title"],
        kind=arm["kind"],
        success=wilson(sum(bool(record.success) for record in done), len(done)),
        difference=difference,
        tango=tango,
        p_adjusted=p_adjusted,
        verdict=verdict,
        against_random=against_random,
        against_drop=against_drop,
        time=solved_within([record.steps for record in done], [bool(record.success) for record in done]),
        slower=slower,
        latency_p50_ms=percentile(latency, 50),
        latency_p99_ms=percentile(latency, 99),
        visual_tokens=next((record.visual_tokens for record in done if record.visual_tokens), None),
        kept=[min(kept), max(kept)] if kept else [],
        pruned_share=sum(record.pruned_steps for record in done) / max(1, sum(r.control_steps for r in done)),
        crashed=mine.crashed,
        by_task=dict(sorted(tally.items())),
        difference_by_task=by_task,
    )


def task_name(unit: Unit) -> str:
    """ "libero_goal/open the drawer": unique among suites."""
    return f"{unit.suite}/{unit.task}"


def _pairs(base: _Outcomes, mine: _Outcomes) -> Pairs:
    units = mine.pairs_with(base)
    return Pairs.of(base.success(units), mine.success(units), [task_name(unit) for unit in units])


def _difference(base: _Outcomes, mine: _Outcomes, interval: str) -> PairedDifference:
    units = mine.pairs_with(base)
    tasks = [task_name(unit) for unit in units]
    return paired_difference(base.success(units), mine.success(units), strata=tasks, interval=interval)


def _slower(base: _Outcomes, mine: _Outcomes) -> MeanDifference | None:
    units = mine.pairs_with(base)
    return paired_mean_difference(base.steps(units), mine.steps(units), [task_name(unit) for unit in units])


def _by_task(base: _Outcomes, mine: _Outcomes, interval: str) -> dict[str, PairedDifference]:
    groups: dict[str, list[Unit]] = {}
    for unit in mine.pairs_with(base):
        groups.setdefault(task_name(unit), []).append(unit)
    return {
        name: paired_difference(base.success(of), mine.success(of), interval=interval) for name, of in groups.items()
    }


def _random_of(arm: Mapping[str, str], arms: Sequence[Mapping[str, str]]) -> str | None:
    """Return the random control of a method's arm."""
    if arm["kind"] != "method":
        return None
    control = arm.get("random")
    return control if any(other["key"] == control for other in arms) else None


def _dropped(arm: Mapping[str, str], arms: Sequence[Mapping[str, str]]) -> str | None:
    """Return the arm that drops the tokens that this one freezes, and is otherwise the same."""
    if arm["kind"] != "method" or "pruned='freeze'" not in arm["method"]:
        return None
    twin = arm["method"].replace("pruned='freeze'", "pruned='drop'"), arm.get("encoder"), arm.get("source")
    methods = [other for other in arms if other["kind"] == "method"]
    return next((one["key"] for one in methods if (one["method"], one.get("encoder"), one.get("source")) == twin), None)


def _verdicts(family: Mapping[str, Pairs], margin: float, tasks: int) -> dict[str, Verdict]:
    """Return the verdict of every arm of a method; Holm for each of the two questions over all of them."""
    p_not_worse = [pairs.p_not_worse(margin) for pairs in family.values()]
    not_worse, worse = holm(p_not_worse), holm([1 - p for p in p_not_worse])
    level = LEVEL / max(1, len(family))  # the strictest level that Holm may need
    found = {}
    for (key, pairs), p, q in zip(family.items(), not_worse, worse, strict=True):
        word = NOT_WORSE if p <= LEVEL else WORSE if q <= LEVEL else INCONCLUSIVE
        both, _, lost, _ = pairs.total
        at_stake = both + lost > 0
        if not at_stake:
            word = INCONCLUSIVE  # where nothing was solved, no loss shows nothing
        more = None
        needed = pairs.pairs_needed(margin, level)
        if word == INCONCLUSIVE and at_stake and needed is not None:
            more = max(1, ceil((needed - sum(pairs.total)) / tasks))
        found[key] = Verdict(word, p, q, more, at_stake)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value
