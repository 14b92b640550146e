"""`vla-pruner serve`: flags, refusals, and a whole run that a signal ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import vla_pruner as vp
from tests.serving.robots import WAIT, observation
from vla_pruner import cli
from vla_pruner.client import PolicyClient
from vla_pruner.serving import doors
from vla_pruner.serving import server as server_module
from vla_pruner.serving.settings import ServerSettings


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, ServerSettings]]:
    """Replace the server by one that notes its arguments, and is stopped at once."""
    seen: list[tuple[Any, Any, ServerSettings]] = []

    class Noted:
        url = "ws://x"

        def __init__(self, policy: Any, pruner: Any, settings: ServerSettings) -> None:
            seen.append((policy, pruner, settings))

        def start(self) -> None:
            signal.raise_signal(signal.SIGTERM)

        def stop(self) -> None:
            pass

    async def free(_: ServerSettings) -> None:
        """Whatever else runs on this machine."""

    monkeypatch.setattr(server_module, "PolicyServer", Noted)
    monkeypatch.setattr(doors, "check_address", free)
    monkeypatch.delenv("VLA_PRUNER_API_KEY", raising=False)
    return seen


TINY = ["serve", "--policy", "reference", "--random-weights"]


def test_flags_reach_the_server(asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    flags = ["--keep", "64", "--layer", "2", "--pruned", "freeze", "--host", "0.0.0.0", "--port", "9", "--seed", "3"]
    flags += ["--observations", "droid", "--camera-key", "image=a/b", "--api-key-file", str(key), "--max-robots", "5"]
    flags += ["--max-waiting", "6", "--max-message", "1", "--max-batch", "7", "--batch-window", "4", "--grace", "8"]
    flags += ["--compile", "--prompt", "go", "--prompt", "stop"]
    assert cli.main([*TINY, *flags]) == 0
    policy, pruner, settings = asked[0]
    assert type(policy).__name__ == "ReferencePolicy"
    assert pruner == vp.VLAPruner(keep=64, layer=2, pruned="freeze")
    assert settings == ServerSettings(
        host="0.0.0.0",
        port=9,
        api_key="s3cret",
        observations="droid",
        camera_keys={"image": "a/b"},
        max_robots=5,
        max_waiting=6,
        max_message=2**20,
        max_batch=7,
        batch_window=0.004,
        grace=8.0,
        seed=3,
        prompts=("go", "stop"),
        compile=True,
        name="reference",
    )
    assert "Warning" not in capsys.readouterr().err


def test_defaults(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(TINY) == 0
    _, pruner, settings = asked[0]
    assert pruner == vp.VLAPruner(keep=0.25)
    assert settings == ServerSettings(name="reference")
    assert "Warning" not in capsys.readouterr().err


def test_methods(asked: list[Any]) -> None:
    assert cli.main([*TINY, "--method", "none"]) == 0
    assert cli.main([*TINY, "--method", "fastv", "--keep", "0.5"]) == 0
    assert cli.main([*TINY, "--layer", "0"]) == 0
    assert [pruner for _, pruner, _ in asked] == [
        None,
        vp.FastV(keep=0.5),
        vp.VLAPruner(keep=0.25, layer=0, refresh_every=8),
    ]


def test_options_of_a_method_follow_its_name(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """They do so in every other subcommand."""
    for name in ("vla-pruner:window=5:keep=16", "max-min-diversity:metric=euclidean", "vla-cache"):
        assert cli.main([*TINY, "--method", name]) == 0
    assert [pruner for _, pruner, _ in asked] == [
        vp.VLAPruner(keep=16, window=5),
        vp.methods.MaxMinDiversity(keep=0.25, metric="euclidean"),
        vp.VLACache(),  # a server refuses it, by a sentence of its own
    ]
    assert "(VLAPruner, keep 16)" in capsys.readouterr().err


def test_an_open_port_without_a_key_is_warned_of(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*TINY, "--host", "0.0.0.0"]) == 0
    error = capsys.readouterr().err
    assert "Warning: 0.0.0.0 can be reached by other machines, and no key is asked" in error
    monkeypatch.setenv("VLA_PRUNER_API_KEY", "k")
    assert cli.main([*TINY, "--host", "0.0.0.0"]) == 0
    assert asked[-1][2].api_key == "k"
    assert "Warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "magic"], "--method is magic"),
        (["--method", "fastv:windows=5"], "'windows=5'"),
        (["--method", "vla-cache"], "reuses keys and values"),
        (["--keep", "2.0"], "keep=2.0"),
        (["--method", "none", "--layer", "2"], "--method is none, which prunes nothing; leave --layer out"),
        (["--port", "70000"], "--port is 70000"),
        (["--max-robots", "0"], "--max-robots is 0; it is a whole number"),
        (["--max-message", "-1"], "--max-message is -1 MiB; it is a whole number of 1 or more"),
        (["--batch-window", "2000"], "--batch-window is 2000 ms; it is 0 to 1000 ms"),
        (["--grace", "0"], "--grace is 0.0; it is a number of seconds"),
        (["--seed", "-1"], "--seed is -1"),
        (["--api-key-file", "/no/such/key"], "/no/such/key, which cannot be read (No such file or directory)."),
        (["--tls-cert", "/no/such/cert"], "give both --tls-cert and --tls-key, or none"),
        (["--tls-cert", "/no/cert", "--tls-key", "/no/key"], "--tls-cert is /no/cert and --tls-key is /no/key, which"),
        (["--threads", "0"], "--threads is 0"),
        (["--camera-key", "front=x"], "--camera-key names the camera 'front'"),
        (["--observations", "aloha"], "'image'"),
        (["--device", "abacus"], "--device is abacus"),
    ],
)
def test_wrong_input_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TINY, "--port", "0", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_address_or_certificate_that_will_not_do_is_refused_before_the_policy_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vla_pruner.policies.asked.random_policy", lambda *_: pytest.fail("it was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flags, message in (
            (["--port", port], f"--host '127.0.0.1' with --port {port} cannot be listened on"),
            (["--port", "0", "--host", "203.0.113.1"], "--host '203.0.113.1' with --port 0 cannot be listened on"),
            (["--port", "0", "--host", "a..b"], "--host 'a..b' with --port 0 cannot be listened on"),
            (["--port", "0", "--tls-cert", "/no", "--tls-key", "/no"], "which cannot be used"),
        ):
            assert cli.main([*TINY, *flags]) == 2
            error = capsys.readouterr().err
            assert message in error
            assert error.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--camera-key", "x"],
        ["--camera-key", "x=1", "--camera-key", "x=2"],
        ["--observations", "bridge"],
        ["--keep", "half"],
    ],
)
def test_wrong_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*TINY, *flags])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_gives_every_flag_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    flags = capsys.readouterr().out.split("\n  --")[1:]
    described = [text for text in flags if not text.startswith(("policy", "help"))]
    assert len(described) > 25
    assert [text.split()[0] for text in described if "(default" not in text] == []


def test_without_the_extra_the_fix_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert cli.main(TINY) == 2
    assert "prometheus_client, which is not installed; run: pip install 'vla-pruner[serve]'" in capsys.readouterr().err


def test_a_server_that_ends_by_itself_ends_the_command(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noted: Any = server_module.PolicyServer
    monkeypatch.setattr(noted, "start", lambda _: None)
    monkeypatch.setattr(noted, "failure", RuntimeError("the loop broke"), raising=False)
    assert cli.main(TINY) == 1
    assert capsys.readouterr().err.endswith("The server ended by itself: RuntimeError: the loop broke\n")


def test_a_second_signal_ends_the_warm_up() -> None:
    command = [sys.executable, "-m", "vla_pruner.cli", *TINY, "--port", "0", "--method", "fastv:warmup_steps=250"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            assert process.stderr.readline() == "Loaded reference; warming up.\n"
            while process.poll() is None:  # signals that come together count as one
                process.send_signal(signal.SIGINT)
                time.sleep(0.1)
            assert process.returncode == -signal.SIGINT
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_a_whole_run_that_a_signal_ends(policy: Any) -> None:
    command = [sys.executable, "-m", "vla_pruner.cli", *TINY, "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = [process.stderr.readline(), process.stderr.readline()]
            assert lines[0] == "Loaded reference; warming up.\n"
            assert lines[1].startswith("Serving reference (VLAPruner, keep 0.25) at ws://127.0.0.1:")
            with PolicyClient(lines[1].split(" at ")[1].split(";")[0]) as client:
                assert client.infer(observation(policy))["actions"].shape == (1, 4)
                process.send_signal(signal.SIGINT)
                told = process.stderr.read().splitlines()
                assert told[0] == "Stopping: answering what is under way."
                assert [line.split(" ", 1)[1] for line in told[1:]] == [
                    "Robot 1 left after 1 episode of 1 control step."
                ]
            assert process.wait(WAIT) == 0
        finally:
            process.kill()
