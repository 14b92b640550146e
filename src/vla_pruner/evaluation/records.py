"""One line of JSON an episode, appended so that a crash, a full disk or a cut line loses nothing else."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import os
import reprlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vla_pruner.evaluation.errors import EvaluationError
from vla_pruner.evaluation.units import Unit
from vla_pruner.json_file import listed, load_json, required, typed
from vla_pruner.outputs import replace_file
from vla_pruner.wording import readable

FORMAT = 1
"""The format that each line names. A new field with a default does not change it; a field that means something else
does. Lines from before it was written have none, and are of format 1 as well.
"""

EPISODES = "episodes.jsonl"
PACKED = ".gz"
TERMINATIONS = ("success", "max_steps", "error")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Record:
    """The result of one arm on one unit."""

    run: str
    """Identity of the run's settings; records of two runs do not mix."""
    arm: str
    unit: Unit
    success: bool | None
    """None if the episode crashed: that is no failure of the policy."""
    termination: str
    """One of `TERMINATIONS`."""
    steps: int
    """Actions carried out."""
    control_steps: int
    """Observations that the policy got."""
    sum_reward: float
    max_reward: float
    latency_ms: list[float] = field(default_factory=list)
    """Milliseconds of `act`, one for each control step, without simulation, drawing and preprocessing for the suite."""
    latency_p50_ms: float | None = None
    latency_p99_ms: float | None = None
    visual_tokens: int | None = None
    """Visual tokens of the prompt; None if nothing was attached that counts them."""
    kept_tokens: list[int] = field(default_factory=list)
    """Fewest and most visual tokens kept in a pruned step; empty if none was pruned."""
    pruned_steps: int = 0
    """Control steps in which visual tokens were pruned, or patches of the vision encoder reused."""
    error: dict[str, str] | None = None
    """Type, message and place of a crash."""
    attempt: int = 1
    """The number of this attempt, from 1: one more than the crashes of this arm on this unit before."""
    seconds: float = 0.0
    """Seconds of the whole episode, the environment included."""
    started: str = ""
    worker: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    """Fields unknown to this version; they are written back as they were read."""

    @property
    def key(self) -> tuple[Unit, str]:
        """The unique key of a finished record."""
        return self.unit, self.arm

    @property
    def crashed(self) -> bool:
        return self.termination == "error"

    def to_line(self) -> bytes:
        """One line of JSON, its end included."""
        content = dataclasses.asdict(self)
        unit, others = content.pop("unit"), content.pop("others")
        ordered = {"format": FORMAT, "run": content.pop("run"), "arm": content.pop("arm"), **unit, **content, **others}
        return (json.dumps(ordered, allow_nan=False) + "\n").encode()

    @classmethod
    def from_line(cls, line: bytes) -> Record:
        """Read `to_line`, of this version, of an earlier one, or of a later one that only has more fields.

        Raises:
            ValueError: it is no record, or of a later format; the message says why.
        """
        content = load_json(line)
        if not isinstance(content, dict):
            raise ValueError("it holds no record")
        found = content.pop("format", FORMAT)
        if type(found) is not int or not 1 <= found <= FORMAT:
            raise ValueError(f"its format is {reprlib.repr(found)}, and this version of vla-pruner reads {FORMAT}")
        of_unit = {one.name for one in dataclasses.fields(Unit)}
        known = {one.name for one in dataclasses.fields(cls)} - {"unit", "others"} | of_unit
        missing = sorted((required(cls) - {"unit"} | of_unit) - set(content))
        if missing:
            raise ValueError(f"the fields {listed(missing)} are missing")
        content["others"] = {name: content.pop(name) for name in sorted(set(content) - known)}
        if isinstance(content.get("error"), dict):  # the text of a third-party exception may not be writable
            content["error"] = {
                name: readable(said) if isinstance(said, str) else said for name, said in content["error"].items()
            }
        content["unit"] = {name: content.pop(name) for name in of_unit}
        record = typed(cls, content, "the record")
        record.check()
        return record

    def check(self) -> None:
        """Refuse values that no episode has.

        Raises:
            ValueError: it names one of them.
        """
        if self.termination not in TERMINATIONS:
            raise ValueError(f"its termination is {self.termination!r}")
        ended = {"success": True, "max_steps": False, "error": None}[self.termination]
        if self.success is not ended:
            raise ValueError(f"its success is {self.success!r}, and its termination {self.termination!r}")
        if self.crashed != (self.error is not None):
            raise ValueError(f"its termination is {self.termination!r}, and its error {self.error!r}")
        if self.error is not None and not {"type", "message", "where"} <= set(self.error):
            raise ValueError("its error lacks a type, a message or where it came from")
        self.unit.check()
        least = {name: getattr(self, name) for name in ("steps", "control_steps", "pruned_steps", "seconds")}
        least |= {"visual_tokens": self.visual_tokens or 0, "attempt": self.attempt - 1}
        least |= {name: min(getattr(self, name), default=0) for name in ("latency_ms", "kept_tokens")}
        odd = [name for name, value in least.items() if value < 0]
        if odd:
            raise ValueError(f"its {odd[0]} is too small")
        if len(self.kept_tokens) not in (0, 2):
            raise ValueError(f"its kept_tokens are {self.kept_tokens}, not the fewest and the most")


TIMES = ("latency_ms", "latency_p50_ms", "latency_p99_ms", "seconds", "started", "worker")
"""Fields of a record that differ when the same episode runs again."""


class RecordFile:
    """A run's records, opened by one process at a time; every append is on the disk when it returns.

    Args:
        path: the file; made if absent.

    Attributes:
        records: those that it held when it was opened, in order, and those appended since.
        torn: bytes of a last line that was cut off, and is gone; its episode runs again.

    Raises:
        EvaluationError: another process writes to it, it cannot be opened, or a line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise EvaluationError(f"{path} cannot be opened ({error.strerror}); choose another --out.") from error
        try:
            self._lock()
            content = path.read_bytes()
            self._end = content.rfind(b"\n") + 1
            self.torn = len(content) - self._end
            self.records = read_lines(path, content[: self._end])
            if self.torn:
                os.ftruncate(self._file, self._end)
            os.fsync(self._file)
            _sync_folder(path.parent)
        except BaseException:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EvaluationError(
                f"Another run is writing to {self.path} at this moment; wait for it, end it, or choose another --out."
            ) from error

    def append(self, record: Record) -> None:
        """Add a record, wholly or not at all.

        Raises:
            EvaluationError: it could not be written; the file is as before.
        """
        try:
            line = record.to_line()
        except ValueError as error:
            raise EvaluationError(
                f"The record of {record.arm} on {record.unit} holds a number that is not finite, and was not written."
            ) from error
        try:
            written = os.write(self._file, line)
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._end)
            what = "the disk is full" if error.errno in _FULL else error.strerror
            raise EvaluationError(
                f"{self.path} cannot be written to ({what}). The {len(self.records)} episodes before are safe: make "
                "room and give the same command again to continue."
            ) from error
        self._end += len(line)
        self.records.append(record)

    def close(self) -> None:
        """Let other processes write."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()


def read_records(path: Path) -> list[Record]:
    """A run's records, without those of a last line that was cut off. If the file is not there, the same packed by gzip
    is read.

    Raises:
        EvaluationError: there are none, or a line is damaged.
    """
    if not path.exists() and packed(path).exists():
        path = packed(path)
    try:
        content = path.read_bytes()
        if path.suffix == PACKED:
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise EvaluationError(f"{path} cannot be read ({reason}); give the folder of an evaluation.") from error
    return read_lines(path, content[: content.rfind(b"\n") + 1])


def packed(path: Path) -> Path:
    """Return the path of a run's packed records: this project publishes its own so."""
    return path.with_name(path.name + PACKED)


def read_lines(path: Path, content: bytes) -> list[Record]:
    """Read whole lines; see `read_records`."""
    records = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            records.append(Record.from_line(line))
        except (ValueError, TypeError) as error:
            raise EvaluationError(
                f"Line {number} of {path} is damaged ({error}). Nothing was changed: restore the line, or delete it "
                "and give the same command again, which runs its episode again."
            ) from error
    return records


def latest(records: Iterable[Record], where: str) -> dict[tuple[Unit, str], Record]:
    """Return the record that counts for every unit and arm: the finished one, or else the last crash.

    Args:
        where: the records' source, for the message.

    Raises:
        EvaluationError: one finished twice.
    """
    found: dict[tuple[Unit, str], Record] = {}
    for record in records:
        before = found.get(record.key)
        if before is not None and not before.crashed:
            if record.crashed:
                continue
            raise EvaluationError(
                f"{where} holds two records of {record.arm} on {record.unit}; an episode counts once. Remove one of "
                "them, or give each run a folder of its own."
            )
        found[record.key] = record
    return found


def check_run(records: Iterable[Record], run: str, where: str) -> None:
    """Refuse records of other settings.

    Raises:
        EvaluationError: a record belongs to another run.
    """
    other = next((record for record in records if record.run != run), None)
    if other is not None:
        raise EvaluationError(
            f"{where} holds a record of {other.arm} on {other.unit} from a run with other settings ({other.run}, not "
            f"{run}); results of two settings do not mix. Give this run a folder of its own with --out."
        )


def _sync_folder(folder: Path) -> None:
    """Sync a folder, so that a new file's name is on the disk too."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file at once: a reader finds the old one or the new one.

    Raises:
        EvaluationError: it could not be written; the old file is as before.
    """
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Do as `write_json`, with text; lone surrogates in it are written as escapes."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Do as `write_json`, with bytes."""
    try:
        replace_file(path, content)
    except OSError as error:
        what = "the disk is full" if error.errno in _FULL else error.strerror
        raise EvaluationError(
            f"{path} cannot be written ({what}). The episodes are safe: make room and give the same command again."
        ) from error
