"""docs/calibrate.md: every flag and figure that it names is there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from vla_pruner import calibration, cli
from vla_pruner.calibration import CalibrateSettings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "calibrate.md").read_text()


def test_every_flag_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = ""
    for command in ("calibrate", "eval"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        known += capsys.readouterr().out
    flags = set(re.findall(r"--[a-z-]+[a-z]", TEXT))
    assert len(flags) > 10
    for flag in flags:
        assert flag in known, flag
    for name in re.findall(r"`(\w+)\(", TEXT):
        assert hasattr(calibration, name)


def test_the_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[CalibrateSettings] = []
    monkeypatch.setattr("vla_pruner.calibration.command.run_calibrate", lambda asked, _: seen.append(asked) or 0)
    monkeypatch.setattr("vla_pruner.evaluation.command.run_eval", lambda *_: 0)
    commands = [line for line in TEXT.splitlines() if line.startswith("vla-pruner ")]
    assert len(commands) == 5
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0, command
    assert [asked.episodes for asked in seen] == [12] * 4
    assert "`--episodes` (12)" in TEXT


def test_the_figures_of_the_simulation_are_those_of_its_file() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "bootstrap_coverage.json").read_text())
    above = {
        episodes: 100 * max(row["truth_above"] for row in result["rows"] if row["episodes"] == episodes)
        for episodes in (12, 30)
    }
    told = " ".join(TEXT.split())
    assert f"above that of 12 episodes in up to {above[12]:.1f} % of the runs" in told
    assert f"above that of 30 in up to {above[30]:.1f} %" in told
