"""docs/report.md: its commands are understood, and its figures are the code's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from vla_pruner import cli
from vla_pruner.report import films, verdicts

TEXT = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
LINE = " ".join(TEXT.split())


def test_the_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("vla_pruner.report.command.run_report", lambda *asked: seen.append(asked) or 0)
    commands = [line.split("#")[0] for line in TEXT.splitlines() if line.startswith("vla-pruner report")]
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0
    assert [asked[:3] for asked in seen] == [
        (Path("runs/a"), None, ()),
        (Path("runs/a"), Path("a.html"), ("push:0", "reach:3")),
    ]


def test_every_flag_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = ""
    for command in ("report", "eval"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        known += capsys.readouterr().out
    flags = set(re.findall(r"--[a-z]+", TEXT))
    assert {"--episodes", "--out", "--trace"} <= flags
    assert all(flag in known for flag in flags)


def test_the_bounds_are_those_of_the_code() -> None:
    assert f"Images and score maps take {films.MOST_BYTES / 1e6:g} MB at most" in LINE
    assert f"up to {films.MOST_FILMS} starts of up to {films.MOST_ARMS} pruned arms" in LINE
    assert f"With more than {verdicts.UNFOLDED} arms" in LINE
