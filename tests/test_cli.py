"""The command line: help, exit codes, and one line on stderr for wrong input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vla_pruner import cli
from vla_pruner.demo import DemoError, DemoSettings
from vla_pruner.simulators.metaworld import SimulatorUnavailable


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[DemoSettings]:
    """Replaces the demo by one that only notes what it was asked to do."""
    seen: list[DemoSettings] = []

    def note(settings: DemoSettings, _: Any) -> int:
        seen.append(settings)
        return 0

    monkeypatch.setattr("vla_pruner.demo.run_demo", note)
    return seen


def test_flags_reach_the_demo(asked: list[DemoSettings], tmp_path: Path) -> None:
    flags = [
        "--tasks",
        "reach, push",
        "--episodes",
        "3",
        "--keep",
        ".5",
        "--seed",
        "9",
        "--out",
        str(tmp_path),
        "--quick",
    ]
    assert cli.main(["demo", *flags]) == 0
    assert asked == [
        DemoSettings(tasks=("reach", "push"), episodes=3, keep=0.5, seed=9, out=tmp_path, quick=True, weights=None)
    ]


def test_defaults_are_the_settings_own(asked: list[DemoSettings]) -> None:
    assert cli.main(["demo"]) == 0
    assert asked == [DemoSettings()]


def test_help_shows_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--tasks", "--episodes", "--keep", "--seed", "--out", "--quick", "--weights"):
        described = text.split(f"\n  {flag}", 1)[1]
        assert "(default" in described.split("\n  --")[0], flag


@pytest.mark.parametrize(
    "flags",
    [["demo", "--episodes", "many"], ["demo", "--keep"], ["fly"], [], ["demo", "--nonsense"], ["demo", "--keep", "x"]],
)
def test_wrong_flags_are_one_line_and_exit_code_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--help" in error


@pytest.mark.parametrize(
    "error",
    [
        DemoError("Unknown task fly;\n the policy knows: reach."),
        SimulatorUnavailable("MuJoCo cannot draw", "apt-get install libegl1"),
    ],
)
def test_errors_on_purpose_are_one_line_and_exit_code_2(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> int:
        raise error

    monkeypatch.setattr("vla_pruner.demo.run_demo", fail)
    monkeypatch.setattr("sys.unraisablehook", sys.unraisablehook)
    assert cli.main(["demo"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("vla-pruner: ")


def test_ctrl_c_outside_of_the_demo_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("vla_pruner.demo.run_demo", interrupt)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_the_command_is_installed_and_refuses_for_real(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vla_pruner.cli", "demo", "--keep", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "vla-pruner: --keep is 2; it is a fraction of the visual tokens, above 0 and up to 1."
    ]
