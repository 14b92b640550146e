"""Scenes of the demo: which suite a policy belongs to, which initial states run, how many environments stay open."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.demo.conftest import FakeEnvironments
from vla_pruner import cli
from vla_pruner.demo import DemoError, DemoSettings, run_demo
from vla_pruner.demo.scenes import Scene, _Opened, suite_of
from vla_pruner.demo.settings import SUITES
from vla_pruner.policies.reference_names import NAMES
from vla_pruner.simulators.base import Convention, Observation


@dataclass
class Stand:
    """An environment of a suite."""

    task: str
    closed: bool = False
    begun: list[int] = field(default_factory=list)

    def begin(self, seed: int) -> Observation:
        assert not self.closed
        self.begun.append(seed)
        images = {"front": np.zeros((8, 8, 3), np.uint8)}
        return Observation(images=images, instruction=self.task, proprio=np.zeros(3, np.float32))

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        return self.begin(99), 0.0, False, bool(action[0] > 2), {"success": False}

    def picture(self, camera: str, size: int) -> np.ndarray:
        return np.full((size, size, 3), len(camera), np.uint8)

    def close(self) -> None:
        self.closed = True


def test_environments_are_closed_when_others_open() -> None:
    made: list[Stand] = []
    opened = _Opened(lambda task: made.append(Stand(task)) or made[-1], most=1)
    convention = Convention({"image": "front"}, proprio=True, horizon=2)
    first, second = Scene("a", opened, convention), Scene("b", opened, convention)
    assert [stand.closed for stand in made] == [True, False]
    look = first.reset(7)
    assert (look.instruction, set(look.images)) == ("a", {"image"})
    assert [stand.task for stand in made] == ["a", "b", "a"]
    assert [stand.closed for stand in made] == [True, True, False]
    _, success, over = first.step(np.array([[0.0], [1.0], [9.0]]))
    assert (success, over, made[2].begun) == (False, False, [7, 99, 99])  # two of three actions
    assert first.step(np.array([[0.0], [9.0]])) == (None, False, True)
    assert first.render(4).shape == (4, 4, 3)
    second.reset(1)
    assert made[2].closed


def test_a_policy_runs_in_the_suite_that_it_was_trained_in(policy: Any) -> None:
    assert suite_of(policy) == "metaworld"
    assert suite_of(SimpleNamespace(config=SimpleNamespace(suite="libero_object"))) == "libero_object"
    assert {suite.policy for suite in SUITES.values()} <= set(NAMES)
    assert DemoSettings().policy == "metaworld"
    assert DemoSettings(suite="libero_object").policy == "libero-object"
    assert DemoSettings(suite="libero_object", weights="folder").policy == "folder"


def test_stored_initial_states_do_not_repeat() -> None:
    assert DemoSettings().first_state("metaworld") == 1_000_000
    assert DemoSettings(episodes=50).first_state("libero_object") == 0
    assert DemoSettings(episodes=1, seed=49).first_state("libero_object") == 49
    with pytest.raises(DemoError, match="50 initial states a task, from 0 on, and 45 \\+ 6 is more"):
        DemoSettings(seed=45).first_state("libero_object")


def test_a_suite_that_the_weights_do_not_know(
    policy: Any, environments: FakeEnvironments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = DemoSettings(suite="libero_object", out=tmp_path / "out", episodes=1)
    with pytest.raises(DemoError, match="trained on metaworld; leave one of them out"):
        run_demo(settings, Console(), policy, environments)
    with pytest.raises(DemoError, match="--suite is simpler; it is one of metaworld, libero_object"):
        DemoSettings(suite="simpler").check()
    with pytest.raises(SystemExit):
        cli.main(["demo", "--suite", "simpler"])
    assert "libero_object" in capsys.readouterr().err
