"""Replaying recordings, open loop, through the unpruned policy and through every arm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch

from vla_pruner.accelerators import generators_put_back
from vla_pruner.calibration.errors import CalibrationError
from vla_pruner.calibration.recordings import TRACES, Recording, Recordings
from vla_pruner.errors import ObservationError
from vla_pruner.evaluation.arms import BASELINE, Arm, check_layers
from vla_pruner.evaluation.episode import generator_devices
from vla_pruner.method_names import was_pruned

Progress = Callable[[str, str], None]
"""A function that is called with the name of an episode and of an arm that has replayed it."""


@dataclass(frozen=True)
class Played:
    """The result of one arm on one recording of T control steps.

    Attributes:
        chunks: (T, chunk, dim) float64.
        milliseconds: of each `act`.
        pruned: (T,) bool, whether visual tokens were pruned or patches of the vision encoder reused.
    """

    chunks: np.ndarray
    milliseconds: list[float]
    pruned: np.ndarray


@dataclass
class Course:
    """The result of one arm on all recordings.

    Attributes:
        changes: of each episode (t, dim), how far each dimension of the action moved against the unpruned policy's, in
            its own unit, mean over the chunk, in the t control steps that count: of a method and of a random choice
            those that were pruned, of other arms all.
        milliseconds: of each `act`.
        pruned: control steps that were pruned.
    """

    arm: Arm
    changes: list[np.ndarray] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    pruned: int = 0


@dataclass(frozen=True)
class Replay:
    """All arms on all recordings, the unpruned policy first.

    Attributes:
        names: of the episodes.
        spread: (dim,) standard deviation of the recorded actions.
        against_recorded: of a trace, how far the unpruned policy's actions are from the recorded ones at most, in their
            own unit; None of a dataset.
    """

    names: list[str]
    courses: list[Course]
    spread: np.ndarray
    against_recorded: float | None


def replay(policy: Any, arms: Sequence[Arm], recordings: Recordings, progress: Progress | None = None) -> Replay:
    """Replay every recording through the unpruned policy and then through every arm, arms taking turns to begin.

    The actions of an arm have no effect on what it sees: its error does not grow as it may in a closed loop. The memory
    of methods begins anew with each episode. torch's global generator is as before afterwards.

    Args:
        arms: with or without the baseline.

    Raises:
        CalibrationError: the recordings do not fit the policy, or allow no conclusion.
        VLAPrunerError: an arm does not fit the policy.
    """
    others = [arm for arm in arms if arm.kind != "baseline"]
    check_layers(others, policy)
    gated = [arm.title for arm in others if arm.method is not None and arm.method.motion]
    if gated and recordings.kind != TRACES:
        raise CalibrationError(
            f"{gated[0]} reads how far the arm moves, which a dataset's actions do not say for every robot; leave it "
            "out, or calibrate on the traces of an evaluation."
        )
    baseline = Course(Arm(BASELINE, "unpruned", "baseline"))
    courses = [Course(arm) for arm in others]
    names, actions, distances = [], [], []
    with generators_put_back(generator_devices(policy)):
        for place, load in enumerate(recordings.loaders):
            recording = load()
            if not place:
                _play(policy, baseline.arm, recording, steps=1)  # the first call of all is slow
            unpruned = _play(policy, baseline.arm, recording)
            _check_fit(unpruned, recording)
            if actions and recording.actions.shape[1] != actions[0].shape[1]:
                raise CalibrationError(
                    f"The actions recorded in {recording.name} have {recording.actions.shape[1]} numbers, and those of "
                    f"{names[0]} {actions[0].shape[1]}; give recordings of one robot."
                )
            names.append(recording.name)
            actions.append(recording.actions)
            if recording.chunks is not None and recording.chunks.shape == unpruned.chunks.shape:
                distances.append(float(np.abs(recording.chunks - unpruned.chunks).max()))
            _note(baseline, unpruned, unpruned, recording.name)
            turn = place % max(1, len(courses))
            for course in (*courses[turn:], *courses[:turn]):
                _note(course, _play(policy, course.arm, recording), unpruned, recording.name)
                if progress is not None:
                    progress(recording.name, course.arm.title)
    spread = np.concatenate(actions).astype(float).std(axis=0)
    if not spread.any():
        raise CalibrationError(
            f"The actions recorded in {recordings.folder} never change, so there is no scale to say how far one moves; "
            "record episodes in which the robot does something."
        )
    return Replay(names, [baseline, *courses], spread, max(distances) if distances else None)


def _play(policy: Any, arm: Arm, recording: Recording, steps: int | None = None) -> Played:
    chunks, milliseconds, pruned = [], [], []
    with arm.attach(policy, recording.unit) as session:
        policy.reset()
        if session is not None:
            session.reset()
        for step in range(len(recording) if steps is None else steps):
            seen = recording.observation(step)
            images = {name: np.zeros_like(one) if arm.is_blank else one for name, one in seen.images.items()}
            torch.manual_seed(recording.unit.noise_seed(int(recording.steps[step]), arm.noise_stream))
            start = perf_counter()
            try:
                chunk = policy.act(images, seen.instruction, seen.proprio)
            except ObservationError as error:
                raise CalibrationError(
                    f"What was recorded ({recording.name}) does not fit this policy: {error}"
                ) from error
            milliseconds.append(1e3 * (perf_counter() - start))
            chunks.append(np.atleast_2d(np.array(chunk, float)))
            pruned.append(was_pruned(session))
            if session is not None and session.method.motion and recording.paths is not None:
                session.moved(float(recording.paths[step]))
    return Played(np.stack(chunks), milliseconds, np.array(pruned))


def _check_fit(unpruned: Played, recording: Recording) -> None:
    size, recorded = unpruned.chunks.shape[-1], recording.actions.shape[-1]
    if size != recorded:
        raise CalibrationError(
            f"The policy's actions have {size} numbers, and the recorded ones ({recording.name}) {recorded}; they were "
            "recorded on another robot."
        )
    if not np.isfinite(unpruned.chunks).all():
        raise CalibrationError(
            f"The unpruned policy's actions in {recording.name} are not finite; run vla-pruner audit."
        )


def _note(course: Course, played: Played, unpruned: Played, name: str) -> None:
    if played.chunks.shape != unpruned.chunks.shape or not np.isfinite(played.chunks).all():
        raise CalibrationError(
            f"The actions of the arm {course.arm.title!r} in {name} are not finite, or of another shape than the "
            "unpruned policy's; leave the arm out, and run vla-pruner audit."
        )
    change = np.abs(played.chunks - unpruned.chunks).mean(axis=1)
    counts = played.pruned if course.arm.kind in ("method", "random") else np.ones(len(change), bool)
    course.changes.append(change[counts])
    course.milliseconds += played.milliseconds
    course.pruned += int(played.pruned.sum())
