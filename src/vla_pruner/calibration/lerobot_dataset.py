"""A LeRobot dataset's folder, layouts 2.0, 2.1 and 3.0, read without LeRobot: parquet by pyarrow, videos by PyAV."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_pruner.calibration.errors import CalibrationError
from vla_pruner.wording import install

INFO = "meta/info.json"
LAYOUTS = ("v2.0", "v2.1", "v3.0")
ACTION, STATE = "action", "observation.state"
_IMAGES = "observation.images."


@dataclass(frozen=True)
class Episode:
    """One episode of a dataset.

    Attributes:
        index: its number.
        tasks: what was to be done.
        places: of layout 3, the number of chunk and file with its rows, and of each video with its start in seconds.
    """

    index: int
    tasks: tuple[str, ...]
    places: Mapping[str, Any]


@dataclass(frozen=True)
class Content:
    """What of an episode is replayed; attributes as of `Recording`."""

    images: dict[str, np.ndarray]
    instructions: tuple[str, ...]
    state: np.ndarray | None
    steps: np.ndarray
    actions: np.ndarray


def is_dataset(folder: Path) -> bool:
    """Whether a folder holds a LeRobot dataset."""
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
            self._info: dict[str, Any] = json.loads((folder / INFO).read_text(encoding="utf-8"))
            self._version = self._info["codebase_version"]
            self._features: dict[str, Any] = self._info["features"]
            self._fps = float(self._info["fps"])
        if self._version not in LAYOUTS:
            raise CalibrationError(
                f"{folder} is a LeRobot dataset of the layout {self._version!r}; {', '.join(LAYOUTS)} are read. "
                "Convert it with LeRobot's own scripts."
            )
        self._parquet: Any = _package("pyarrow.parquet")
        if ACTION not in self._features:
            raise CalibrationError(f"{folder} has no feature {ACTION!r}, whose spread would be the scale.")
        images = [name for name, feature in self._features.items() if feature["dtype"] in ("image", "video")]
        self.cameras = {name.removeprefix(_IMAGES).removeprefix("observation."): name for name in images}
        self.state_size = self._features[STATE]["shape"][0] if STATE in self._features else None
        legacy = self._version != "v3.0"
        with self._readable("meta/tasks"):
            self._tasks = self._legacy_tasks() if legacy else self._read_tasks()
        with self._readable("meta/episodes"):
            self.episodes = list(self._legacy_episodes() if legacy else self._read_episodes())

    @contextmanager
    def _readable(self, what: str) -> Iterator[None]:
        try:
            yield
        except CalibrationError:
            raise
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CalibrationError(
                f"{what} of the LeRobot dataset {self.folder} cannot be read ({type(error).__name__}: {error}); "
                "restore it from a copy."
            ) from error

    def _legacy_tasks(self) -> dict[int, str]:
        return {line["task_index"]: line["task"] for line in _lines(self.folder / "meta/tasks.jsonl")}

    def _legacy_episodes(self) -> Iterator[Episode]:
        for line in _lines(self.folder / "meta/episodes.jsonl"):
            yield Episode(line["episode_index"], tuple(line["tasks"]), {})

    def _read_tasks(self) -> dict[int, str]:
        table = self._parquet.read_table(self.folder / "meta/tasks.parquet")
        (sentence,) = (name for name in table.column_names if name != "task_index")
        return {row["task_index"]: row[sentence] for row in table.to_pylist()}

    def _read_episodes(self) -> Iterator[Episode]:
        files = sorted((self.folder / "meta/episodes").glob("*/*.parquet"))
        if not files:
            raise ValueError("there is no parquet file in it")
        for file in files:
            names = [name for name in self._parquet.read_schema(file).names if not name.startswith("stats/")]
            for row in self._parquet.read_table(file, columns=names).to_pylist():
                yield Episode(row["episode_index"], tuple(row["tasks"]), row)

    def read(self, episode: Episode, cameras: Mapping[str, str], with_state: bool, cut: slice) -> Content:
        """What of an episode is replayed.

        Args:
            cameras: features by the names that the images get.
            with_state: whether the state is read.
            cut: which steps.

        Raises:
            CalibrationError: a file is missing or damaged.
        """
        stills = [key for key in cameras.values() if self._features[key]["dtype"] == "image"]
        columns = ["timestamp", "task_index", ACTION, *([STATE] if with_state else []), *stills]
        path = self.folder / self._data_file(episode)
        with self._readable(str(path)):
            table = self._parquet.read_table(path, columns=columns, filters=[("episode_index", "==", episode.index)])
            if not len(table):
                raise ValueError(f"it has no rows of episode {episode.index}")
            times = np.array(table["timestamp"].to_pylist())[cut]
            images = {
                name: self._stills(table[key].to_pylist()[cut]) if key in stills else self._video(episode, key, times)
                for name, key in cameras.items()
            }
            return Content(
                images=images,
                instructions=tuple(self._tasks[number] for number in table["task_index"].to_pylist()[cut]),
                state=np.array(table[STATE].to_pylist(), np.float32)[cut] if with_state else None,
                steps=np.arange(len(table))[cut],
                actions=np.array(table[ACTION].to_pylist(), np.float32).reshape(len(table), -1),
            )

    def _data_file(self, episode: Episode) -> str:
        with self._readable(INFO):
            if self._version == "v3.0":
                place = {name: episode.places[f"data/{name}"] for name in ("chunk_index", "file_index")}
                return self._info["data_path"].format(**place)
            return self._info["data_path"].format(**self._legacy_place(episode))

    def _legacy_place(self, episode: Episode) -> dict[str, int]:
        return {"episode_chunk": episode.index // self._info["chunks_size"], "episode_index": episode.index}

    def _stills(self, cells: list[Any]) -> np.ndarray:
        opened = _package("PIL.Image").open
        found = []
        for cell in cells:
            file = self.folder / cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])
            with opened(file) as image:
                found.append(np.asarray(image.convert("RGB")))
        return np.stack(found)

    def _video(self, episode: Episode, key: str, times: np.ndarray) -> np.ndarray:
        start, place = 0.0, {"video_key": key}
        if self._version == "v3.0":
            start = episode.places[f"videos/{key}/from_timestamp"]
            place |= {name: episode.places[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
        else:
            place |= self._legacy_place(episode)
        path = self.folder / self._info["video_path"].format(**place)
        if not path.is_file():
            raise FileNotFoundError(f"there is no video {path}")
        return np.stack(list(_frames(path, times + start, 0.5 / self._fps)))


def _frames(path: Path, times: np.ndarray, tolerance: float) -> Iterator[np.ndarray]:
    """The frames (H, W, 3) uint8 at these ascending times, in seconds, of a video.

    Raises:
        ValueError: one of them is not there, or the file is no video.
    """
    av = _package("av")
    wanted = iter(times.tolist())
    time = next(wanted)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video")
            stream = container.streams.video[0]
            container.seek(int(time / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time > time + tolerance:
                    break
                if frame.time >= time - tolerance:
                    yield frame.to_ndarray(format="rgb24")
                    time = next(wanted, None)
                    if time is None:
                        return
    except av.FFmpegError as error:
        raise ValueError(f"{path}: {error}") from error
    raise ValueError(f"{path} has no frame at {time:.3f} s")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CalibrationError(
            f"Reading a LeRobot dataset needs {name.split('.')[0]}, which is not installed; run: {install('dataset')}"
        ) from error
