"""All connections of a server: their number, and the end of those that do not read or do not leave."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import Opcode

from vla_pruner.serving.errors import ServingError
from vla_pruner.serving.logs import log

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None

SPARE = 64
"""Connections besides those of robots: health, metrics, and handshakes that are not done."""
READ_AT_ONCE = 65_536
"""The bytes of one connection that are read before another has its turn."""
MAX_PINGS = 1_000
"""Pings among bytes that are read at once."""
_BACKLOG = 64
"""Connections that the system holds until they are accepted, and that are accepted at once."""
_OTHER_FILES = 16
"""The file descriptors for other files that the process opens meanwhile."""


class Connections:
    """The connections of one server.

    Args:
        turned_away: called for each that is cut since there are too many.

    Attributes:
        most: their largest number. For one more, an older one that is no robot's is cut: the oldest that has sent
            nothing, or the oldest; if there is none, the new one.
    """

    def __init__(self, turned_away: Callable[[], None]) -> None:
        self.most = 0
        self._turned_away = turned_away
        self._open: dict[Connection, None] = {}  # in the order they came

    def __len__(self) -> int:
        return len(self._open)

    def came(self, connection: Connection) -> None:
        """Add a connection."""
        self._open[connection] = None
        staying = [one for one in self._open if not one.transport.is_closing()]
        if len(staying) <= self.most:
            return
        others = [one for one in staying if not one.is_robot and one is not connection]
        found = next((one for one in others if not one.heard), others[0] if others else connection)
        self._turned_away()
        log.warning("%d connections are open, which is as many as this server takes; one was cut.", self.most)
        found.transport.abort()

    def left(self, connection: Connection) -> None:
        """Remove a connection."""
        self._open.pop(connection, None)

    def abort(self) -> None:
        """Cut all."""
        for connection in list(self._open):
            connection.transport.abort()


class Connection(ServerConnection):
    """A connection that is cut if its client does not read for a while, or does not leave in time.

    Args:
        among: the connections that it is one of.
        patience: seconds for which the client may leave messages unread.

    Attributes:
        is_robot: whether it holds a place among the robots.
        heard: whether any data came.
    """

    def __init__(self, *args: Any, among: Connections, patience: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self.is_robot = self.heard = False
        self._among, self._patience = among, patience
        self._cuts: dict[str, asyncio.TimerHandle] = {}
        self._pings = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if hasattr(transport, "max_size"):  # of asyncio's transport without TLS, 256 KiB else
            transport.max_size = READ_AT_ONCE
        self.recv_messages.resume = self._read_on
        self._among.came(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._among.left(self)
        for cut in self._cuts.values():
            cut.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.heard, self._pings = True, 0
        super().data_received(data)
        if self._pings > MAX_PINGS:
            log.warning("A client sent %d pings at once, and its connection was cut.", self._pings)
            self.transport.abort()
        elif self.close_deadline is not None:
            self._cut_at("stays", self.close_deadline)

    def process_event(self, event: Any) -> None:
        super().process_event(event)
        self._pings += getattr(event, "opcode", None) is Opcode.PING

    def send_data(self) -> None:
        # In one piece. The library writes frame by frame, and asyncio logs each write to a peer that is gone.
        pieces = self.protocol.data_to_send()
        if self.transport.is_closing():
            return
        data = b"".join(pieces)
        if data:
            self.transport.write(data)
        if any(not piece for piece in pieces):  # the end
            if self.transport.can_write_eof():
                with suppress(OSError, RuntimeError):
                    self.transport.write_eof()
            else:
                self.transport.close()

    def pause_writing(self) -> None:
        # Pings are answered by writing: a client that reads no answers is not read, either.
        super().pause_writing()
        self.transport.pause_reading()
        self._cut_at("reads nothing", self.loop.time() + self._patience)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cuts.pop("reads nothing").cancel()
        if not self.recv_messages.paused:
            self.transport.resume_reading()

    def _read_on(self) -> None:
        if not self.paused:
            self.transport.resume_reading()

    def _cut_at(self, why: str, when: float) -> None:
        if why not in self._cuts:
            self._cuts[why] = self.loop.call_at(when, self._cut, why)

    def _cut(self, why: str) -> None:
        log.warning("A client %s, and its connection was cut.", why)
        self.transport.abort()


def room(max_robots: int) -> tuple[int, int, int]:
    """Return the numbers of robots, connections and connections accepted at once for which file descriptors suffice.

    Args:
        max_robots: the wanted number of robots.

    Raises:
        ServingError: there is room for none.
    """
    limit = None if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit is None or limit < 0:  # none, or infinite
        return max_robots, max_robots + SPARE, _BACKLOG
    free = limit - _open_files() - _OTHER_FILES
    backlog = min(_BACKLOG, max(2, free // 16))
    # The number of accepted connections is known some rounds of the event loop later, and cut again one later.
    most = min(max_robots + SPARE, free - 4 * backlog)
    if most < 4:
        raise ServingError(
            f"This process may open {limit} files, and {limit - _OTHER_FILES - free} are open, so that no robot could "
            "connect; raise the limit (ulimit -n)."
        )
    robots = min(max_robots, most - min(SPARE, most // 3))
    if robots < max_robots:
        log.warning(
            "This process may open %d files, which is enough for %d of %d robots (--max-robots); raise the limit "
            "(ulimit -n) for the others.",
            limit,
            robots,
            max_robots,
        )
    return robots, most, backlog


def _open_files() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 32  # if that folder is not mounted: no less than such a process has
