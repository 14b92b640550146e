"""The server's log: entries that clients cause are short, on lines of their own, and cannot flood it."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vla_pruner.wording import one_line

_LONGEST = 500


class Escaped(str):
    """Text of several lines, each of which is escaped already."""


class Sparing(logging.Filter):
    """Escapes the arguments of records, and lets through a few of each kind: those with the same text before anything
    is put into it. The first one after a flood says how many were left out.

    Args:
        most: records of a kind within `seconds`.
        seconds: as above.
        clock: returns the seconds.
    """

    def __init__(self, most: int = 10, seconds: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._most, self._seconds, self._clock = most, seconds, clock
        self._counts: dict[str, tuple[float, int]] = {}  # the start of the window, and the number of records in it
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True if the record is written."""
        kind, now, left_out = str(record.msg), self._clock(), 0
        with self._lock:
            since, count = self._counts.get(kind, (now, 0))
            if now - since >= self._seconds:
                left_out, since, count = max(0, count - self._most), now, 0
            self._counts[kind] = since, count + 1
        if count >= self._most:
            return False
        if isinstance(record.args, tuple):
            record.args = tuple(_harmless(value) for value in record.args)
        if left_out:
            record.msg = f"{kind} ({left_out} more like it were left out.)"
        return True


def traceback_of(error: BaseException) -> Escaped:
    """Return the traceback, indented and escaped line by line: none of its lines can be taken for one of the log's."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return Escaped("\n".join(f"    {one_line(line)}" for line in lines))


def _harmless(value: object) -> object:
    return value if isinstance(value, (int, float, Escaped)) else one_line(str(value))[:_LONGEST]


log = logging.getLogger("vla_pruner.serving")
log.addFilter(Sparing())


@contextmanager
def told_operator() -> Iterator[None]:
    """Write news of a server that runs well, such as the episodes of its robots, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before
