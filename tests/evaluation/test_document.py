"""docs/evaluation.md: every flag, field and figure that it names is there."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from vla_pruner import cli
from vla_pruner.evaluation import PRESETS, EvalSettings, Record
from vla_pruner.evaluation.records import TERMINATIONS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "evaluation.md").read_text()


def test_every_flag_and_preset_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    known = capsys.readouterr().out
    for flag in set(re.findall(r"--[a-z-]+[a-z]", TEXT)):
        assert flag in known, flag
    for name, preset in PRESETS.items():
        row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{name}`"))
        assert str(preset.episodes) in row
    for word in TERMINATIONS:
        assert f"`{word}`" in TEXT
    fields = {field.name for field in dataclasses.fields(Record)}
    assert {"steps", "control_steps"} <= fields


def test_the_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EvalSettings] = []
    monkeypatch.setattr("vla_pruner.evaluation.command.run_eval", lambda settings, _: seen.append(settings) or 0)
    monkeypatch.setattr("vla_pruner.evaluation.command.run_merge", lambda *_: 0)
    commands = [line.split("#")[0] for line in TEXT.splitlines() if line.startswith("vla-pruner eval")]
    assert len(commands) == 10
    for command in commands:
        words = shlex.split(command.replace(" ... ", " --policy CHECKPOINT --suite libero "))[1:]
        assert cli.main(words) == 0, command
    assert len(seen) == 9


def test_the_figures_of_the_simulation_are_those_of_its_file() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "interval_coverage.json").read_text())
    worst = result["worst_percent"]
    assert f"above it in at most {worst['above']:.1f} % of the runs and below it in at most {worst['below']:.1f} %" in (
        " ".join(TEXT.split())
    )
    assert f"{result['runs']:,} runs each" in TEXT
    narrower = max(one["width_points_without_strata"] / one["width_points"] for one in result["scenarios"])
    assert f"up to {narrower:.1f} times as wide" in " ".join(TEXT.split())
