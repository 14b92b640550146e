"""Robots that vanish, stall, send garbage or flood cost themselves alone, and leave nothing behind."""

from __future__ import annotations

import gc
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.serving.robots import WAIT, Gated, observation
from tests.serving.test_server import wait_for
from vla_pruner.client import PolicyClient
from vla_pruner.client.codec import pack
from vla_pruner.serving import PolicyServer

Serve = Callable[..., PolicyServer]


@contextmanager
def honest(server: PolicyServer, policy: Any) -> Iterator[list[int]]:
    """A robot that drives on while the others misbehave: every action must be the one that it gets in peace, on one
    connection.
    """
    done: list[int] = []
    stop = threading.Event()
    failures: list[BaseException] = []
    with PolicyClient(server.url, timeout=10 * WAIT) as client:
        peace = [client.infer(observation(policy, 0, step))["actions"] for step in range(6)]

    def drive() -> None:
        try:
            with PolicyClient(server.url, timeout=10 * WAIT) as client:
                while not stop.is_set():
                    for step in range(6):
                        found = client.infer(observation(policy, 0, step, reset=step == 0))["actions"]
                        assert np.array_equal(found, peace[step])
                        done.append(step)
                assert client.reconnects == 0
        except BaseException as error:
            failures.append(error)

    robot = threading.Thread(target=drive)
    robot.start()
    try:
        yield done
    finally:
        stop.set()
        robot.join(WAIT)
    assert not failures, failures
    assert len(done) >= 6


def raw(server: PolicyServer, **options: Any) -> Any:
    return connect(server.url, compression=None, max_size=None, open_timeout=WAIT, **options)


def test_clients_that_vanish(policy: Any, serve: Serve) -> None:
    """Without a goodbye: before the handshake, after it, in the middle of a message, and before the answer."""
    server = serve(ping_timeout=10 * WAIT)
    with honest(server, policy):
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", server.port)) as plain:
                plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
            client = raw(server).__enter__()
            client.recv(timeout=WAIT)
            client.socket.close()
            client = raw(server).__enter__()
            message = pack(observation(policy))
            client.socket.sendall(bytes([0x82, 0xFE, *len(message).to_bytes(2, "big"), 0, 0, 0, 0]) + message[:1000])
            client.socket.close()
            client = raw(server).__enter__()
            client.send(message)
            client.socket.close()
        wait_for(server, "vla_pruner_sessions 1.0")


class Counted(Gated):
    """Counts its steps."""

    acts = 0

    def act(self, *args: Any, **kwargs: Any) -> np.ndarray:
        self.acts += 1
        return super().act(*args, **kwargs)


def test_a_robot_that_leaves_gives_its_place_up(policy: Any, serve: Serve) -> None:
    """Its place among the robots and in the queue, and the forward pass: both before its step begins and during it."""
    counted = Counted(policy)
    server = serve(policy=counted, max_waiting=1, max_robots=2, max_batch=1)
    before = counted.acts
    with raw(server) as first:
        first.recv(timeout=WAIT)
        first.send(pack(observation(policy)))
        assert counted.entered.wait(WAIT)
        for _ in range(3):  # each finds room among the robots and in the queue, which have one place
            with raw(server) as leaving:
                leaving.recv(timeout=WAIT)
                leaving.send(pack(observation(policy)))
                wait_for(server, "vla_pruner_queue_depth 1.0")
            wait_for(server, "vla_pruner_sessions 1.0")
            wait_for(server, "vla_pruner_queue_depth 0.0")
    wait_for(server, "vla_pruner_sessions 0.0")
    wait_for(server, 'requests_total{outcome="left"} 4.0')
    counted.gate.set()
    with PolicyClient(server.url) as client:
        assert client.infer(observation(policy))["actions"].shape == (1, 4)
    assert counted.acts == before + 2


def test_clients_that_stall_are_dropped(policy: Any, serve: Serve) -> None:
    """One that answers no ping is gone after a while; the memory of its robot, too."""
    server = serve(ping_interval=0.2, ping_timeout=2.0)
    # A socket that shakes hands and then neither reads nor answers.
    with socket.create_connection(("127.0.0.1", server.port)) as plain:
        plain.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        wait_for(server, "vla_pruner_sessions 1.0")
        wait_for(server, "vla_pruner_sessions 0.0")
    with PolicyClient(server.url, timeout=10 * WAIT) as client:
        client.infer(observation(policy))


def test_clients_that_flood(policy: Any, serve: Serve) -> None:
    """Far more messages than are answered, and no answer read: the server stops reading them, and the others drive."""
    gated = Gated(policy)
    quiet = 10 * WAIT  # a keep-alive would fall into the middle of a frame below
    server = serve(policy=gated, ping_interval=quiet, ping_timeout=quiet)
    message = pack(observation(policy, 1))
    frame = bytes([0x82, 0xFE, *len(message).to_bytes(2, "big"), 0, 0, 0, 0]) + message  # masked with zeros
    far_too_much = 1 << 28  # bytes: a kernel takes some 40 MB before it blocks
    refused: list[int] = []

    def flood(client: Any) -> None:
        written = 0
        # It gives up when the server has not read for a second.
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 1, 0))
        try:
            while written < far_too_much:
                client.socket.sendall(100 * frame)
                written += 100 * len(frame)
        except OSError:
            refused.append(written)

    with ExitStack() as stack:
        clients = [stack.enter_context(raw(server, max_queue=1, ping_interval=None, close_timeout=0)) for _ in range(4)]
        floods = [threading.Thread(target=flood, args=(client,)) for client in clients]
        for thread in floods:
            thread.start()
        for thread in floods:
            thread.join(WAIT)
        # The server holds no unread message: it stays with the sender.
        assert len(refused) == 4
        gated.gate.set()
        with honest(server, policy) as done:
            deadline = time.monotonic() + WAIT
            while len(done) < 12 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(done) >= 12
    wait_for(server, "vla_pruner_sessions 0.0")


def test_clients_that_send_garbage(policy: Any, serve: Serve) -> None:
    """On the wire: frames that are none, messages that are none, and requests that are none (the ten thousands are in
    test_codec and test_observations).
    """
    server = serve(ping_timeout=10 * WAIT)
    random = np.random.default_rng(3)
    whole = pack(observation(policy))
    with honest(server, policy):
        for case in range(60):
            if case % 3 == 0:  # the bytes of a port scanner
                with socket.create_connection(("127.0.0.1", server.port)) as plain:
                    plain.sendall(random.bytes(int(random.integers(1, 3000))))
                continue
            with raw(server) as client:
                client.recv(timeout=WAIT)
                data = bytearray(whole)
                for place in random.integers(0, 300, 6):
                    data[place] = random.integers(0, 256)
                if case % 3 == 1:
                    client.send(bytes(data))
                    try:
                        client.recv(timeout=WAIT)
                    except ConnectionClosed:
                        pytest.fail("an answer or an error comes before the end")
                else:
                    client.socket.sendall(random.bytes(200))  # no frames of websockets
        wait_for(server, "vla_pruner_sessions 1.0")


def resident() -> float:
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(server: PolicyServer, policy: Any, until: Callable[[int], bool]) -> list[float]:
    """Run robots that come, drive an episode or two and go, some of them rudely, until `until` is true; return the
    memory used on the way.
    """
    used: list[float] = []
    round_ = 0
    while not until(round_):
        with honest(server, policy):
            clients = []
            for robot in range(3):
                client = raw(server).__enter__()
                client.recv(timeout=WAIT)
                client.send(pack(observation(policy, robot, round_)))
                clients.append(client)
            with PolicyClient(server.url, timeout=10 * WAIT) as client:
                for step in range(4):
                    client.infer(observation(policy, round_ % 50, step))
            clients[0].socket.shutdown(socket.SHUT_RDWR)
            clients[1].recv(timeout=WAIT)
            clients[1].send(b"garbage")
            for client in clients[1:]:
                client.close()
        gc.collect()
        used.append(resident())
        round_ += 1
    return used


def test_soak(policy: Any, serve: Serve) -> None:
    server = serve(ping_timeout=10 * WAIT)
    threads = threading.active_count() + 1  # the one that reads messages begins with the first of them
    used = soak(server, policy, lambda rounds: rounds >= 8)
    wait_for(server, "vla_pruner_sessions 0.0")
    assert not server._robots
    for thread in threading.enumerate():
        if "recv_events" in thread.name or "keepalive" in thread.name:  # the tests' own, of connections that ended
            thread.join(5.0)
    assert threading.active_count() <= threads
    assert used[-1] - used[2] < 30, used


@pytest.mark.soak
def test_ten_minutes_with_flat_memory(request: pytest.FixtureRequest, policy: Any, serve: Serve) -> None:
    """`pytest -m soak tests/serving`: after the first tenth, memory does not grow."""
    if "soak" not in request.config.option.markexpr:
        pytest.skip("ten minutes; pytest -m soak runs it")
    server = serve(ping_timeout=10 * WAIT)
    end = time.monotonic() + 60 * float(os.environ.get("SOAK_MINUTES", "10"))
    used = soak(server, policy, lambda _: time.monotonic() > end)
    tenth = max(1, len(used) // 10)
    early, late = np.median(used[tenth : 2 * tenth]), np.median(used[-tenth:])
    print(f"{len(used)} rounds; {early:.1f} MiB early, {late:.1f} MiB late, {max(used[tenth:]):.1f} at most")
    assert late < early + 20
    wait_for(server, "vla_pruner_sessions 0.0")
