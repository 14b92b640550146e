"""The server's manners: protocol, errors, doors, limits, keep-alives, and an orderly end."""

from __future__ import annotations

import http.client
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import vla_pruner as vp
from tests.serving.robots import WAIT, Failing, Gated, observation
from vla_pruner.client import PolicyClient, ServerError
from vla_pruner.client.codec import pack, unpack
from vla_pruner.serving import PolicyServer, ServerSettings, ServingError

Serve = Callable[..., PolicyServer]

POLICY_TIMING = {
    "infer_ms", "preprocess_ms", "vision_ms", "prune_ms", "prefill_ms", "action_ms", "kept_tokens", "total_tokens",
}  # fmt: skip
SERVER_TIMING = {"infer_ms", "queue_ms", "batch_robots", "prev_total_ms", "episode_step"}


def get(server: PolicyServer, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    found = response.status, response.read().decode()
    connection.close()
    return found


def raw(server: PolicyServer, **options: Any) -> Any:
    """A websocket, as a context manager."""
    return connect(server.url, compression=None, max_size=None, open_timeout=WAIT, **options)


def ends_with(socket: ClientConnection) -> tuple[str, int | None]:
    """The error that the server sends, and the code it closes with."""
    text = socket.recv(timeout=WAIT)
    assert isinstance(text, str), unpack(text)
    with pytest.raises(ConnectionClosed):
        socket.recv(timeout=WAIT)
    return text, socket.close_code


def test_metadata_comes_first_and_every_reply_has_every_number(policy: Any, serve: Serve) -> None:
    server = serve(name="tiny", metadata={"reset_pose": [0.0, 1.0]})
    with raw(server) as socket:
        metadata = unpack(socket.recv(timeout=WAIT))
        assert metadata["protocol"] == "openpi"
        assert metadata["server"] == f"vla-pruner/{vp.__version__}"
        assert metadata["model"] == "tiny"
        assert metadata["pruner"]["keep"] == 0.25
        assert (metadata["action_horizon"], metadata["action_dim"], metadata["visual_tokens"]) == (1, 4, 64)
        assert (metadata["image_keys"], metadata["state_keys"]) == (["observation/image"], ["observation/state"])
        assert metadata["reset_pose"] == [0.0, 1.0]
        for step in range(5):
            socket.send(pack(observation(policy, 0, step)))
            reply = unpack(socket.recv(timeout=WAIT))
            assert set(reply) == {"actions", "policy_timing", "server_timing"}
            assert set(reply["policy_timing"]) == POLICY_TIMING
            assert set(reply["server_timing"]) == SERVER_TIMING
            values = [*reply["policy_timing"].values(), *reply["server_timing"].values()]
            assert all(type(value) is float and value >= 0 for value in values)
            timing = reply["policy_timing"]
            parts = ("preprocess_ms", "vision_ms", "prune_ms", "prefill_ms", "action_ms")
            assert 0 < sum(timing[part] for part in parts) <= timing["infer_ms"] + 1e-6
            assert all(timing[part] > 0 for part in ("vision_ms", "prefill_ms", "action_ms", "prune_ms"))
            assert timing["infer_ms"] <= reply["server_timing"]["infer_ms"]
            assert (reply["server_timing"]["prev_total_ms"] > 0) == (step > 0)
            assert reply["actions"].shape == (1, 4)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"\xc1", "not msgpack"),
        ("hello", "observations are binary"),
        (pack([1, 2]), "map of keys"),
        (pack({"prompt": "x"}), "has no 'observation/image'"),
    ],
)
def test_a_wrong_message_is_told_why_and_costs_its_own_connection(
    message: bytes | str, text: str, policy: Any, serve: Serve
) -> None:
    server = serve()
    with raw(server) as wrong, PolicyClient(server.url) as client:
        before = client.infer(observation(policy, 0, 0))
        wrong.recv(timeout=WAIT)
        wrong.send(message)
        told, code = ends_with(wrong)
        assert text in told
        assert code == 1011
        client.infer(observation(policy, 0, 1))
        assert client.reconnects == 0
        assert before["actions"].shape == (1, 4)


def test_what_the_policy_refuses_is_told_and_what_breaks_it_is_not_shown(policy: Any, serve: Serve) -> None:
    failing = Failing(policy)
    server = serve(policy=failing)
    with raw(server) as socket:
        socket.recv(timeout=WAIT)
        socket.send(pack(observation(policy, prompt="sing a song")))
        told, code = ends_with(socket)
        assert "words it was never trained on" in told
        assert code == 1011
    failing.error = RuntimeError("a path of /home/secret")
    with raw(server) as socket:
        socket.recv(timeout=WAIT)
        socket.send(pack(observation(policy)))
        told, _ = ends_with(socket)
        assert told == "The policy failed with RuntimeError; the server's log has the details."
    failing.error, failing.endless = None, True
    with raw(server) as socket:
        socket.recv(timeout=WAIT)
        socket.send(pack(observation(policy)))
        assert "not finite" in ends_with(socket)[0]
    failing.endless = False
    with PolicyClient(server.url) as client:
        assert client.infer(observation(policy))["actions"].shape == (1, 4)


def test_health_metrics_and_nothing_else(policy: Any, serve: Serve) -> None:
    server = serve()
    assert get(server, "/healthz") == (200, "OK\n")
    assert get(server, "/health") == (200, "OK\n")
    assert get(server, "/")[0] == 404
    assert get(server, "/../etc/passwd")[0] == 404
    with PolicyClient(server.url) as client:
        for step in range(4):
            client.infer(observation(policy, 0, step))
        with pytest.raises(ServerError):
            client.infer({"prompt": "x"})
        client.infer(observation(policy))
        status, text = get(server, "/metrics")
    assert status == 200
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['vla_pruner_requests_total{outcome="answered"}'] == "5.0"
    assert lines['vla_pruner_requests_total{outcome="refused"}'] == "1.0"
    assert lines["vla_pruner_sessions"] == "1.0"
    assert lines["vla_pruner_queue_depth"] == "0.0"
    assert lines["vla_pruner_kept_tokens_total"] == str(4 * 64.0 + 16)
    assert lines["vla_pruner_visual_tokens_total"] == str(5 * 64.0)
    assert lines["vla_pruner_request_seconds_count"] == "5.0"


def test_with_a_key_nobody_enters_without_it(policy: Any, serve: Serve) -> None:
    server = serve(api_key="s3cret")
    wrong = ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": "s3cret"}, {"Authorization": "Bearer s3cret"})
    for headers in wrong:
        with pytest.raises(InvalidStatus) as refusal, raw(server, additional_headers=headers):
            pass
        assert refusal.value.response.status_code == 401
    for key in (None, "wrong", "s3cre", "s3cret2"):
        with pytest.raises(ServerError, match=r"401.*Authorization: Api-Key KEY"):
            PolicyClient(server.url, api_key=key)
    with PolicyClient(server.url, api_key="s3cret") as client:
        assert client.infer(observation(policy))["actions"].shape == (1, 4)
    assert get(server, "/healthz")[0] == 200
    assert get(server, "/metrics")[0] == 401
    status, text = get(server, "/metrics", Authorization="Api-Key s3cret")
    assert status == 200
    assert 'vla_pruner_refused_connections_total{reason="key"} 9.0' in text


def test_web_pages_are_refused(serve: Serve) -> None:
    server = serve()
    with pytest.raises(InvalidStatus) as refusal, raw(server, origin="http://evil.example"):
        pass
    assert refusal.value.response.status_code == 403


def test_tls(policy: Any, serve: Serve, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(made, check=True, capture_output=True)
    server = serve(tls_cert=cert, tls_key=key)
    assert server.url.startswith("wss://")
    with PolicyClient(server.url, ca_file=cert) as client:
        assert client.infer(observation(policy))["actions"].shape == (1, 4)
    with pytest.raises(vp.VLAPrunerError, match="cannot be reached"):
        PolicyClient(server.url, patience=0)  # it does not trust the certificate
    with pytest.raises(ServingError, match="cannot be used"):
        PolicyServer(policy, None, ServerSettings(tls_cert=key, tls_key=cert))


def test_messages_have_a_limit(policy: Any, serve: Serve) -> None:
    server = serve(max_message=100_000)
    with raw(server) as socket:
        socket.recv(timeout=WAIT)
        socket.send(pack(observation(policy, ballast=np.zeros(200_000, np.uint8))))
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=WAIT)
        assert socket.close_code == 1009
    with PolicyClient(server.url) as client:
        assert client.metadata["max_message"] == 100_000
        client.infer(observation(policy))


def test_robots_have_a_limit(policy: Any, serve: Serve) -> None:
    server = serve(max_robots=2)
    with PolicyClient(server.url) as one, PolicyClient(server.url) as two:
        one.infer(observation(policy))
        two.infer(observation(policy))
        with pytest.raises(InvalidStatus) as refusal, raw(server):
            pass
        assert refusal.value.response.status_code == 503
        assert b"2 robots are connected" in (refusal.value.response.body or b"")
        with pytest.raises(vp.VLAPrunerError, match="503: 2 robots are connected"):
            PolicyClient(server.url, patience=0)
        assert 'refused_connections_total{reason="full"} 2.0' in get(server, "/metrics")[1]
    with PolicyClient(server.url) as three:  # it waits until there is room
        three.infer(observation(policy))


def test_control_steps_that_wait_have_a_limit(policy: Any, serve: Serve) -> None:
    gated = Gated(policy)
    server = serve(policy=gated, max_waiting=1, max_batch=1)
    with raw(server) as first, raw(server) as second, raw(server) as third:
        for socket in (first, second, third):
            socket.recv(timeout=WAIT)
        first.send(pack(observation(policy)))
        assert gated.entered.wait(WAIT)
        second.send(pack(observation(policy)))
        wait_for(server, "vla_pruner_queue_depth 1.0")
        third.send(pack(observation(policy)))
        told, code = ends_with(third)
        assert "1 control steps wait" in told
        assert code == 1013
        gated.gate.set()
        assert unpack(first.recv(timeout=WAIT))["actions"].shape == (1, 4)
        assert unpack(second.recv(timeout=WAIT))["actions"].shape == (1, 4)


def test_a_client_comes_back_to_a_full_queue(policy: Any, serve: Serve) -> None:
    gated = Gated(policy)
    server = serve(policy=gated, max_waiting=1, max_batch=1)
    with raw(server) as first, raw(server) as second:
        for socket in (first, second):
            socket.recv(timeout=WAIT)
        first.send(pack(observation(policy)))
        assert gated.entered.wait(WAIT)
        second.send(pack(observation(policy)))
        wait_for(server, "vla_pruner_queue_depth 1.0")
        client = PolicyClient(server.url)
        found: list[Any] = []
        robot = threading.Thread(target=lambda: found.append(client.infer(observation(policy))))
        robot.start()
        wait_for(server, 'requests_total{outcome="overloaded"} 1.0')
        gated.gate.set()
        robot.join(WAIT)
        assert found[0]["actions"].shape == (1, 4)
        assert client.reconnects >= 1
        client.close()


def wait_for(server: PolicyServer, line: str) -> None:
    """Until the metrics have this line."""
    patience = threading.Event()
    for _ in range(int(WAIT / 0.02)):
        if line in get(server, "/metrics")[1]:
            return
        patience.wait(0.02)
    raise AssertionError(f"{line!r} never came")


def test_keep_alives_hold_through_a_slow_step(policy: Any, serve: Serve) -> None:
    """Pings of both sides are answered, health too, while the model is busy."""
    gated = Gated(policy)
    server = serve(policy=gated, ping_interval=0.05, ping_timeout=WAIT)
    with raw(server, ping_interval=0.05, ping_timeout=WAIT) as socket:
        socket.recv(timeout=WAIT)
        socket.send(pack(observation(policy)))
        assert gated.entered.wait(WAIT)
        for _ in range(5):
            assert socket.ping().wait(WAIT)
            assert get(server, "/healthz")[0] == 200
        gated.gate.set()
        assert unpack(socket.recv(timeout=WAIT))["actions"].shape == (1, 4)


def test_stopping_answers_what_is_under_way(policy: Any, serve: Serve) -> None:
    gated = Gated(policy)
    server = serve(policy=gated, max_batch=1)
    with raw(server) as running, raw(server) as waiting, raw(server) as idle:
        for socket in (running, waiting, idle):
            socket.recv(timeout=WAIT)
        running.send(pack(observation(policy)))
        assert gated.entered.wait(WAIT)
        waiting.send(pack(observation(policy)))
        wait_for(server, "vla_pruner_queue_depth 1.0")
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        with pytest.raises(ConnectionClosed):
            idle.recv(timeout=WAIT)
        assert idle.close_code == 1001
        gated.gate.set()
        for socket in (running, waiting):
            assert unpack(socket.recv(timeout=WAIT))["actions"].shape == (1, 4)
            with pytest.raises(ConnectionClosed):
                socket.recv(timeout=WAIT)
            assert socket.close_code == 1001
        stopping.join(WAIT)
        assert not stopping.is_alive()
    with pytest.raises(ServingError, match="does not run"):
        _ = server.port


def test_grace_ends(policy: Any, serve: Serve) -> None:
    """The server does not wait for a step that takes longer, and its robot gets the reason."""
    gated = Gated(policy)
    server = serve(policy=gated, grace=0.05)
    with raw(server) as socket:
        socket.recv(timeout=WAIT)
        socket.send(pack(observation(policy)))
        assert gated.entered.wait(WAIT)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        told, code = ends_with(socket)
        assert (told, code) == ("The server stopped during this control step.", 1011)
        gated.gate.set()
        stopping.join(WAIT)
        assert not stopping.is_alive()
    assert not any("forward" in vars(part) for part in policy.modules())


def test_a_server_starts_again_and_ports_are_told(policy: Any, serve: Serve) -> None:
    server = serve()
    with pytest.raises(ServingError, match="runs already"):
        server.start()
    other = PolicyServer(vp.random_policy("reference", "tiny"), None, ServerSettings(port=server.port))
    with pytest.raises(ServingError, match=f"port {server.port} cannot be listened on"):
        other.start()
    failing = Failing(policy)
    failing.error = RuntimeError("no")
    with pytest.raises(ServingError, match="cannot be listened on"):  # and not that its first step failed
        PolicyServer(failing, None, ServerSettings(port=server.port)).start()
    server.stop()
    server.stop()
    server.start()
    with PolicyClient(server.url) as client:
        assert client.infer(observation(policy))["actions"].shape == (1, 4)


def test_a_server_that_ends_by_itself_says_why(policy: Any, serve: Serve) -> None:
    server = serve()
    assert server.failure is None
    assert server._loop is not None
    assert server._thread is not None
    server._loop.call_soon_threadsafe(server._loop.stop)
    server._thread.join(WAIT)
    assert "loop stopped" in str(server.failure)


def test_the_port_opens_after_the_warm_up(policy: Any) -> None:
    """A policy that cannot act is not served."""
    failing = Failing(policy)
    failing.error = RuntimeError("no")
    server = PolicyServer(failing, None, ServerSettings(port=0))
    with pytest.raises(ServingError, match="first control step failed"):
        server.start()
    assert not any("forward" in vars(part) for part in policy.modules())


def test_nobody_can_connect_while_the_policy_warms_up(policy: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    gated = Gated(policy)
    gated.begin()
    server = PolicyServer(gated, vp.VLAPruner(keep=0.25, preset="paper"), ServerSettings(port=port))
    starting = threading.Thread(target=server.start)
    starting.start()
    try:
        assert gated.entered.wait(WAIT)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        gated.gate.set()
        starting.join(WAIT)
        with raw(server) as opened:
            assert unpack(opened.recv(timeout=WAIT))["protocol"] == "openpi"
    finally:
        gated.gate.set()
        starting.join(WAIT)
        server.stop()
