"""A session serves one thread at a time: who runs a control step is left alone until it is over."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vla_pruner.errors import SessionError

BUSY = (
    "A control step of this policy is running in another thread, and a session serves one thread at a time. Take turns "
    "(a lock around each step, or one worker that all threads hand their observations to), or load a policy for each "
    "thread."
)


class Turn:
    """Which thread is within a control step, if any.

    A policy's own call holds the turn from beginning to end, and within it, or alone where a model is called by hand,
    each call of the decoder or an expert does.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._depth = 0
        self._calling = False

    def check(self) -> None:
        """Raise SessionError if another thread is within a control step."""
        with self._lock:
            self._check()

    @contextmanager
    def step(self) -> Iterator[bool]:
        """Within a policy's own call; gives whether it is the outermost one.

        Raises:
            SessionError: another thread is within a control step.
        """
        self._take(1, False)
        try:
            yield self._depth == 1
        finally:
            with self._lock:
                self._depth -= 1
                # What an interrupt left behind ends with the policy's call.
                self._calling = self._calling and self._depth > 0

    def begin_call(self) -> None:
        """A call of the decoder or an expert begins in this thread.

        Raises:
            SessionError: another thread is within a control step.
        """
        self._take(0, True)

    def end_call(self) -> None:
        """The call came back, or failed."""
        with self._lock:
            if self._thread is threading.current_thread():
                self._calling = False

    def _take(self, deeper: int, calling: bool) -> None:
        with self._lock:
            self._check()
            if self._thread is not threading.current_thread():
                # Its thread ended without a word, or nobody had the turn.
                self._thread, self._depth, self._calling = threading.current_thread(), 0, False
            self._depth += deeper
            self._calling = self._calling or calling

    def _check(self) -> None:
        holder = self._thread
        taken = holder is not None and (self._depth > 0 or self._calling) and holder.is_alive()
        if taken and holder is not threading.current_thread():
            raise SessionError(BUSY)
