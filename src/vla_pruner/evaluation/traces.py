"""The observations, actions and kept tokens of every control step of an episode: one .npz file beside the records.

The report shows traces, and `vla-pruner calibrate` replays them. Records say how an episode ended; a trace is for a few
episodes, since images are large.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt, prod
from pathlib import Path
from typing import Any

import numpy as np

from vla_pruner.evaluation.errors import EvaluationError
from vla_pruner.evaluation.records import Record, write_bytes
from vla_pruner.evaluation.units import Unit
from vla_pruner.json_file import load_json, typed
from vla_pruner.observations import Observation
from vla_pruner.wording import said_by

TRACES = "traces"
"""The folder beside the records."""
FORMAT = "vla-pruner trace 1"

_ABOUT = "about"
_IMAGES, _SCORES = "images/", "scores/"
_ARRAYS = {
    "instructions": ("U", 1),
    "actions": ("f", 3),
    "noise_seeds": ("u", 1),
    "steps": ("i", 1),
    "pruned": ("b", 1),
    "proprio": ("f", 2),
    "kept": ("b", 2),
    _IMAGES: ("u", 4),
    _SCORES: ("f", 2),
}
"""Kind of number, as numpy has it, and dimensions of each array."""
_LONGEST_NAME = 160
_DAMAGED = (
    OSError, ValueError, KeyError, TypeError, IndexError, EOFError, MemoryError, RecursionError, SyntaxError,
    NotImplementedError, struct.error, zipfile.BadZipFile, zlib.error, tokenize.TokenError,
)  # fmt: skip
"""The errors of zipfile and numpy on files that were cut or changed; numpy reads headers by Python's own parser."""


@dataclass(frozen=True)
class Grid:
    """The grid of one camera's visual tokens on its image, in raster order.

    Attributes:
        first: id of the token in the upper left corner; the others follow row by row.
        rows, columns: of patches, over the whole image as the model's encoder is given it. A policy that crops or pads
            inside of `act` shows its encoder another cut than the image in the trace.
    """

    first: int
    rows: int
    columns: int


@dataclass(frozen=True)
class _About:
    """The JSON part of a trace's file; attributes as of `Trace`."""

    format: str
    run: str
    arm: str
    unit: Unit
    success: bool
    camera_tokens: dict[str, int]


@dataclass(frozen=True)
class Trace:
    """One episode of one arm, T control steps long.

    Attributes:
        run: identity of the run's settings, as in the record.
        arm: key of the arm.
        unit: the episode.
        success: whether it was solved.
        images: the arguments of `act`, (T, H, W, 3) uint8 by the policy's camera names; black for the blank arm, and
            nothing for a policy that sees none.
        proprio: (T, d) float32, or None if `act` got none.
        instructions: T sentences.
        actions: (T, chunk, dim) float32, the results of `act`.
        noise_seeds: (T,) uint64, of torch's generator before each `act`.
        steps: (T,) int64, actions that had been carried out before each `act`.
        kept: (T, M) bool, the visual tokens that stayed, all of them in a step that was not pruned; None if nothing was
            attached, so that all stayed.
        pruned: (T,) bool, whether the step was pruned.
        scores: (T, M) float32 under "semantic" and "action", as the method read them; nan if a step has none. Tokens
            that a layer lacks count 0 in its action score. The unpruned policy's come from a second look, see
            `evaluation.maps`; other arms without a method have none.
        camera_tokens: visual tokens of each camera by name, in the order of ids; empty if there are no scores.
    """

    run: str
    arm: str
    unit: Unit
    success: bool
    images: Mapping[str, np.ndarray]
    proprio: np.ndarray | None
    instructions: tuple[str, ...]
    actions: np.ndarray
    noise_seeds: np.ndarray
    steps: np.ndarray
    kept: np.ndarray | None
    pruned: np.ndarray
    scores: Mapping[str, np.ndarray]
    camera_tokens: Mapping[str, int]

    @property
    def key(self) -> tuple[Unit, str]:
        """The key of its record."""
        return self.unit, self.arm

    def __len__(self) -> int:
        """Return the number of control steps."""
        return len(self.actions)

    def observation(self, step: int) -> Observation:
        """Return the arguments of `act` in a control step."""
        images = {name: images[step] for name, images in self.images.items()}
        return Observation(images, self.instructions[step], None if self.proprio is None else self.proprio[step])

    @property
    def grids(self) -> dict[str, Grid]:
        """The grid of each camera's tokens on its image.

        Every family with images of its own cuts squares into squares, row by row; a camera whose number of tokens is no
        square is left out.
        """
        found, first = {}, 0
        for name, count in self.camera_tokens.items():
            side = isqrt(count)
            if count and side * side == count:
                found[name] = Grid(first, side, side)
            first += count
        return found


class Tracer:
    """Collects the trace of an episode while it runs.

    Args:
        cameras: the policy's, in the order of the visual tokens.
    """

    def __init__(self, cameras: tuple[str, ...]) -> None:
        self._cameras = cameras
        self._images: list[dict[str, np.ndarray]] = []
        self._proprio: list[np.ndarray | None] = []
        self._instructions: list[str] = []
        self._actions: list[np.ndarray] = []
        self._seeds: list[int] = []
        self._steps: list[int] = []
        self._kept: list[np.ndarray | None] = []
        self._scores: list[dict[str, np.ndarray]] = []
        self._counts: tuple[int, ...] = ()
        self._step: Any = None

    def note(
        self,
        seen: Observation,
        chunk: np.ndarray,
        *,
        seed: int,
        steps: int,
        session: Any,
    ) -> None:
        """Note that a control step is over.

        Args:
            seen: the arguments of `act`.
            chunk: its result.
            seed: of torch's generator before it.
            steps: actions carried out before it.
            session: the one that is attached, or None.
        """
        self._images.append({name: np.array(image, np.uint8) for name, image in seen.images.items()})
        self._proprio.append(None if seen.proprio is None else np.array(seen.proprio, np.float32))
        self._instructions.append(seen.instruction)
        self._actions.append(np.atleast_2d(np.array(chunk, np.float32)))
        self._seeds.append(seed)
        self._steps.append(steps)
        self._read_scores()
        if session is None:
            return
        # Its scores are read one step later: by then the next `act` has computed them anyway, so that a traced episode
        # takes the milliseconds of any other.
        self._step = session.step
        self._counts = self._step.layout.cameras
        self._kept.append(None if session.kept is None else session.kept[0].cpu().numpy())

    def _read_scores(self) -> None:
        if self._step is not None:
            found = {"semantic": self._step.semantic, "action": self._step.action}
            self._scores.append(
                {name: score[0].float().cpu().numpy().copy() for name, score in found.items() if score is not None}
            )
            self._step = None

    def trace(self, record: Record) -> Trace:
        """Return the trace, once the episode is over and its session detached.

        Raises:
            EvaluationError: the shape of the policy's results changed on the way.
        """
        self._read_scores()
        if len({chunk.shape for chunk in self._actions}) > 1:
            raise EvaluationError(
                f"The action chunks of {record.arm} on {record.unit} differ in shape, so they cannot be traced; leave "
                "out --trace."
            )
        attached, count = bool(self._kept), sum(self._counts)
        kept = np.ones((len(self._kept), count), bool)
        for row, ids in zip(kept, self._kept, strict=True):
            if ids is not None:
                row[:] = False
                row[ids] = True
        read = sorted({name for scores in self._scores for name in scores})
        nothing = np.full(count, np.nan, np.float32)
        shown = self._images[0] if self._images else {}
        with_state = bool(self._proprio) and self._proprio[0] is not None
        return Trace(
            run=record.run,
            arm=record.arm,
            unit=record.unit,
            success=bool(record.success),
            images={name: np.stack([images[name] for images in self._images]) for name in shown},
            proprio=np.stack([state for state in self._proprio if state is not None]) if with_state else None,
            instructions=tuple(self._instructions),
            actions=np.stack(self._actions),
            noise_seeds=np.array(self._seeds, np.uint64),
            steps=np.array(self._steps, np.int64),
            kept=kept if attached else None,
            pruned=np.array([ids is not None for ids in self._kept] or [False] * len(self._actions), bool),
            scores={name: np.stack([scores.get(name, nothing) for scores in self._scores]) for name in read},
            camera_tokens=by_camera(self._cameras, self._counts),
        )


def by_camera(cameras: tuple[str, ...], counts: tuple[int, ...]) -> dict[str, int]:
    """Visual tokens by the policy's camera names; LeRobot's empty cameras come behind those that have names."""
    names = (*cameras, *(f"empty camera {number}" for number in range(len(counts) - len(cameras))))
    return dict(zip(names, counts, strict=False))


def trace_path(folder: Path, unit: Unit, arm: str) -> Path:
    """Return the path of a record's trace, if there is one.

    Args:
        folder: of the evaluation.
    """
    words = f"{unit.suite}-{unit.task_id}-{unit.initial_state}-{arm}"
    readable = re.sub(r"[^A-Za-z0-9.+-]", "_", words)[:_LONGEST_NAME]
    return folder / TRACES / f"{readable}-{zlib.crc32(f'{words}-{unit.policy_seed}'.encode()):08x}.npz"


def make_folder(path: Path) -> None:
    """The folder of a trace.

    Raises:
        EvaluationError: it cannot be made.
    """
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise EvaluationError(
            f"The folder {path.parent} cannot be made ({error.strerror}); choose another --out, or leave out --trace."
        ) from error


def write_trace(folder: Path, trace: Trace) -> Path:
    """Write a trace, wholly or not at all, in place of an earlier one of the same episode; return its file.

    Args:
        folder: of the evaluation.

    Raises:
        EvaluationError: it could not be written; an earlier file is as before.
    """
    about = {
        "format": FORMAT,
        "run": trace.run,
        "arm": trace.arm,
        "unit": dataclasses.asdict(trace.unit),
        "success": trace.success,
        "camera_tokens": dict(trace.camera_tokens),
    }
    arrays: dict[str, Any] = {
        _ABOUT: np.array(json.dumps(about)),
        "instructions": np.array(trace.instructions),
        "actions": trace.actions,
        "noise_seeds": trace.noise_seeds,
        "steps": trace.steps,
        "pruned": trace.pruned,
        **{f"images/{name}": images for name, images in trace.images.items()},
        **{f"scores/{name}": scores for name, scores in trace.scores.items()},
    }
    arrays |= {name: array for name, array in (("proprio", trace.proprio), ("kept", trace.kept)) if array is not None}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    path = trace_path(folder, trace.unit, trace.arm)
    make_folder(path)
    write_bytes(path, content.getvalue())
    return path


def read_trace(path: Path, key: tuple[Unit, str] | None = None, run: str | None = None) -> Trace:
    """Read `write_trace`'s file.

    Args:
        key, run: of the record that it must belong to; None: of any.

    Raises:
        EvaluationError: there is none, it is damaged, or it is of another episode.
    """
    with _opened(path) as (about, file):
        arrays = {name: _array(file, name) for name in file.files if name != _ABOUT}
        trace = Trace(
            run=about.run,
            arm=about.arm,
            unit=about.unit,
            success=about.success,
            images=_under(arrays, _IMAGES),
            proprio=arrays.get("proprio"),
            instructions=tuple(typed(str, str(one), "an instruction") for one in arrays["instructions"]),
            actions=arrays["actions"],
            noise_seeds=arrays["noise_seeds"],
            steps=arrays["steps"],
            kept=arrays.get("kept"),
            pruned=arrays["pruned"],
            scores=_under(arrays, _SCORES),
            camera_tokens=about.camera_tokens,
        )
        _check(trace, arrays)
        if key not in (None, trace.key) or run not in (None, trace.run):
            raise ValueError(f"it is of {trace.arm!r} on {trace.unit} in the run {trace.run!r}")
        return trace


def read_numbers(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Return actions (T, chunk, dim) and state (T, d) or None of a trace, without its images.

    Raises:
        EvaluationError: there is no trace, or it is damaged.
    """
    with _opened(path) as (_, file):
        return _array(file, "actions"), _array(file, "proprio") if "proprio" in file.files else None


def _array(file: Any, name: str) -> np.ndarray:
    """One array of a trace, of the kind that `write_trace` wrote."""
    known = next((one for one in (_IMAGES, _SCORES) if name.startswith(one)), name)
    if known not in _ARRAYS:
        raise ValueError(f"it holds {name!r}, which no trace has")
    kind, dimensions = _ARRAYS[known]
    array = file[name]
    if array.dtype.kind != kind or array.ndim != dimensions:
        raise ValueError(f"its {name} are {array.dtype} of {array.ndim} dimensions")
    return array


def _check(trace: Trace, arrays: Mapping[str, np.ndarray]) -> None:
    lengths = {len(array) for array in arrays.values()}
    if len(lengths) > 1:
        raise ValueError(f"its arrays are {', '.join(map(str, sorted(lengths)))} control steps long")
    if lengths == {0}:
        raise ValueError("it holds no control step")
    if not trace.actions.size:
        raise ValueError(f"its actions have the shape {trace.actions.shape}")
    odd = [
        name for name, image in trace.images.items() if image.dtype != np.uint8 or image.shape[3] != 3 or not image.size
    ]
    if odd:
        raise ValueError(f"the images of {odd[0]!r} are no pictures of red, green and blue bytes")
    if (np.diff(trace.steps, prepend=0) < 0).any():
        raise ValueError("its steps go backwards")
    counts = list(trace.camera_tokens.values())
    widths = {array.shape[1] for array in (*trace.scores.values(), *([] if trace.kept is None else [trace.kept]))}
    if min(counts, default=0) < 0 or len(widths) > 1 or (widths and widths != {sum(counts)}):
        raise ValueError(f"its cameras have {counts} visual tokens, and its scores or what was kept {sorted(widths)}")


def traces_of(folder: Path) -> dict[tuple[Unit, str], Path]:
    """The traces of an evaluation's folder by the keys of their records, in their order; empty if there are none.

    Raises:
        EvaluationError: there is no such folder, or a trace in it is damaged.
    """
    if not folder.is_dir():
        raise EvaluationError(f"There is no folder {folder}; give the --out of an evaluation.")
    found = {}
    for path in (folder / TRACES).glob("*.npz"):
        with _opened(path) as (about, _):
            found[about.unit, about.arm] = path
    return dict(sorted(found.items(), key=lambda item: item[0]))


def _under(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _check_sizes(path: Path) -> None:
    """Refuse arrays whose headers claim more than the file holds: numpy would allocate that much memory first."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            if dtype.hasobject or prod(shape) * dtype.itemsize > member.file_size:
                raise ValueError(f"{member.filename} is an array of {shape} {dtype} in {member.file_size} bytes")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[_About, Any]]:
    """Yield the JSON part of a trace and its arrays, with one error for any fault in it."""
    try:
        # numpy would advise to unpickle an unknown file.
        if path.exists() and not zipfile.is_zipfile(path):
            raise ValueError("it is no whole .npz file")
        if path.exists():
            _check_sizes(path)
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            about = load_json(str(file[_ABOUT]))
            if isinstance(about, dict) and about.get("format") != FORMAT:
                raise ValueError(f"its format is {about.get('format')!r}, and this version reads {FORMAT!r}")
            about = typed(_About, about, "what it says of itself")
            about.unit.check()
            yield about, file
    except FileNotFoundError as error:
        raise EvaluationError(f"There is no trace {path}; run the evaluation with --trace.") from error
    except _DAMAGED as error:
        told = f"{error} is missing" if isinstance(error, KeyError) else said_by(error) or type(error).__name__
        raise EvaluationError(
            f"The trace {path} is damaged ({told}). Its record is whole: delete the trace, or restore it from a copy."
        ) from error
