"""The content of an evaluation's folder for the report: its numbers, and the settings in each arm's title."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vla_pruner.evaluation import EvaluationError, Record, Summary, read_records, summarize
from vla_pruner.evaluation.manifest import Manifest
from vla_pruner.evaluation.options import PRUNING, ArmOptions
from vla_pruner.evaluation.records import EPISODES, check_run, latest
from vla_pruner.evaluation.run import Run
from vla_pruner.evaluation.summary import INCONCLUSIVE, NOT_WORSE, WORSE, ArmSummary
from vla_pruner.method_names import encoder_title
from vla_pruner.statistics import NEWCOMBE, median_interval, percentile

WORDS = (NOT_WORSE, WORSE, INCONCLUSIVE)


@dataclass(frozen=True)
class Setting:
    """An arm of a method, by its options.

    Attributes:
        method: its name.
        options: those that are not the method's own defaults.
        keep: visual tokens kept, as counted in pruned steps, or else as set; a share of all, or None if neither is
            known.
        fate: the fate of the others.
        layer: "K=3".
    """

    method: str
    options: tuple[str, ...]
    keep: float | None
    fate: str
    layer: str

    @property
    def variant(self) -> str:
        """The method with its options: the arms of one plot."""
        return " ".join((self.method, *self.options))

    @property
    def series(self) -> str:
        """The fate and layer: the arms of one line of a plot."""
        return ", ".join(part for part in (self.fate, self.layer) if part)


def setting_of(arm: ArmSummary, options: ArmOptions) -> Setting:
    """Return an arm's setting."""
    keep = None
    if arm.kept and arm.visual_tokens:
        keep = sum(arm.kept) / len(arm.kept) / arm.visual_tokens
    elif isinstance(options.keep, float) and 0 < options.keep <= 1:
        keep = options.keep
    own = (*options.own, *encoder_title(options.encoder).split())
    return Setting(options.method, own, keep, options.pruned, f"K={options.layer}")


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one control step: the median over episodes of their medians, with its exact interval over
    episodes (None: too few of them).
    """

    value: float
    limits: tuple[float, float] | None


@dataclass(frozen=True)
class Results:
    """An evaluation as its folder has it.

    Attributes:
        folder: its folder.
        run: settings and the records that count.
        summary: the numbers of the table.
    """

    folder: Path
    run: Run
    summary: Summary

    @cached_property
    def options(self) -> dict[str, ArmOptions]:
        """The options of the arms that prune by key."""
        arms = self.run.manifest.identity["arms"]
        return {arm["key"]: ArmOptions.of(arm) for arm in arms if arm["kind"] in PRUNING}

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """The settings of the methods' arms by key."""
        return {arm.key: setting_of(arm, self.options[arm.key]) for arm in self.methods}

    @property
    def methods(self) -> list[ArmSummary]:
        """The arms that are judged."""
        return self.summary.of("method")

    @cached_property
    def by_key(self) -> dict[str, ArmSummary]:
        return {arm.key: arm for arm in self.summary.arms}

    @cached_property
    def random_of(self) -> dict[str, ArmSummary]:
        """The random control of each method's arm that has one."""
        arms = self.run.manifest.identity["arms"]
        return {arm["key"]: self.by_key[arm["random"]] for arm in arms if arm.get("random") in self.by_key}

    @cached_property
    def groups(self) -> dict[str, list[ArmSummary]]:
        """The methods' arms by method: the method whose best arm loses least at worst comes first, and within it the
        arm that keeps most.
        """
        found: dict[str, list[ArmSummary]] = {}
        for arm in sorted(self.methods, key=self._order):
            found.setdefault(self.settings[arm.key].method, []).append(arm)
        return dict(sorted(found.items(), key=lambda item: -max(_worst(arm) for arm in item[1])))

    def _order(self, arm: ArmSummary) -> tuple[Any, ...]:
        setting = self.settings[arm.key]
        return len(setting.options), setting.options, setting.layer, -(setting.keep or 0.0), setting.fate

    @cached_property
    def latency(self) -> dict[str, Latency]:
        """The latency by arm's key; arms without a finished episode are left out."""
        medians: dict[str, list[float]] = {}
        for record in self.finished:
            if record.latency_p50_ms is not None:
                medians.setdefault(record.arm, []).append(record.latency_p50_ms)
        return {key: Latency(percentile(of, 50), median_interval(of)) for key, of in medians.items()}

    @cached_property
    def finished(self) -> list[Record]:
        """The records that did not crash."""
        return [record for record in self.run.records.values() if not record.crashed]

    @property
    def conditions(self) -> Sequence[Mapping[str, Any]]:
        """The conditions of every process that wrote to the run."""
        return self.run.manifest.conditions

    @property
    def policy(self) -> str:
        """The policy's name, or the names that several machines had for it."""
        return ", ".join(dict.fromkeys(str(one.get("policy", "unknown")) for one in self.conditions)) or "unknown"

    @property
    def suites(self) -> list[str]:
        return list(dict.fromkeys(task.suite for task in self.run.manifest.plan.tasks))

    @property
    def was_busy(self) -> bool:
        """True if other programs kept a core busy when a process began: then milliseconds must not be quoted."""
        return any((one.get("busy_cores_before") or 0.0) >= 0.5 for one in self.conditions)


def _worst(arm: ArmSummary) -> float:
    return arm.difference.low if arm.difference is not None and arm.difference.pairs else -2.0


def read_results(folder: Path, interval: str = NEWCOMBE) -> Results:
    """Read a finished, unfinished or merged evaluation; nothing is written. `interval`: as of `summarize`.

    Raises:
        EvaluationError: the folder is missing, is no evaluation, has no episode yet, or holds a damaged record.
        PackageMissing: scipy or statsmodels is not installed.
    """
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise EvaluationError(f"{folder} {what}; give the --out of vla-pruner eval.")
    manifest = Manifest.read(folder)
    path = folder / EPISODES
    records = read_records(path)
    check_run(records, manifest.run, str(path))
    run = Run(manifest, latest(records, str(path)))
    if all(record.crashed for record in run.records.values()):
        raise EvaluationError(
            f"{path} holds no finished episode yet, so there is nothing to report; give the eval command again."
        )
    return Results(folder, run, summarize(run, interval))
