"""A session serves one thread at a time: no other thread interferes with a control step until it is over."""

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
    """The thread that is within a control step, if any.

    A policy's own call holds the turn from beginning to end, and within it, or alone if a model is called by hand, each
    call of the decoder or an expert does.
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
        """Hold the turn within a policy's own call; yield True if it is the outermost one.

        Raises:
            SessionError: another thread is within a control step.
        """
        self._take(1, False)
        try:
            yield self._depth == 1
        finally:
            with self._lock:
                self._depth -= 1
                # A call that an interrupt left open ends with the policy's call.
                self._calling = self._calling and self._depth > 0

    def begin_call(self) -> None:
        """Begin a call of the decoder or an expert in this thread.

        Raises:
            SessionError: another thread is within a control step.
        """
        self._take(0, True)

    def end_call(self) -> bool:
        """End the call, which came back or failed; return True if this thread had the turn."""
        with self._lock:
            own = self._thread is threading.current_thread()
            if own:
                self._calling = False
            return own

    def _take(self, deeper: int, calling: bool) -> None:
        with self._lock:
            self._check()
            if self._thread is not threading.current_thread():
                # Its thread ended without `end_call`, or no thread had the turn.
                self._thread, self._depth, self._calling = threading.current_thread(), 0, False
            self._depth += deeper
            self._calling = self._calling or calling

    def _check(self) -> None:
        holder = self._thread
        taken = holder is not None and (self._depth > 0 or self._calling) and holder.is_alive()
        if taken and holder is not threading.current_thread():
            raise SessionError(BUSY)
