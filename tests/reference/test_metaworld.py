"""The simulator's wrapper: seeds mean the same whatever ran before, and the first image shows the present layout."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from vla_pruner.simulators.metaworld import MAX_CONTROL_STEPS, TASKS, MetaWorldEnv, SimulatorUnavailable


@pytest.fixture(scope="module", autouse=True)
def simulator() -> None:
    try:
        MetaWorldEnv("reach").close()
    except SimulatorUnavailable as missing:
        pytest.skip(str(missing))


@pytest.mark.sim
@pytest.mark.parametrize("task", ["push", "window-open"])
def test_a_seed_fixes_the_start_whatever_ran_before(task: str) -> None:
    with MetaWorldEnv(task) as env:
        first = env.reset(7)
        state = env.state
        env.reset(8)
        assert np.abs(env.state - state).max() > 0.01
        for _ in range(3):
            env.step(np.array([0.5, 1.0, -1.0, 1.0]))
        again = env.reset(7)
        np.testing.assert_array_equal(env.state, state)
        np.testing.assert_array_equal(again.images["image"], first.images["image"])
    with MetaWorldEnv(task) as other:
        np.testing.assert_array_equal(other.reset(7).images["image"], first.images["image"])


@pytest.mark.sim
def test_an_observation() -> None:
    with MetaWorldEnv("reach", image_size=56) as env:
        observation = env.reset(0)
        assert observation.images["image"].shape == (56, 56, 3)
        assert observation.images["image"].dtype == np.uint8
        assert observation.proprio.shape == (4,)
        assert observation.instruction == TASKS["reach"]
        assert env.render(96).shape == (96, 96, 3)
        green = (observation.images["image"][..., 1].astype(int) - observation.images["image"][..., 0]) > 60
        assert green.any()  # the goal is in the picture


@pytest.mark.sim
def test_an_episode_ends_at_the_cap() -> None:
    with MetaWorldEnv("drawer-open", render=False) as env:
        env.reset(0)
        ends = [env.step(np.zeros(4))[2] for _ in range(MAX_CONTROL_STEPS)]
    assert ends == [False] * (MAX_CONTROL_STEPS - 1) + [True]


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match="juggle"):
        MetaWorldEnv("juggle")


def test_a_missing_simulator_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(SimulatorUnavailable, match="pip install"):
        MetaWorldEnv("reach")
