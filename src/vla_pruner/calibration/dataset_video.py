"""The frames of a dataset's videos that belong to its rows: matched by their times, and never another step's."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_pruner.calibration.errors import CalibrationError
from vla_pruner.wording import install

_SAME = 0.05
"""The largest distance, in frames, between a time and the only frame that it can mean."""
_NEAR = 0.25
"""The same limit after drifted times were replaced by those of the frames' numbers."""
_DRIFT = 0.5
"""The drift, in frames, from which on another frame is nearer."""


class NoFrame(ValueError):
    """A video has no frame at a time. The message says which."""


@dataclass(frozen=True)
class Place:
    """The place of an episode in a video that holds several.

    Attributes:
        start: seconds at which it begins, as the dataset's index says.
        lengths: of the episodes before it and of all that the video holds, in steps; None: the index does not say.
        starts: of all episodes of the video, in seconds.
    """

    start: float = 0.0
    lengths: tuple[int, int] | None = None
    starts: Sequence[float] = (0.0,)


def frames_of(path: Path, place: Place, times: np.ndarray, steps: np.ndarray, fps: float, where: str) -> np.ndarray:
    """Return the images (n, H, W, 3) uint8 of n steps of an episode.

    LeRobot takes the frame nearest to a row's timestamp, and raises if that is more than .1 ms away. So does this
    function, but if timestamps have drifted by less than half a frame, it takes the intended frame.

    Args:
        path: of the video.
        times: (n,) timestamps of the steps, seconds from the episode's start.
        steps: (n,) their numbers in the episode.
        fps: steps in a second.
        where: the rows' episode, for messages.

    Raises:
        CalibrationError: times have drifted by half a frame or more, a frame is missing, or PyAV is not installed.
        Exception: whatever PyAV raises on a damaged file.
    """
    if not path.is_file():
        raise CalibrationError(f"There is no video {path}, which {where} names; restore it from a copy.")
    start = _start(path, place, fps, where)
    try:
        if not np.isfinite(times).all():
            raise NoFrame("a time is not finite")
        return frames_at(path, times + place.start, _SAME / fps)
    except NoFrame:
        drift = np.nan_to_num(np.abs(times * fps - steps), nan=np.inf)
        if drift.max() >= _DRIFT:
            step = int(np.argmax(drift))
            raise CalibrationError(
                f"The timestamps of {where} do not fit its video {path.name}: step {steps[step]} has {times[step]:.3f} "
                f"s, and at {fps:g} steps a second it lies at {steps[step] / fps:.3f} s. Its image would be another "
                "step's; set the column timestamp to frame_index / fps, as LeRobot writes it."
            ) from None
    try:
        return frames_at(path, steps / fps + start, _NEAR / fps)
    except NoFrame as error:
        raise CalibrationError(
            f"{error}, where an image of {where} should be; the video is cut off, or runs at another rate than the "
            f"dataset's {fps:g} frames a second. Restore it from a copy."
        ) from error


def _start(path: Path, place: Place, fps: float, where: str) -> float:
    """Return the seconds at which the episode's frames begin: as the index says, unless the index has drifted."""
    off = [abs(start * fps - round(start * fps)) for start in place.starts]
    drifts = max(off) > _SAME
    if place.lengths is None:
        if drifts:
            raise CalibrationError(_drifted(path, place, where) + "and the index has no lengths to correct it by.")
        return place.start
    before, total = place.lengths
    if not drifts and _frame_count(path) != total:
        return place.start  # the video holds more or less than the index says, so counting proves nothing
    if abs(place.start * fps - before) >= _DRIFT:
        raise CalibrationError(
            _drifted(path, place, where) + f"and by the lengths of the episodes before it at {before / fps:.3f} s. Its "
            "images would be those of other steps; correct from_timestamp, or write the dataset anew with LeRobot."
        )
    return before / fps


def _drifted(path: Path, place: Place, where: str) -> str:
    return f"By its from_timestamp in meta/episodes, {where} begins at {place.start:.3f} s of {path.name}, "


def _frame_count(path: Path) -> int:
    """Return the number of frames according to the container; 0 if it gives none."""
    with package("av").open(str(path)) as container:
        return container.streams.video[0].frames if container.streams.video else 0


def frames_at(path: Path, times: np.ndarray, tolerance: float) -> np.ndarray:
    """Return the frames (n, H, W, 3) uint8 of a video that are nearest to n times, in seconds.

    Raises:
        NoFrame: none is within `tolerance` seconds.
        ValueError: it is no video.
        Exception: whatever PyAV raises on a damaged file.
    """
    found: list[np.ndarray | None] = [None] * len(times)
    nearest = np.full(len(times), tolerance)
    with package("av").open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it holds no video")
        stream = container.streams.video[0]
        container.seek(int((times.min() - tolerance) / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time > times.max() + tolerance:
                break
            distance = np.abs(times - frame.time)
            nearer = np.flatnonzero(distance <= nearest)
            if len(nearer):
                image = frame.to_ndarray(format="rgb24")
                nearest[nearer] = distance[nearer]
                for place in nearer:
                    found[place] = image
    images = [image for image in found if image is not None]
    if len(images) < len(found):
        raise NoFrame(f"{path} has no frame at {times[[image is None for image in found]][0]:.3f} s")
    return np.stack(images)


def package(name: str) -> Any:
    """Import a package that reads a part of a dataset.

    Raises:
        CalibrationError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CalibrationError(
            f"Reading a LeRobot dataset needs {name.split('.')[0]}, which is not installed; run: {install('dataset')}"
        ) from error
