"""Records, run folders, traces, calibrations and datasets, mutated as editors and cut copies leave them.

`run` reads each mutant as users do (`report`, `eval` that goes on, `eval --merge`, `calibrate`). What comes out is a
result or one of this package's errors; everything else is a find, as is markup in the report's page.
"""

from __future__ import annotations

import copy
import io
import json
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console

from tests.calibration.fakes import Drawn, dataset, made_up_folder
from tests.evaluation.fakes import find_fake, settings
from tests.report.folders import write_run
from vla_pruner.bootstrap import Estimate
from vla_pruner.calibration import Calibration, find_recordings
from vla_pruner.calibration.agreement import agreement, arms_of
from vla_pruner.calibration.command import sentences
from vla_pruner.calibration.replay import replay
from vla_pruner.calibration.result import ArmCalibration
from vla_pruner.errors import VLAPrunerError
from vla_pruner.evaluation.command import run_eval, run_merge
from vla_pruner.evaluation.manifest import run_of
from vla_pruner.evaluation.traces import read_trace
from vla_pruner.report.command import run_report
from vla_pruner.wording import said_by

HTML = "\"'><script>alert(7)</script>"
RICH = "[bold]a [/x] [link=file:///]b"
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2.5, -0.0, 1e308, 10**7, 2**70, 10**400, float("nan"), float("inf"), "", " ", "x",
    HTML, RICH, "a\ud800", "\x1b[2J\x00", "../../x", "/etc/passwd", "{0.__class__}", "1e999", "x" * 300,
    [], {}, [[]], [{}], [None], {"": None}, [1, 2],
)  # fmt: skip
"""The values that replace a value."""
BYTES = (b"", b"\0" * 64, b"[" * 100_000, b"null\n", b"{}\n", b'"\xe9"\n', b"\xef\xbb\xbf{}\n", b"PK\x03\x04", b"PAR1")


def run(count: int, seed: int = 0) -> list[str]:
    """Read `count` mutants and return the faults, one line each with its number.

    Args:
        seed: of all draws; a number of the same seed is the same mutant.
    """
    found = []
    # Watching how busy the machine is takes half a second for each evaluation.
    idle = mock.patch("vla_pruner.conditions.busy_cores", return_value=None)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), idle:
        warnings.simplefilter("ignore")
        subjects = _subjects(Path(folder))
        for number in range(count):
            draw = random.Random(f"{seed}-{number}")
            subject = draw.choice(subjects)
            said = subject.read_mutant(draw)
            found += [] if said is None else [f"mutant {number} of seed {seed}, {said}"]
    return found


class Subject:
    """A folder, and how users read it.

    Args:
        folder: of files, none of which reading changes.
        read: raises a `VLAPrunerError` or returns text that must hold no markup of strangers.
    """

    def __init__(self, folder: Path, read: Callable[[Path], str]) -> None:
        self.folder, self._read = folder, read
        self._files = sorted(path for path in folder.rglob("*") if path.is_file())

    def read_mutant(self, draw: random.Random) -> str | None:
        """Change one file, read the folder, and put the file back; return the fault."""
        kind = draw.choice(sorted({path.suffix for path in self._files}))  # traces are many, and run.json is one
        path = draw.choice([path for path in self._files if path.suffix == kind])
        whole = path.read_bytes()
        others = [(one, one.read_bytes()) for one in self._files if one.name in ("run.json", "episodes.jsonl")]
        what = f"{self.folder.name}: {path.relative_to(self.folder)}"
        try:
            content, how = mutant(path, whole, draw)
            path.write_bytes(content)
            if path.name == "run.json" and draw.random() < 0.7:
                _rehash(path)
            if draw.random() < 0.03:
                path.unlink()
                how = "gone"
            what += f" {how}"
            text = self._read(self.folder)
        except VLAPrunerError as error:
            text = str(error)
            return f"{what}: several lines" if len(text) > 20_000 else None
        except Exception as error:
            return f"{what}: {type(error).__name__}: {said_by(error)[:200]}"
        finally:
            for one, content in (*others, (path, whole)):
                one.write_bytes(content)
        return f"{what}: markup in the page" if "<script>alert(7)" in text else None


def mutant(path: Path, whole: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A file's content, changed in one place, and how."""
    by_kind = {".json": _json, ".jsonl": _lines, ".npz": _arrays, ".parquet": _rows}
    if path.suffix in by_kind and draw.random() < 0.85:
        return by_kind[path.suffix](whole, draw)
    kind = draw.choice(("cut", "flip", "replace", "insert"))
    place = draw.randrange(len(whole) + 1)
    if kind == "cut":
        return whole[:place], f"cut at {place}"
    if kind == "replace":
        return draw.choice(BYTES), "replaced"
    if kind == "insert":
        return whole[:place] + draw.choice(BYTES) + whole[place:], f"inserted at {place}"
    flipped = bytearray(whole)
    for _ in range(draw.randrange(1, 20)):
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped), "flipped bits"


def _change(content: Any, draw: random.Random) -> tuple[Any, str]:
    """Plain values with one of them replaced, left out or renamed."""
    content = copy.deepcopy(content)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in list(items):
            places.append((node, key))
            walk(value)

    walk(content)
    if not places or draw.random() < 0.03:
        return draw.choice(ODD), "replaced as a whole"
    node, key = draw.choice(places)
    kind = draw.random()
    if kind < 0.75:
        node[key] = draw.choice(ODD)
        return content, f"{key!r} = {node[key]!r:.30}"
    if kind < 0.9 or isinstance(node, list):
        del node[key]
        return content, f"without {key!r}"
    node[draw.choice((HTML, RICH, "x", ""))] = node.pop(key)
    return content, f"renamed {key!r}"


def _json(whole: bytes, draw: random.Random) -> tuple[bytes, str]:
    content, how = _change(json.loads(whole), draw)
    return json.dumps(content).encode(), how


def _lines(whole: bytes, draw: random.Random) -> tuple[bytes, str]:
    lines = whole.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    kind = draw.random()
    if kind < 0.05:
        return b"".join([*lines, lines[place]]), f"line {place} twice"
    if kind < 0.1:
        return b"".join(lines[:place] + lines[place + 1 :]), f"line {place} gone"
    content, how = _change(json.loads(lines[place]), draw)
    lines[place] = json.dumps(content).encode() + b"\n"
    return b"".join(lines), f"line {place}: {how}"


def _arrays(whole: bytes, draw: random.Random) -> tuple[bytes, str]:
    with np.load(io.BytesIO(whole), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    name = draw.choice(sorted(arrays))
    array = arrays[name]
    if name == "about" and draw.random() < 0.8:
        content, how = _change(json.loads(str(array)), draw)
        arrays[name] = np.array(json.dumps(content))
        how = f"about: {how}"
    else:
        odd: dict[str, Callable[[], Any]] = {
            "gone": lambda: None,
            "without steps": lambda: array[:0],
            "shorter": lambda: array[:-1],
            "a number": lambda: np.array(1.0),
            "text": lambda: np.array([HTML] * 3),
            "many dimensions": lambda: np.zeros((1,) * 20),
            "not finite": lambda: np.full(array.shape, np.nan),
            "infinite": lambda: np.full(array.shape, np.inf, np.float32),
            "float64": lambda: np.zeros(array.shape),
            "large": lambda: np.full(array.shape, 2**62),
            "negative": lambda: np.full(array.shape, -5),
            "narrow": lambda: array[..., :0] if array.ndim else array,
            "empty": lambda: np.zeros(0),
        }
        how = draw.choice(sorted(odd))
        made = odd[how]() if array.ndim or how in ("gone", "a number", "text", "empty") else np.array(RICH)
        del arrays[name]
        if made is not None:
            arrays[draw.choice((name, name, name, "images/" + HTML, "images/../../x"))] = made
        how = f"{name} {how}"
    if draw.random() < 0.1:
        steps = {key: array if array.ndim == 0 else array[:0] for key, array in arrays.items()}
        arrays, how = steps, f"{how}, no steps"
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue(), how


def _rows(whole: bytes, draw: random.Random) -> tuple[bytes, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(io.BytesIO(whole)).to_pylist()
    name = draw.choice(sorted(rows[0]))
    places = range(len(rows)) if draw.random() < 0.5 else [draw.randrange(len(rows))]
    kind, value = draw.random(), draw.choice(ODD)
    for place in places:
        if kind < 0.15:
            rows[place].pop(name)
        elif kind < 0.4 and isinstance(rows[place][name], list):
            rows[place][name] = [value for _ in rows[place][name]]
        elif kind < 0.6 and isinstance(rows[place][name], (int, float)):
            rows[place][name] += draw.choice((1, -1, 0.04, 0.5, 1e9))
        else:
            rows[place][name] = value
    content = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows), content)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, ValueError, TypeError):
        return whole[: draw.randrange(len(whole))], "cut"  # no table can hold that
    return content.getvalue(), f"{name} of {len(places)} rows"


def _rehash(path: Path) -> None:
    """Make the run's identity fit its settings again, and the records beside it, as a user who edits on purpose
    does.
    """
    try:
        content = json.loads(path.read_text())
        content["run"] = run_of(content["identity"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return
    path.write_text(json.dumps(content))
    records = path.with_name("episodes.jsonl")
    lines = [json.loads(line) | {"run": content["run"]} for line in records.read_text().splitlines()]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _subjects(folder: Path) -> list[Subject]:
    run_folder = folder / "run"
    write_run(run_folder, episodes=2, keep=(0.25,), pruned=("drop",), traced=1)
    run_eval(settings(folder / "going on", "nothing", episodes=2), _console(), find_fake)
    made_up_folder(folder / "traces", states=2, tasks=1)
    (folder / "calibration").mkdir()
    _calibration(folder / "calibration" / "found.json", run_folder)
    made = [Subject(run_folder, _report), Subject(run_folder, _merge), Subject(folder / "going on", _go_on)]
    made += [Subject(folder / "traces", _replay), Subject(folder / "calibration", _results)]
    for version, video in (("v2.1", False), ("v3.0", False), ("v3.0", True)):
        made.append(Subject(dataset(folder / f"{version}-{video}", version, video), _replay))
    return made


def _console() -> Console:
    return Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), width=120)


def _report(folder: Path) -> str:
    page = folder.parent / "page.html"
    run_report(folder, page, (), _console())
    return page.read_text()


def _go_on(folder: Path) -> str:
    with tempfile.TemporaryDirectory() as out:
        copied = shutil.copytree(folder, Path(out) / "run")
        run_eval(settings(copied, "nothing", episodes=2, max_errors=0), _console(), find_fake)
    return ""


def _merge(folder: Path) -> str:
    with tempfile.TemporaryDirectory() as out:
        run_merge([folder], Path(out) / "merged", _console())
    return ""


def _replay(folder: Path) -> str:
    for path in folder.glob("traces/*.npz"):
        read_trace(path)
    replay(Drawn(), [], find_recordings(folder, Drawn()))
    return ""


def _results(folder: Path) -> str:
    found = Calibration.read(folder / "found.json")
    sentences(found, 0.1, agreement(found, [folder]))
    arms_of([folder])
    return ""


def _calibration(path: Path, run_folder: Path) -> None:
    """A calibration of a run's arms, and the run's eval_info.json beside it."""
    with tempfile.TemporaryDirectory() as out:
        run_merge([run_folder], Path(out) / "merged", _console())
        content = json.loads((Path(out) / "merged" / "eval_info.json").read_text())
    path.with_name("eval_info.json").write_text(json.dumps(content))
    arms = []
    for place, arm in enumerate(content["run"]["identity"]["arms"]):
        moved = Estimate(0.1 * place, 0.05 * place, 0.2 * place)
        named = {name: arm[name] for name in ("key", "title", "kind", "method")}
        figures: dict[str, Any] = {"by_dimension": [0.1], "by_episode": [0.1] * 9, "p50_ms": 1.0}
        arms.append(ArmCalibration(**named, moved=moved, moved_in_units=moved, steps=9, pruned_steps=6, **figures))
    found = Calibration(arms, ["a"], [1.0], [], content["run"]["identity"]["weights"])
    path.write_text(json.dumps(found.to_json()))
