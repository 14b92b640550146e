"""The client: small, patient, and the same type as what it wraps."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vla_pruner as vp
from tests.serving.robots import WAIT, Gated, instruction, observation
from vla_pruner.client import ActionChunkBroker, ConnectionLost, PolicyClient, ServerError
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
    """A signal whose handler raises comes while the answer is waited for: the next call gets the answer to its own
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
    first = PolicyServer(policy, vp.VLAPruner(keep=0.25), ServerSettings(port=0))
    first.start()
    client = PolicyClient(first.url, patience=WAIT)
    counts = [client.infer(observation(policy, 0, step))["policy_timing"]["kept_tokens"] for step in range(4)]
    assert counts == [64, 64, 64, 16]
    port = first.port
    first.stop()
    found: list[Any] = []
    robot = threading.Thread(target=lambda: found.append(client.infer(observation(policy, 0, 4))))
    robot.start()
    second = PolicyServer(policy, vp.VLAPruner(keep=0.25), ServerSettings(port=port))
    second.start()
    robot.join(WAIT)
    assert found[0]["policy_timing"]["kept_tokens"] == 64  # the new server knows nothing of before
    assert client.reconnects == 1
    client.close()
    second.stop()


SERVER = """
import sys, torch
torch.set_num_threads(1)
import vla_pruner as vp
from vla_pruner.serving import PolicyServer, ServerSettings
policy = vp.random_policy("reference", "tiny")
server = PolicyServer(policy, vp.VLAPruner(keep=0.25), ServerSettings(port=int(sys.argv[1])))
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
