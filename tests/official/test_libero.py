"""Scripts with the shape of the official ones, changed by two lines, in the real LIBERO (`make test-libero`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vla_pruner as vp
from tests.official.scene import checkpoint, script
from vla_pruner.simulators import SimulatorUnavailable
from vla_pruner.simulators.libero import LiberoSuite

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module", autouse=True)
def libero() -> None:
    try:
        LiberoSuite("libero_object")
    except SimulatorUnavailable as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize(
    ("name", "flags", "counted"),
    [
        ("openvla", ("--max_steps", "5"), "2 episodes, 10 control steps, 4 of them pruned (the last to 64 of 256"),
        ("oft", ("--max_steps", "26"), "1 episode, 4 control steps, 1 of them pruned (the last to 128 of 512"),
    ],
)
def test_a_script_runs_in_libero_by_two_lines(name, flags, counted, tmp_path):
    """Standard input is closed: by itself, LIBERO would prompt there for the folder of its data."""
    weights = checkpoint(tmp_path / "weights", oft=name == "oft")
    command = [sys.executable, str(script(name, tmp_path / "run")), "--pretrained_checkpoint", str(weights), *flags]
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(vp.__file__).parents[1]), "HOME": str(home)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Caught exception" not in done.stdout
    assert "Episode error" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"vla_pruner.official: {counted} visual tokens)")
    assert not (home / ".libero").exists()
