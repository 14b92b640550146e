"""Limits of messages and policies: they must not hold up others, drive on after the stop, spoil the log, or move a
robot by numbers that are not finite.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from websockets import exceptions
from websockets.exceptions import ConnectionClosed

import vla_pruner as vp
from tests.serving.robots import WAIT, Failing, Gated, observation, seen
from tests.serving.test_server import ends_with, get, raw
from vla_pruner.client.codec import pack, unpack
from vla_pruner.serving import PolicyServer, ServingError, engine
from vla_pruner.serving import server as server_module
from vla_pruner.serving.command import _check_installed
from vla_pruner.serving.logs import Sparing, traceback_of
from vla_pruner.serving.observations import reader_of
from vla_pruner.serving.settings import ServerSettings
from vla_pruner.strangers import shown
from vla_pruner.wording import one_line

Serve = Callable[..., PolicyServer]


def test_the_event_loop_goes_on_while_a_message_is_read(
    policy: Any, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Health, pings and another robot's answer do not wait for it."""
    readers, held, gate = [], threading.Event(), threading.Event()

    def slow(data: bytes) -> Any:
        readers.append(threading.current_thread().name)
        found = unpack(data)
        if "hold" in found:
            held.set()
            assert gate.wait(WAIT)
        return found

    monkeypatch.setattr(server_module, "unpack", slow)
    gated = Gated(policy)
    server = serve(policy=gated)
    try:
        with raw(server) as robot, raw(server) as long:
            for socket_ in (robot, long):
                socket_.recv(timeout=WAIT)
            robot.send(pack(observation(policy)))
            assert gated.entered.wait(WAIT)
            long.send(pack(observation(policy, 1, hold=True)))
            assert held.wait(WAIT)
            for _ in range(5):
                assert get(server, "/healthz")[0] == 200
                assert long.ping().wait(WAIT)
            gated.gate.set()
            assert unpack(robot.recv(timeout=WAIT))["actions"].shape == (1, 4)
            gate.set()
            assert unpack(long.recv(timeout=WAIT))["actions"].shape == (1, 4)
    finally:
        gate.set()
    assert len(readers) == 2
    assert all(name.startswith("vla-pruner-decoder") for name in readers)


def test_a_robot_is_answered_once_after_the_stop(policy: Any, serve: Serve) -> None:
    """Also one that has sent more ahead."""
    gated = Gated(policy)
    server = serve(policy=gated)
    with raw(server) as eager:
        eager.recv(timeout=WAIT)
        for step in range(20):
            eager.send(pack(observation(policy, 0, step)))
        assert gated.entered.wait(WAIT)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        while server._stopping is None or not server._stopping.is_set():
            threading.Event().wait(0.01)
        gated.gate.set()
        assert unpack(eager.recv(timeout=WAIT))["actions"].shape == (1, 4)
        with pytest.raises(ConnectionClosed):
            eager.recv(timeout=WAIT)
        assert eager.close_code == 1001
        stopping.join(WAIT)


def test_wrong_keys_are_in_the_log_and_no_key_is(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(api_key="s3cret")
    assert get(server, "/metrics")[0] == 401
    assert get(server, "/metrics", Authorization="Api-Key gue55")[0] == 401
    for _ in range(40):
        assert get(server, "/metrics", Authorization="Api-Key gu\xe955")[0] == 401  # not of ASCII
    assert caplog.messages[0] == "A connection from 127.0.0.1 was refused, since it came with no key."
    assert caplog.messages[1] == "A connection from 127.0.0.1 was refused, since it came with a wrong key."
    assert len(caplog.messages) == 10
    assert "gue55" not in caplog.text
    assert "s3cret" not in caplog.text


def test_headers_that_come_twice_are_answered(serve: Serve) -> None:
    server = serve()
    with socket.create_connection(("127.0.0.1", server.port)) as plain:
        plain.settimeout(WAIT)
        plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nConnection: keep-alive\r\n\r\n")
        assert plain.recv(100).startswith(b"HTTP/1.1 404")


def test_the_log_has_no_control_characters(policy: Any, serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """This holds for any part of a message in an error, whichever code raises it."""
    failing = Failing(policy)
    server = serve(policy=failing)
    for kind in (ServingError, RuntimeError):
        failing.error = kind("sing\x1b[2J\nWARNING all is well\u202e")
        with raw(server) as robot:
            robot.recv(timeout=WAIT)
            robot.send(pack(observation(policy)))
            ends_with(robot)
    ours, *others = caplog.messages
    assert ours == "A control step of robot 1 failed: sing\\x1b[2J\\nWARNING all is well\\u202e"
    assert others[0].startswith("A control step failed:\n    Traceback")
    assert all(line.startswith("    ") for line in others[0].split("\n")[1:])
    assert all(line.isprintable() for message in caplog.messages for line in message.split("\n"))


def test_errors_are_short(policy: Any, serve: Serve) -> None:
    server = serve()
    wrong: list[Any] = [
        {f"{number:03d}" + "\U000e0001" * 60: 1 for number in range(200)},
        {**observation(policy), "observation/state": ["\x01" * 60_000] * 20},
        {**observation(policy), "prompt": ["\x01" * 60_000]},
        {**observation(policy), "reset": [["\x01" * 60_000]]},
        {**observation(policy), "prompt": "\x01" * 1999},
    ]
    for message in wrong:
        with raw(server) as robot:
            robot.recv(timeout=WAIT)
            robot.send(pack(message))
            assert len(ends_with(robot)[0]) <= 1000


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_flood_of_records_is_thinned() -> None:
    clock = Clock()
    sparing = Sparing(3, 10.0, clock)

    def record(text: str, *values: object) -> tuple[bool, str]:
        made = logging.LogRecord("x", logging.WARNING, "x", 1, text, values, None)
        return sparing.filter(made), made.getMessage()

    passed = [record("%s came", number)[0] for number in range(1000)]
    assert passed == [True] * 3 + [False] * 997
    assert record("another kind") == (True, "another kind")
    clock.now = 10.0
    assert record("%s came", "a\x1b[0m\n") == (True, "a\\x1b[0m\\n came (997 more like it were left out.)")
    assert record("%s came", "b" * 10_000)[1] == "b" * 500 + " came"


def test_tracebacks_are_lines_of_their_own() -> None:
    try:
        raise RuntimeError("bad\nWARNING all is well\x1b[2J")
    except RuntimeError as error:
        found = traceback_of(error)
    assert "\x1b" not in found
    assert all(line.startswith("    ") for line in found.split("\n"))


def test_what_strangers_send_is_shown_short_and_on_one_line() -> None:
    for value in ("a" * 10**7, b"\0" * 10**7, [["\x01" * 10**7]], {"k" * 10**6: 1}, np.zeros(10**6), 2**64):
        assert len(shown(value)) <= 80
        assert one_line(shown(value)) == shown(value)


def test_weights_that_are_no_numbers_are_not_served(policy: Any, serve: Serve) -> None:
    """The most likely token of outputs that are not finite is a valid one, and its action is finite."""
    with torch.no_grad():
        policy.language_model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ServingError, match=r"weights '.*' hold numbers that are not finite"):
        serve()
    assert not any("forward" in vars(part) for part in policy.modules())
    engine.check_weights(vp.random_policy("reference", "tiny"))


def test_a_timer_that_fails_leaves_no_session_behind(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = engine.Engine(policy, vp.VLAPruner(keep=0.25, preset="paper"), reader_of(policy), ServerSettings())
    opened.open()

    def fail(*_: Any) -> None:
        raise RuntimeError("the timer failed")

    timer: Any = opened._timer
    remove = timer._replaced.remove
    monkeypatch.setattr(timer._replaced, "remove", lambda: fail(remove()))
    with pytest.raises(RuntimeError, match="the timer failed"):
        opened.close()
    assert not vp.detach(policy)


def test_a_layout_makes_no_number_of_what_is_none(policy: Any) -> None:
    """Nor the other way round."""
    failing = Failing(policy)
    for endless, change in ((True, np.nan_to_num), (False, lambda chunk: chunk * np.nan)):
        reader = reader_of(failing)
        failing.endless = False
        made = engine.Engine(failing, None, reader, ServerSettings())
        made.open()
        failing.endless, made.reader = endless, replace(reader, actions=change)
        try:
            (answer,) = made.run([engine.Job(engine.Robot(1), seen(policy))])
        finally:
            made.close()
        assert isinstance(answer, ServingError)
        assert "not finite" in str(answer)


def test_a_websockets_without_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _check_installed()
    monkeypatch.delattr(exceptions, "TooManyFragments")
    with pytest.raises(ServingError, match=r"needs websockets 17\.4 or later, and .* is installed"):
        _check_installed()
