"""docs/audit.md names every check, and its examples run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vla_pruner import cli
from vla_pruner.auditing.run import CHECKS
from vla_pruner.registry import random_names

TEXT = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()


def test_every_check_is_described():
    table = TEXT.split("| check | passes if |")[1].split("\n\n")[0]
    names = [name.strip() for row in table.splitlines()[2:] for name in row.split("|")[1].split(",")]
    assert names == list(CHECKS)


def test_every_name_and_flag_exists(capsys):
    for name in random_names():
        assert name in TEXT
    with pytest.raises(SystemExit):
        cli.main(["audit", "--help"])
    known = capsys.readouterr().out
    for flag in set(re.findall(r"--[a-z-]+[a-z]", TEXT)):
        assert flag in known, flag


def test_the_example_runs(capsys):
    first = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[0]
    exec(compile(first, "docs/audit.md", "exec"), {})
    assert "faster at this keep" in capsys.readouterr().out
