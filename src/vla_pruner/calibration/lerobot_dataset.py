"""A LeRobot dataset's folder, layouts 2.0, 2.1 and 3.0, read without LeRobot: parquet by pyarrow, videos by PyAV."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vla_pruner.calibration.dataset_video import Place, frames_of, package
from vla_pruner.calibration.errors import CalibrationError
from vla_pruner.errors import VLAPrunerError
from vla_pruner.json_file import field_of, typed
from vla_pruner.wording import said_by

INFO = "meta/info.json"
LAYOUTS = ("v2.0", "v2.1", "v3.0")
ACTION, STATE = "action", "observation.state"
_IMAGES = "observation.images."
_PLACEHOLDER = re.compile(r"\{(\w+)(?::0?(\d{1,2})d)?\}")


@dataclass(frozen=True)
class Episode:
    """One episode of a dataset.

    Attributes:
        index: its number.
        tasks: its instructions; None: only its rows have them.
        places: of layout 3, its row of the index: chunk and file with its rows, and of each video with its start.
        source: the file of the index that lists it.
    """

    index: int
    tasks: tuple[str, ...] | None
    places: Mapping[str, Any]
    source: str


@dataclass(frozen=True)
class Content:
    """The content of an episode for a replay; attributes as of `Recording`."""

    images: dict[str, np.ndarray]
    instructions: tuple[str, ...]
    state: np.ndarray | None
    steps: np.ndarray
    actions: np.ndarray


def is_dataset(folder: Path) -> bool:
    """Return True if a folder holds a LeRobot dataset."""
    return (folder / INFO).is_file()


class Dataset:
    """The episodes of a dataset.

    Attributes:
        cameras: its image features by their short names: "top" for "observation.images.top".
        episodes: in their order.
        state_size: numbers in its state; None: it has none.

    Raises:
        CalibrationError: it is damaged, of another layout, or needs a package that is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with self._readable(INFO):
            self._info = json.loads((folder / INFO).read_text(encoding="utf-8"))
            self._version = field_of(self._info, "codebase_version", str)
        if self._version not in LAYOUTS:
            raise CalibrationError(
                f"{folder} is a LeRobot dataset of the layout {self._version!r}; {', '.join(LAYOUTS)} are read. "
                "Convert it with LeRobot's own scripts."
            )
        with self._readable(INFO):
            features = field_of(self._info, "features", dict[str, Any])
            self._dtypes = {name: field_of(one, "dtype", str, f"the feature {name}") for name, one in features.items()}
            self._fps = field_of(self._info, "fps", float)
            if self._fps <= 0:
                raise ValueError(f"fps is {self._fps:g}, not above 0")
            self.state_size = None
            if STATE in features:
                (self.state_size,) = field_of(features[STATE], "shape", tuple[int])
        self._parquet: Any = package("pyarrow.parquet")
        if ACTION not in self._dtypes:
            raise CalibrationError(f"{folder} has no feature {ACTION!r}, whose spread would be the scale.")
        images = [name for name, dtype in self._dtypes.items() if dtype in ("image", "video")]
        self.cameras = {name.removeprefix(_IMAGES).removeprefix("observation."): name for name in images}
        legacy = self._version != "v3.0"
        self._tasks = self._legacy_tasks() if legacy else self._read_tasks()
        self.episodes = self._legacy_episodes() if legacy else self._read_episodes()

    @contextmanager
    def _readable(self, what: str) -> Iterator[None]:
        try:
            yield
        except VLAPrunerError:
            raise
        except Exception as error:  # the only common class of what pyarrow, PyAV and Pillow raise on damaged files
            told = said_by(error) if type(error) is ValueError else f"{type(error).__name__}: {said_by(error)}"
            raise CalibrationError(
                f"{what} of the LeRobot dataset {self.folder} cannot be read ({told}); restore it from a copy."
            ) from error

    def _legacy_tasks(self) -> dict[int, str]:
        name = "meta/tasks.jsonl"
        with self._readable(name):
            lines = _lines(self.folder / name)
            return {field_of(line, "task_index", int): field_of(line, "task", str) for line in lines}

    def _legacy_episodes(self) -> list[Episode]:
        name = "meta/episodes.jsonl"
        with self._readable(name):
            return [_episode(line, {}, name) for line in _lines(self.folder / name)]

    def _read_tasks(self) -> dict[int, str]:
        name = "meta/tasks.parquet"
        with self._readable(name):
            table = self._parquet.read_table(self.folder / name)
            columns = [column for column in table.column_names if column != "task_index"]
            known = [column for column in ("task", "__index_level_0__") if column in columns]
            if not known and len(columns) != 1:
                raise ValueError("it has no column 'task'")
            sentence = (known or columns)[0]
            rows = table.to_pylist()
            return {field_of(row, "task_index", int): field_of(row, sentence, str) for row in rows}

    def _read_episodes(self) -> list[Episode]:
        found = []
        with self._readable("meta/episodes"):
            files = sorted((self.folder / "meta/episodes").glob("*/*.parquet"))
            if not files:
                raise ValueError("there is no parquet file in it")
        for file in files:
            source = str(file.relative_to(self.folder))
            with self._readable(source):
                names = [name for name in self._parquet.read_schema(file).names if not name.startswith("stats/")]
                rows = self._parquet.read_table(file, columns=names).to_pylist()
                found += [_episode(row, row, source) for row in rows]
        return found

    def tasks_of(self, episode: Episode) -> tuple[str, ...]:
        """Return the instructions of an episode; its rows are read if the index does not have them.

        Raises:
            CalibrationError: a file is missing or damaged.
        """
        if episode.tasks is not None:
            return episode.tasks
        with self._rows(episode, ["task_index"]) as table:
            return tuple(dict.fromkeys(self._sentences(table, slice(None))))

    def check_numbers(self, episode: Episode, with_state: bool, cut: slice) -> None:
        """Refuse an episode with an action, or a state that is replayed, that is not finite; arguments as of `read`.

        Raises:
            CalibrationError: it has one, or a file is missing or damaged.
        """
        with self._rows(episode, [ACTION, *([STATE] if with_state else [])]) as table:
            check_finite(_numbers(table, ACTION), f"the action of episode {episode.index}", self.folder)
            if with_state:
                check_finite(self._state(table)[cut], f"the state of episode {episode.index}", self.folder)

    def read(self, episode: Episode, cameras: Mapping[str, str], with_state: bool, cut: slice) -> Content:
        """Read the content of an episode for a replay.

        Args:
            cameras: features by the names that the images get.
            with_state: whether the state is read.
            cut: the steps.

        Raises:
            CalibrationError: a file is missing or damaged, or timestamps name the wrong frames.
        """
        stills = [key for key in cameras.values() if self._dtypes[key] == "image"]
        videos = len(stills) < len(cameras)
        columns = ["task_index", ACTION, *(["timestamp"] if videos else []), *([STATE] if with_state else []), *stills]
        with self._rows(episode, columns) as table:
            steps = np.arange(len(table))[cut]
            instructions = tuple(self._sentences(table, cut))
            state = self._state(table)[cut] if with_state else None
            actions = _numbers(table, ACTION)
            times = _numbers(table, "timestamp")[cut, 0].astype(float) if videos else steps
            images = {name: self._stills(table[key].to_pylist()[cut]) for name, key in cameras.items() if key in stills}
        for name, key in cameras.items():
            if name not in images:
                images[name] = self._video(episode, key, times, steps)
        images = {name: images[name] for name in cameras}
        return Content(images, instructions, state, steps, actions)

    @contextmanager
    def _rows(self, episode: Episode, columns: Sequence[str]) -> Iterator[Any]:
        """Yield columns of an episode's rows; an error in the block names their file."""
        name = self._data_file(episode)
        with self._readable(name):
            path = self.folder / name
            missing = {*columns, "episode_index"} - set(self._parquet.read_schema(path).names)
            if missing:
                raise ValueError(f"it has no column {sorted(missing)[0]!r}")
            filters = [("episode_index", "==", episode.index)]
            table = self._parquet.read_table(path, columns=list(dict.fromkeys(columns)), filters=filters)
            if not len(table):
                raise ValueError(f"it has no rows of episode {episode.index}")
            yield table

    def _sentences(self, table: Any, cut: slice) -> Iterator[str]:
        for number in table["task_index"].to_pylist()[cut]:
            if number not in self._tasks:
                raise ValueError(f"its task_index {number!r} is in no row of meta/tasks")
            yield self._tasks[number]

    def _state(self, table: Any) -> np.ndarray:
        state = _numbers(table, STATE)
        if state.shape[1] != self.state_size:
            raise ValueError(f"its states have {state.shape[1]} numbers, and {INFO} says {self.state_size}")
        return state

    def _data_file(self, episode: Episode) -> str:
        names = ("chunk_index", "file_index")
        if self._version == "v3.0":
            place = {name: self._placed(episode, f"data/{name}", int) for name in names}
        else:
            place = self._legacy_place(episode)
        return self._file("data_path", place)

    def _placed(self, episode: Episode, name: str, hint: type) -> Any:
        """Return an entry of the index about an episode's place."""
        with self._readable(episode.source):
            if name not in episode.places:
                raise ValueError(f"it has no column {name!r}")
            return typed(hint, episode.places[name], f"{name} of episode {episode.index}")

    def _legacy_place(self, episode: Episode) -> dict[str, int]:
        with self._readable(INFO):
            size = field_of(self._info, "chunks_size", int)
            if size < 1:
                raise ValueError(f"chunks_size is {size}, not 1 or more")
        return {"episode_chunk": episode.index // size, "episode_index": episode.index}

    def _file(self, name: str, place: Mapping[str, int | str]) -> str:
        with self._readable(INFO):
            return _inside(_filled(field_of(self._info, name, str), name, place), name)

    def _stills(self, cells: Sequence[Any]) -> np.ndarray:
        opened = package("PIL.Image").open
        found = []
        for cell in cells:
            content, path = (field_of(cell, name, Any, "an image") for name in ("bytes", "path"))
            if content is None:
                file = self.folder / _inside(typed(str, path, "the path of an image"), "the path of an image")
            else:
                file = io.BytesIO(content)
            with opened(file) as image:
                found.append(np.asarray(image.convert("RGB")))
        return np.stack(found)

    def _video(self, episode: Episode, key: str, times: np.ndarray, steps: np.ndarray) -> np.ndarray:
        where = f"episode {episode.index}"
        if self._version == "v3.0":
            names = ("chunk_index", "file_index")
            file = {name: self._placed(episode, f"videos/{key}/{name}", int) for name in names}
            place = self._in_video(episode, key)
        else:
            file, place = self._legacy_place(episode), Place()
        name = self._file("video_path", {"video_key": key, **file})
        with self._readable(name):
            return frames_of(self.folder / name, place, times, steps, self._fps, where)

    def _in_video(self, episode: Episode, key: str) -> Place:
        """Return the place of an episode among those that share its video."""

        def file(one: Episode) -> tuple[Any, ...]:
            return tuple(one.places.get(f"videos/{key}/{name}") for name in ("chunk_index", "file_index"))

        def start(one: Episode) -> float:
            return self._placed(one, f"videos/{key}/from_timestamp", float)

        sharing = sorted(
            (one for one in self.episodes if file(one) == file(episode)), key=lambda one: (start(one), one.index)
        )
        lengths: list[Any] = [one.places.get("length") for one in sharing]
        place = sharing.index(episode)
        known = all(isinstance(length, int) for length in lengths)
        return Place(
            start=start(episode),
            lengths=(sum(lengths[:place]), sum(lengths)) if known else None,
            starts=[start(one) for one in sharing],
        )


def check_finite(numbers: np.ndarray, what: str, where: Path) -> None:
    """Refuse numbers (T, d) that are not all finite, before anything is computed from them.

    Args:
        what: their name, for the message.

    Raises:
        CalibrationError: it names the first one.
    """
    odd = np.argwhere(~np.isfinite(numbers))
    if len(odd):
        step, dimension = odd[0]
        raise CalibrationError(
            f"In {where}, {what} is {numbers[step, dimension]:g} in dimension {dimension} at step {step}, which is no "
            "finite number, so nothing can be scaled by it or computed from it; correct it, or leave the episode out."
        )


def _episode(line: Any, places: Mapping[str, Any], source: str) -> Episode:
    index = field_of(line, "episode_index", int)
    tasks = line.get("tasks")
    # LeRobot goes by the rows' task_index, so an index without tasks is complete.
    return Episode(index, None if tasks is None else typed(tuple[str, ...], tasks, "tasks"), places, source)


def _numbers(table: Any, column: str) -> np.ndarray:
    """Return (rows, n) float32; numbers too large for it become infinite."""
    with np.errstate(over="ignore"):
        try:
            return np.array(table[column].to_pylist(), np.float32).reshape(len(table), -1)
        except (ValueError, TypeError) as error:
            raise ValueError(f"its column {column!r} does not hold as many numbers in each row ({error})") from error


def _filled(template: str, name: str, place: Mapping[str, int | str]) -> str:
    """Return a path's template with its numbers and names filled in. Not by str.format, which reads attributes and pads
    to any width.
    """
    odd = _PLACEHOLDER.sub("", template)
    known = all(found[1] in place for found in _PLACEHOLDER.finditer(template))
    if not known or "{" in odd or "}" in odd:
        raise ValueError(f"{name} is {template!r}, in which only {{{'}, {'.join(place)}}} can be filled in")
    return _PLACEHOLDER.sub(lambda found: str(place[found[1]]).rjust(int(found[2] or 0), "0"), template)


def _inside(path: str, name: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{name} leads to {path!r}, which is outside of the dataset")
    return path


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
