"""The cost of a connection for others: places, sockets, open files, and turns of the event loop."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from websockets.protocol import State
from websockets.server import ServerProtocol

from tests.serving.robots import WAIT, observation
from tests.serving.test_server import get, wait_for
from vla_pruner.client import PolicyClient
from vla_pruner.client.codec import pack
from vla_pruner.serving import PolicyServer, ServingError, connections
from vla_pruner.serving import server as server_module
from vla_pruner.serving.connections import MAX_PINGS, Connection, Connections, room

Serve = Callable[..., PolicyServer]


def frame(opcode: int, data: bytes = b"", last: bool = True) -> bytes:
    """Return a frame as clients send it, masked with zeros."""
    size = len(data)
    head = bytes([(0x80 if last else 0) | opcode])
    if size < 126:
        head += bytes([0x80 | size])
    elif size < 2**16:
        head += bytes([0xFE]) + size.to_bytes(2, "big")
    else:
        head += bytes([0xFF]) + size.to_bytes(8, "big")
    return head + bytes(4) + data


def shaken(server: PolicyServer) -> socket.socket:
    """Return a robot's end, after the handshake, that reads nothing more than a test reads."""
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plain.settimeout(WAIT)
    plain.connect(("127.0.0.1", server.port))
    plain.sendall(
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    return plain


def gone(plain: socket.socket) -> bool:
    """Return True if the server has closed the other end, so that writing to it is refused."""
    try:
        while True:
            plain.sendall(frame(10))
            threading.Event().wait(0.02)
    except ConnectionError:
        return True
    except TimeoutError:
        return False


SILENT = 10 * WAIT
"""Seconds between keep-alives: none comes to the server's help."""

LEAVING: dict[str, bytes] = {
    "no msgpack": frame(2, b"\xc1"),
    "a long key": frame(2, pack({"\x01" * 100_000: 1})),
    "an opcode that is none": frame(3),
    "a continuation of nothing": frame(0),
    "a message that is too long": frame(2, bytes(200_000)),
    "too many fragments": frame(2, last=False) + frame(0, last=False) * 5000,
    "text that is none": frame(1, b"\xff\xfe"),
    "a close frame": frame(8, b"\x03\xe8"),
}


@pytest.mark.parametrize("way", LEAVING)
def test_who_stays_after_a_wrong_frame_loses_place_and_socket(way: str, serve: Serve) -> None:
    server = serve(max_robots=1, max_message=150_000, ping_interval=SILENT, ping_timeout=0.3)
    with shaken(server) as plain:
        wait_for(server, "vla_pruner_sessions 1.0")
        plain.sendall(LEAVING[way])
        wait_for(server, "vla_pruner_sessions 0.0")
        assert gone(plain)
    with PolicyClient(server.url) as client:
        assert client.metadata["protocol"] == "openpi"


def test_who_reads_nothing_loses_place_and_socket(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Answers to its pings fill the system's buffer for it; then it is not read, and then it is cut."""
    server = serve(max_robots=1, ping_interval=SILENT, ping_timeout=0.3)
    with shaken(server) as plain:
        wait_for(server, "vla_pruner_sessions 1.0")
        with pytest.raises(ConnectionError):
            while True:
                plain.sendall(frame(9, bytes(125)) * 400)
    wait_for(server, "vla_pruner_sessions 0.0")
    assert "A client reads nothing, and its connection was cut." in caplog.text


def test_a_place_is_free_when_its_socket_is(serve: Serve) -> None:
    """A server of one robot never holds two, even if those it sent away never read why."""
    server = serve(max_robots=1, ping_interval=SILENT, ping_timeout=0.3)
    for _ in range(3):
        with shaken(server) as plain:
            wait_for(server, "vla_pruner_sessions 1.0")
            plain.sendall(LEAVING["a long key"])
            wait_for(server, "vla_pruner_sessions 0.0")
            robots = [one for one in server._connections._open if one.is_robot]
            assert robots == []


def test_idle_connections_are_bounded_and_keep_nobody_out(
    policy: Any, serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "SPARE", 6)
    server = serve(max_robots=2)
    with PolicyClient(server.url, timeout=10 * WAIT) as client:
        client.infer(observation(policy))
        with ExitStack() as stack:
            for _ in range(60):
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            assert get(server, "/healthz")[0] == 200
            with PolicyClient(server.url, timeout=10 * WAIT) as other:
                other.infer(observation(policy))
            client.infer(observation(policy))
            assert client.reconnects == 0
            assert 'refused_connections_total{reason="crowded"} 0.0' not in get(server, "/metrics")[1]
            deadline = time.monotonic() + WAIT
            while len(server._connections) > 8 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(server._connections) <= 8
    cut = [line for line in caplog.messages if "connections are open" in line]
    assert 1 <= len(cut) <= 10  # and not one for each of fifty


@pytest.mark.parametrize(
    ("limit", "used", "asked", "expected"),
    [
        (1024, 30, 64, (64, 128, 61)),
        (64, 20, 64, (14, 20, 2)),
        (256, 30, 100, (110, 158, 13)),
        (resource.RLIM_INFINITY, 30, 64, (64, 128, 64)),
    ],
)
def test_there_is_room_for_as_many_as_files_may_be_open(
    limit: int,
    used: int,
    asked: int,
    expected: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    monkeypatch.setattr(connections, "_open_files", lambda: used)
    robots, most, backlog = room(asked)
    assert (min(robots, asked), most, backlog) == (min(expected[0], asked), *expected[1:])
    if limit > 0:
        assert used + most + 4 * backlog < limit
    assert (robots < asked) == ("files, which is enough for" in caplog.text)


def test_a_server_without_room_is_refused_before_it_warms_up(
    policy: Any, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module.Engine, "open", lambda _: pytest.fail("it was warmed up"))
    used = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (used + 10, used + 10))
    with pytest.raises(ServingError, match=rf"may open {used + 10} files, and .* raise the limit \(ulimit -n\)"):
        serve()


class Transport:
    """Counts what is written, and takes it all."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closing = self.reading = self.aborted = False

    def write(self, data: bytes) -> None:
        assert not self.closing, "asyncio logs a line for each"
        self.written.append(data)

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def set_write_buffer_limits(self, *_: Any) -> None:
        pass

    def abort(self) -> None:
        self.closing = self.aborted = True


def with_a_connection(check: Callable[[Connection, Transport], None]) -> None:
    async def run() -> None:
        async def handler(_: Any) -> None:
            pass

        among = Connections(lambda: None)
        among.most = 1
        server: Any = SimpleNamespace(handler=handler, handler_tasks=set())
        connection = Connection(ServerProtocol(state=State.OPEN), server, among=among, patience=WAIT)
        transport: Any = Transport()
        connection.connection_made(transport)
        connection.request = SimpleNamespace()  # type: ignore[assignment]
        check(connection, transport)
        connection.connection_lost(None)
        assert len(among) == 0
        await asyncio.gather(*server.handler_tasks)

    asyncio.run(run())


def test_who_is_cut_already_does_not_count() -> None:
    """One goes for each that comes, however long the event loop takes to let it go: the first that sent nothing."""

    class Made:
        is_robot = heard = False

        def __init__(self) -> None:
            self.transport = Transport()

    made: Any = Made
    cut: list[None] = []
    among = Connections(lambda: cut.append(None))
    among.most = 3
    all_of_them = [made() for _ in range(3)]
    all_of_them[0].is_robot = True
    all_of_them[1].heard = True
    for one in all_of_them:
        among.came(one)
    assert not cut
    for _ in range(20):
        newest = made()
        all_of_them.append(newest)
        among.came(newest)
        assert not newest.transport.aborted
    assert len(cut) == 20
    kept = [number for number, one in enumerate(all_of_them) if not one.transport.aborted]
    assert kept == [0, 1, 22]
    all_of_them[22].heard = True
    last = made()
    among.came(last)  # all have sent something, such as half of a request
    assert all_of_them[1].transport.aborted
    all_of_them[22].is_robot = last.is_robot = True
    among.came(made())
    assert not any(one.transport.aborted for one in (all_of_them[0], all_of_them[22], last))
    assert len(cut) == 22


def test_pings_are_answered_by_one_write() -> None:
    def check(connection: Connection, transport: Transport) -> None:
        connection.data_received(frame(9, b"?") * MAX_PINGS)
        assert transport.written == [b"\x8a\x01?" * MAX_PINGS]
        assert not transport.aborted

    with_a_connection(check)


def test_nothing_is_written_to_a_peer_that_is_gone() -> None:
    def check(connection: Connection, transport: Transport) -> None:
        transport.closing = True
        for _ in range(100):
            connection.data_received(frame(9))
        assert transport.written == []

    with_a_connection(check)


def test_a_flood_of_pings_is_cut() -> None:
    def check(connection: Connection, transport: Transport) -> None:
        for _ in range(100):
            connection.data_received(frame(9) * 100)
        assert not transport.aborted  # a few at a time do no harm
        connection.data_received(frame(9) * (MAX_PINGS + 1))
        assert transport.aborted

    with_a_connection(check)


def test_who_does_not_read_is_not_read() -> None:
    def check(connection: Connection, transport: Transport) -> None:
        transport.reading = True
        connection.pause_writing()
        assert not transport.reading
        connection.recv_messages.resume()
        assert not transport.reading
        connection.resume_writing()
        assert transport.reading
        assert not connection._cuts

    with_a_connection(check)
