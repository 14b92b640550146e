"""`vla-pruner env` runs wherever the package is imported, and reports broken parts instead of breaking."""

from __future__ import annotations

import json
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

from vla_pruner import __version__, cli, installation
from vla_pruner.wording import counted

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process is started."""
    monkeypatch.setattr(installation, "_rendering", lambda: "not tried")


def test_text_and_json_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["vla_pruner"] == __version__
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["devices"][0] == f"cpu ({counted(torch.get_num_threads(), 'thread')})"
    for told in (found["python"], found["processor"], found["packages"]["transformers"], *found["devices"]):
        assert told in text
    assert str(Path.home()) not in text


def test_extras_are_those_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(installation.extras()) == set(declared)
    lines = ["numpy>=1", 'numpy>=1; extra == "a"', 'numpy>=999; extra == "b"', 'nowhere[x]>=2; extra == "b"']
    lines += ['numpy>=1; python_version < "3" and extra == "c"']
    monkeypatch.setattr(metadata, "requires", lambda _: lines)

    class Declared:
        def get_all(self, _: str) -> list[str]:
            return ["a", "b", "c"]

    monkeypatch.setattr(metadata, "metadata", lambda _: Declared())
    assert installation.extras() == {"a": [], "b": ["numpy>=999", "nowhere[x]>=2"], "c": None}
    text = installation.as_text(installation.installation())
    assert "lacks numpy>=999, nowhere[x]>=2" in text
    assert "not for this Python" in text


def test_it_tells_of_a_torch_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["env"]) == 0
    assert "torch cannot be imported: ModuleNotFoundError" in capsys.readouterr().out


def test_it_tells_of_an_untested_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "version", lambda name: "9.9.0" if name == "transformers" else None)
    assert "transformers 9.9.0 is installed, which no test has run on yet" in (
        installation.as_text(installation.installation())
    )


def test_without_a_simulator_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(installation, "version", lambda _: None)
    assert installation._rendering() == "MuJoCo is not installed"


def test_how_rendering_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(installation, "version", lambda _: "3.3.0")
    monkeypatch.setattr(installation, "_DRAW", "raise SystemExit('no such display')")
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert installation._rendering() == "MuJoCo 3.3.0 does not draw with MUJOCO_GL=glfw: no such display"
    monkeypatch.setattr(installation, "_DRAW", "pass")
    assert installation._rendering() == "MuJoCo 3.3.0 draws with MUJOCO_GL=glfw"
