"""The client: small, patient, and of the same type as the policy that it wraps."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve as websocket_server

import vla_pruner as vp
from tests.serving.robots import WAIT, Gated, instruction, observation
from vla_pruner.client import ActionChunkBroker, ClientError, CodecError, ConnectionLost, PolicyClient, ServerError
from vla_pruner.client.codec import pack
from vla_pruner.serving import PolicyServer, ServerSettings

Serve = Callable[..., PolicyServer]


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'safetensors', 'rich', "
        "'prometheus_client'])); import vla_pruner.client as c; c.PolicyClient; "
        "print(c.codec.unpack(c.codec.pack({'a': 1})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT)
    assert done.stdout == "{'a': 1}\n", done.stderr


class Chunks:
    """Infers chunks of three actions, numbered."""

    def __init__(self) -> None:
        self.asked = self.resets = 0

    def infer(self, observation: Any) -> dict[str, Any]:
        self.asked += 1
        return {"actions": 10 * self.asked + np.arange(3)[:, None], "server_timing": {"infer_ms": 1.0}}

    def reset(self) -> None:
        self.resets += 1


def test_a_broker_hands_out_one_action_at_a_time() -> None:
    policy = Chunks()
    broker = ActionChunkBroker(policy, 2)
    found = [broker.infer({}) for _ in range(5)]
    assert [result["actions"].tolist() for result in found] == [[10], [11], [20], [21], [30]]
    assert found[1]["server_timing"] == {"infer_ms": 1.0}
    broker.reset()
    assert policy.resets == 1
    assert broker.infer({})["actions"].tolist() == [40]
    whole = ActionChunkBroker(Chunks())
    assert [whole.infer({})["actions"][0] for _ in range(4)] == [10, 11, 12, 20]
    with pytest.raises(ValueError, match="chunks have 3"):
        ActionChunkBroker(Chunks(), 4).infer({})
    with pytest.raises(ValueError, match="horizon=0"):
        ActionChunkBroker(Chunks(), 0)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(ConnectionLost, match="cannot be reached"):
        PolicyClient("127.0.0.1:9", patience=0)


def test_threads_that_share_a_client_take_turns(policy: Any, serve: Serve) -> None:
    """Each gets the answer to its own observation, on one connection."""
    peace = {}
    for robot in range(3):
        seen = observation(policy, robot)
        peace[robot] = policy.act({"image": seen["observation/image"]}, seen["prompt"], seen["observation/state"])
    server = serve(pruner=None)
    failures: list[BaseException] = []
    with PolicyClient(server.url, timeout=10 * WAIT) as client:

        def drive(robot: int) -> None:
            try:
                for _ in range(5):
                    found = client.infer(observation(policy, robot))
                    assert np.array_equal(found["actions"], peace[robot])
            except BaseException as error:
                failures.append(error)

        robots = [threading.Thread(target=drive, args=(robot,)) for robot in peace]
        for robot in robots:
            robot.start()
        for robot in robots:
            robot.join(WAIT)
        assert not failures, failures
        assert client.reconnects == 0


def test_threads_that_share_a_broker_take_turns() -> None:
    """Each action of each chunk is handed out once."""
    policy = Chunks()
    entered, gate = threading.Event(), threading.Event()
    whole = policy.infer

    def slow(observation: Any) -> dict[str, Any]:
        entered.set()
        assert gate.wait(WAIT)
        return whole(observation)

    policy.infer = slow
    broker = ActionChunkBroker(policy)
    found: list[int] = []
    robots = [threading.Thread(target=lambda: found.append(int(broker.infer({})["actions"][0]))) for _ in range(3)]
    robots[0].start()
    assert entered.wait(WAIT)
    for robot in robots[1:]:
        robot.start()
    gate.set()
    for robot in robots:
        robot.join(WAIT)
    assert sorted(found) == [10, 11, 12]
    assert policy.asked == 1


def test_an_episode_that_another_thread_begins_during_a_step_is_not_lost(policy: Any, serve: Serve) -> None:
    gated = Gated(policy)
    server = serve(policy=gated)
    with PolicyClient(server.url, timeout=10 * WAIT) as client:
        robot = threading.Thread(target=lambda: client.infer(observation(policy)))
        robot.start()
        assert gated.entered.wait(WAIT)
        client.reset()  # without a wait for the step
        gated.gate.set()
        robot.join(WAIT)
        counts = [client.infer(observation(policy, 0, step))["policy_timing"]["kept_tokens"] for step in range(4)]
        assert counts == [64, 64, 64, 16]


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No proxy in the environment, whatever the machine's."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ws_proxy", "wss_proxy", "socks_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ws_proxy", "socks_proxy"])
def test_a_proxy_of_the_environment_is_not_asked(
    name: str, policy: Any, serve: Serve, proxies: pytest.MonkeyPatch
) -> None:
    server = serve()
    proxies.setenv(name, "socks5h://127.0.0.1:9" if "socks" in name else "http://127.0.0.1:9")
    with PolicyClient(server.url, patience=0) as client:
        assert client.infer(observation(policy))["actions"].shape == (1, 4)


def test_a_server_behind_a_proxy(proxies: pytest.MonkeyPatch) -> None:
    """If the server cannot be reached, the message names the way that was taken, without the proxy's password."""
    with pytest.raises(ConnectionLost, match=r"cannot be reached \([^)]*\)\.$"):
        PolicyClient("127.0.0.1:9", patience=0)
    proxies.setenv("http_proxy", "http://me:s3cret@127.0.0.1:19")
    with pytest.raises(ConnectionLost, match=r"directly, and not through .* \('127\.0\.0\.1:19'\); .*proxy=") as error:
        PolicyClient("127.0.0.1:9", patience=0)
    assert "s3cret" not in str(error.value)
    with pytest.raises(ConnectionLost, match=r"asked through the proxy '127\.0\.0\.1:29'\.$"):
        PolicyClient("127.0.0.1:9", patience=0, proxy="http://127.0.0.1:29")


def test_a_proxy_that_is_given_is_asked(policy: Any, serve: Serve, proxies: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    server = serve()
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def stand_in() -> None:
            accepted, _ = proxy.accept()
            with accepted:
                asked.append(accepted.recv(1000).decode().partition("\r\n")[0])
                accepted.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")

        one = threading.Thread(target=stand_in)
        one.start()
        with pytest.raises(ConnectionLost, match="asked through the proxy"):
            PolicyClient(server.url, patience=0, proxy=f"http://127.0.0.1:{proxy.getsockname()[1]}")
        one.join(WAIT)
    assert asked == [f"CONNECT 127.0.0.1:{server.port} HTTP/1.1"]


def test_addresses(policy: Any, serve: Serve) -> None:
    port = serve().port
    for address in (
        f"127.0.0.1:{port}",
        f"ws://127.0.0.1:{port}/any",
        f"http://127.0.0.1:{port}",
        f"HTTP://LOCALHOST:{port}/",
    ):
        with PolicyClient(address, patience=0) as client:
            assert client.infer(observation(policy))["actions"].shape == (1, 4)
    with pytest.raises(ConnectionLost, match="wss://127"):
        PolicyClient(f"https://127.0.0.1:{port}", patience=0)  # that server has no certificate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "ftp://127.0.0.1"}, "address 'ftp://127.0.0.1' is none of a policy server; give host:port"),
        ({"url": ""}, "is none of a policy server"),
        ({"url": "ws://"}, "is none of a policy server"),
        ({"url": "ws://:8000"}, "is none of a policy server"),
        ({"url": "127.0.0.1:70000"}, "is none of a policy server"),
        ({"url": "127.0.0.1:0"}, "is none of a policy server"),
        ({"url": "127.0.0.1:port"}, "is none of a policy server"),
        ({"url": "[::1:8000"}, "is none of a policy server"),
        ({"url": "127.0.0.1:9\r\nX: y"}, "is none of a policy server"),
        ({"url": "ws://robot 1:9"}, "is none of a policy server"),
        ({"url": "x" * 10_000 + "://a"}, "is none of a policy server"),
        ({"api_key": "a key"}, "API key has blanks"),
        ({"api_key": "key\r\nX: y"}, "API key has blanks"),
        ({"api_key": "ключ"}, "API key has blanks"),
        ({"ca_file": "/no/such.pem"}, "has no certificate; its address is wss"),
        ({"url": "wss://127.0.0.1:9", "ca_file": "/no/such.pem"}, "'/no/such.pem' cannot be read"),
        ({"url": "wss://127.0.0.1:9", "ca_file": __file__}, "cannot be read as certificates"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"patience": -1}, "patience=-1"),
        ({"patience": float("nan")}, "patience=nan"),
        ({"proxy": "socks5://127.0.0.1:9"}, "proxy is none that can be asked"),
        ({"proxy": "127.0.0.1:9"}, "proxy is none that can be asked"),
    ],
)
def test_what_a_client_is_made_of(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ClientError, match=message) as error:
        PolicyClient(**{"url": "127.0.0.1:9", "patience": 0, **arguments})
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("greeting", "answer", "message"),
    [
        (pack({"protocol": "openpi"}), pack({"outputs": 1}), "answered without an array of actions"),
        (pack({"protocol": "openpi"}), pack([1]), "answered without an array of actions"),
        (pack({"protocol": "openpi"}), pack({"actions": np.zeros((0, 7))}), "answered without an array of actions"),
        (pack({"protocol": "openpi"}), pack({"actions": np.array(1.0)}), "answered without an array of actions"),
        (pack({"protocol": "openpi"}), b"\xc1", "not msgpack"),
        (pack([1]), b"", "greets with no map"),
        (b"\xc1", b"", "not msgpack"),
    ],
)
def test_what_is_no_policy_server_is_named(greeting: bytes, answer: bytes, message: str) -> None:
    def other(connection: Any) -> None:
        connection.send(greeting)
        connection.recv()
        connection.send(answer)

    with websocket_server(other, "127.0.0.1", 0) as server:
        running = threading.Thread(target=server.serve_forever)
        running.start()
        try:
            with (
                pytest.raises(CodecError, match=message),
                PolicyClient(f"127.0.0.1:{server.socket.getsockname()[1]}", patience=0) as client,
            ):
                client.infer({})
        finally:
            server.shutdown()
            running.join(WAIT)


@pytest.mark.parametrize("told", [True, False])
def test_an_observation_that_is_too_long_is_refused_and_not_sent_again(told: bool) -> None:
    came: list[int] = []

    def short(connection: Any) -> None:
        connection.send(pack({"max_message": 1000} if told else {}))
        with suppress(ConnectionClosed):
            came.append(len(connection.recv()))
            connection.close(1009, "too long")

    with websocket_server(short, "127.0.0.1", 0) as server:
        running = threading.Thread(target=server.serve_forever)
        running.start()
        try:
            with PolicyClient(f"127.0.0.1:{server.socket.getsockname()[1]}", patience=WAIT) as client:
                reads = "reads up to 1000" if told else "reads fewer"
                with pytest.raises(ServerError, match=rf"has \d+ bytes, and .* {reads}; send smaller .*--max-message"):
                    client.infer({"image": np.zeros((40, 40, 3), np.uint8)})
                assert client.reconnects == 0
        finally:
            server.shutdown()
            running.join(WAIT)
    assert len(came) == (0 if told else 1)


def test_an_error_ends_a_call_and_not_the_client(policy: Any, serve: Serve) -> None:
    server = serve()
    with PolicyClient(server.url) as client:
        for _ in range(2):
            with pytest.raises(ServerError, match="has no 'observation/image'"):
                client.infer({"prompt": "x"})
        assert client.infer(observation(policy))["actions"].shape == (1, 4)
        assert client.reconnects == 2
        with pytest.raises(vp.VLAPrunerError, match="cannot be packed"):
            client.infer({"prompt": object()})


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_call_leaves_no_answer_to_the_next(
    interrupt: type[BaseException], policy: Any, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal whose handler raises comes during the wait for the answer: the next call gets the answer to its own
    observation.
    """
    gated = Gated(policy)
    server = serve(policy=gated)
    one, other = observation(policy, 0, 0), observation(policy, 3, 7, prompt=instruction(policy, 0))
    expected = policy.act({"image": other["observation/image"]}, other["prompt"], other["observation/state"])
    with PolicyClient(server.url, timeout=10 * WAIT) as client:

        def interrupted(*_: Any, **__: Any) -> None:
            assert gated.entered.wait(WAIT)
            raise interrupt

        with monkeypatch.context() as patch:
            patch.setattr(client._socket, "recv", interrupted)
            with pytest.raises(interrupt):
                client.infer(one)
        gated.gate.set()
        assert np.array_equal(client.infer(other)["actions"], expected)
        assert client.reconnects == 1


def test_a_connection_that_is_given_up_leaves_no_threads(policy: Any, serve: Serve) -> None:
    """A server that takes too long is left, and with it the threads that read from it and ping it."""
    gated = Gated(policy)
    server = serve(policy=gated)
    client = PolicyClient(server.url, timeout=WAIT, patience=0)
    assert client._socket is not None
    threads = [client._socket.recv_events_thread, client._socket.keepalive_thread]
    client._timeout = 0.05
    with pytest.raises(ConnectionLost, match="timed out"):
        client.infer(observation(policy))
    for thread in threads:
        thread.join(5.0)  # a ping every 20 seconds would end them otherwise
    assert [thread.is_alive() for thread in threads] == [False, False]


def test_it_waits_for_a_server_that_comes_back(policy: Any) -> None:
    """The server stops and another comes to its port while a robot asks."""
    first = PolicyServer(policy, vp.VLAPruner(keep=0.25, preset="paper"), ServerSettings(port=0))
    first.start()
    client = PolicyClient(first.url, patience=WAIT)
    counts = [client.infer(observation(policy, 0, step))["policy_timing"]["kept_tokens"] for step in range(4)]
    assert counts == [64, 64, 64, 16]
    port = first.port
    first.stop()
    found: list[Any] = []
    robot = threading.Thread(target=lambda: found.append(client.infer(observation(policy, 0, 4))))
    robot.start()
    second = PolicyServer(policy, vp.VLAPruner(keep=0.25, preset="paper"), ServerSettings(port=port))
    second.start()
    robot.join(WAIT)
    assert found[0]["policy_timing"]["kept_tokens"] == 64  # the new server has none of the old one's state
    assert client.reconnects == 1
    client.close()
    second.stop()


SERVER = """
import sys, torch
torch.set_num_threads(1)
import vla_pruner as vp
from vla_pruner.serving import PolicyServer, ServerSettings
policy = vp.random_policy("reference", "tiny")
server = PolicyServer(policy, vp.VLAPruner(keep=0.25, preset="paper"), ServerSettings(port=int(sys.argv[1])))
server.start()
print(server.port, flush=True)
sys.stdin.read()
"""


def begin(port: int) -> tuple[subprocess.Popen[str], int]:
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], **pipes)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(WAIT)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def test_a_server_is_killed_and_comes_back(policy: Any) -> None:
    """SIGKILL while a robot drives: it goes on with the server that takes the port over."""
    first, port = begin(0)
    try:
        client = PolicyClient(f"127.0.0.1:{port}", patience=WAIT)
        before = [client.infer(observation(policy, 0, step))["actions"] for step in range(4)]
    finally:
        end(first)
    found: list[Any] = []

    def drive() -> None:
        found.extend(client.infer(observation(policy, 0, step))["actions"] for step in range(4))

    robot = threading.Thread(target=drive)
    robot.start()
    second, _ = begin(port)
    try:
        robot.join(WAIT)
        assert not robot.is_alive()
        assert all(np.array_equal(a, b) for a, b in zip(before, found, strict=True))
        assert client.reconnects == 1
    finally:
        client.close()
        end(second)
