"""The numbers of a calibration: how far each arm moves the action, how fast it is, which are within tolerance."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vla_pruner.bootstrap import Estimate, mean_estimate, mean_upper_bound
from vla_pruner.calibration.errors import CalibrationError
from vla_pruner.calibration.replay import Course, Replay
from vla_pruner.json_file import read_format, typed
from vla_pruner.statistics import percentile

FORMAT = "vla-pruner calibrate 1"


@dataclass(frozen=True)
class ArmCalibration:
    """One row of the table.

    Attributes:
        method: as Python writes it, or "None".
        moved: L1 distance to the unpruned policy's action: mean absolute difference over the chunk, its dimensions and
            the control steps that count (pruned ones, of arms that prune), each dimension in standard deviations of the
            recorded actions; mean over episodes, and the bootstrap interval over them. None: it pruned nothing.
        moved_in_units: the same, each dimension in its own unit.
        by_dimension: its mean for each dimension, in its own unit.
        by_episode: `moved` of each episode; None if nothing was pruned.
        steps: control steps that were replayed.
        pruned_steps: those that were pruned.
        p50_ms: of `act`, over all control steps, pruned or not, on this machine as busy as it was.
        source: the origin of a method from outside of this package, as of `plugins.source_of`.
    """

    key: str
    title: str
    kind: str
    method: str
    moved: Estimate | None
    moved_in_units: Estimate | None
    by_dimension: list[float]
    by_episode: list[float | None]
    steps: int
    pruned_steps: int
    p50_ms: float
    source: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Calibration:
    """The whole table, with everything needed to read it.

    Attributes:
        arms: the unpruned policy first.
        episodes: names of the recorded ones.
        scale: (dim,) standard deviation of the recorded actions in each dimension's unit.
        left_out: dimensions in which the recorded actions never change; they are in no figure but `by_dimension`.
        weights: fingerprint of the policy.
        against_recorded: see `Replay`.
        conditions: machine, versions and settings.
    """

    arms: list[ArmCalibration]
    episodes: list[str]
    scale: list[float]
    left_out: list[int]
    weights: str
    against_recorded: float | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def baseline(self) -> ArmCalibration:
        return self.arms[0]

    def bounds(self) -> list[tuple[ArmCalibration, float]]:
        """Return the methods with an upper bound of `moved` that holds for all of them together, the fastest first;
        none of those with too few episodes (`bootstrap.mean_upper_bound`).
        """
        methods = [arm for arm in self.arms if arm.kind == "method" and arm.moved is not None]
        found = []
        for arm in sorted(methods, key=lambda arm: arm.p50_ms):
            bound = mean_upper_bound([value for value in arm.by_episode if value is not None], len(methods))
            if bound is not None:
                found.append((arm, bound))
        return found

    def within(self, tolerance: float) -> list[ArmCalibration]:
        """Return the methods whose bound is at most `tolerance`, the fastest first."""
        return [arm for arm, bound in self.bounds() if bound <= tolerance]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"format": FORMAT, **json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))}

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read the file that --json named.

        Raises:
            CalibrationError: there is no such file, or it is no calibration.
        """
        try:
            return read_format(path, FORMAT, cls._from_json)
        except OSError as error:
            raise CalibrationError(
                f"{path} cannot be read ({error.strerror}); give the file that vla-pruner calibrate wrote with --json."
            ) from error
        except ValueError as error:
            raise CalibrationError(
                f"{path} is no file of vla-pruner calibrate --json, or is damaged ({error})."
            ) from error

    @classmethod
    def _from_json(cls, content: Mapping[str, Any]) -> Calibration:
        names = [one.name for one in dataclasses.fields(cls)]
        found: Calibration = typed(cls, {name: content[name] for name in names if name in content}, "the calibration")
        if not found.arms or found.arms[0].kind != "baseline":
            raise ValueError("its arms do not begin with the unpruned policy")
        if any(arm.steps < 1 for arm in found.arms):
            raise ValueError("an arm replayed no control step")
        return found


def calibration_of(replay: Replay, weights: str, conditions: Mapping[str, Any]) -> Calibration:
    """Sum up a replay.

    Raises:
        PackageMissing: scipy is not installed.
    """
    # Relative to float32 rounding: an action that is never commanded twice the same way differs by more.
    moves = replay.spread > 1e-6 * replay.spread.max()
    return Calibration(
        arms=[_arm(course, replay.spread, moves) for course in replay.courses],
        episodes=replay.names,
        scale=replay.spread.tolist(),
        left_out=np.flatnonzero(~moves).tolist(),
        weights=weights,
        against_recorded=replay.against_recorded,
        conditions=conditions,
    )


def _arm(course: Course, spread: np.ndarray, moves: np.ndarray) -> ArmCalibration:
    counted = [change for change in course.changes if len(change)]
    scaled = [_mean(change[:, moves] / spread[moves]) for change in course.changes]
    in_units = [_mean(change[:, moves]) for change in course.changes]
    return ArmCalibration(
        key=course.arm.key,
        title=course.arm.title,
        kind=course.arm.kind,
        method=repr(course.arm.method),
        moved=_over_episodes(scaled),
        moved_in_units=_over_episodes(in_units),
        by_dimension=np.mean([change.mean(axis=0) for change in counted], axis=0).tolist() if counted else [],
        by_episode=scaled,
        steps=len(course.milliseconds),
        pruned_steps=course.pruned,
        p50_ms=round(percentile(course.milliseconds, 50), 3),
        source=course.arm.source,
    )


def _mean(change: np.ndarray) -> float | None:
    return float(change.mean()) if len(change) else None


def _over_episodes(values: Sequence[float | None]) -> Estimate | None:
    found = [value for value in values if value is not None]
    return mean_estimate(found) if found else None
