"""docs/serving.md: every flag, key, limit and figure that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from websockets.asyncio.messages import MAX_FRAGMENTS

from tests.serving.test_server import POLICY_TIMING, SERVER_TIMING
from vla_pruner import cli
from vla_pruner.client import codec
from vla_pruner.serving import connections, logs, observations, server
from vla_pruner.serving.settings import MEBIBYTE, ServerSettings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "serving.md").read_text()


def test_every_flag_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    known = capsys.readouterr().out
    flags = set(re.findall(r"--[a-z-]+[a-z]", TEXT)) - {
        "--no-deps",
        "--seconds",
        "--out",
        "--messages",
        "--rm",
        "--gpus",
        "--args",
    }
    assert len(flags) > 10
    for flag in flags:
        assert flag in known, flag


def test_every_key_is_explained() -> None:
    for key in (*POLICY_TIMING, *SERVER_TIMING):
        assert f"`{key}`" in TEXT, key
    for name, layout in observations.LAYOUTS.items():
        row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{name}`"))
        for key in (*layout.images.values(), *layout.state):
            assert f"`{key.removeprefix('images/')}`" in row, key


def test_limits() -> None:
    settings = ServerSettings()
    limits = TEXT.split("## Limits")[1].split("## Security")[0]
    assert f"`--max-robots` | {settings.max_robots} |" in limits
    assert f"`--max-waiting` | {settings.max_waiting} |" in limits
    assert f"`--max-message` | {settings.max_message // MEBIBYTE} MiB |" in limits
    assert f"| {codec.MAX_ITEMS:,}, of one {codec.MAX_LENGTH:,} |" in limits
    assert (
        f"{observations.LONGEST_SIDE:,} pixels, {observations.LONGEST_STATE:,} numbers, "
        f"{observations.LONGEST_PROMPT:,} characters" in limits
    )
    assert f"| {codec.MAX_TEXT:,} and {codec.MAX_KEY} bytes of UTF-8 |" in limits
    assert f"| {MAX_FRAGMENTS:,} | close code 1009 |" in limits
    assert f"not read what it is sent | {settings.ping_timeout:g} s after" in limits
    assert f"after the goodbye | {server._LONGEST_GOODBYE:g} s |" in limits
    assert f"| {connections.MAX_PINGS:,} in {connections.READ_AT_ONCE // 1024} KiB |" in limits
    assert f"| {connections.SPARE} more than robots |" in limits
    assert f"at most {server._LONGEST_ERROR:,} characters" in TEXT
    assert f"and {logs._LONGEST} characters long" in limits
    assert f"{settings.ping_timeout:g} s after a ping, every {settings.ping_interval:g} s" in limits
    assert f"`--grace` | {settings.grace:g} s |" in limits


def test_figures_are_the_measured_ones() -> None:
    table = ROOT / "benchmarks" / "results" / "serving" / "reference-cpu-1-thread" / "serving.md"
    assert table.read_text() in TEXT
