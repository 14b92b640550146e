"""Meta-World through the common interface."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vla_pruner.errors import SessionError
from vla_pruner.models.reference import ReferenceConfig, ReferencePolicy
from vla_pruner.observations import Observation
from vla_pruner.policies.random import random_policy
from vla_pruner.simulators import (
    Environment,
    SeesTheState,
    SimulatorUnavailable,
    Suite,
    SuiteError,
    find_suite,
    metaworld,
)
from vla_pruner.simulators.metaworld_suite import MetaWorldExpert, MetaWorldSuite

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def suite() -> MetaWorldSuite:
    try:
        metaworld.MetaWorldEnv("push", 32).close()
    except SimulatorUnavailable as error:
        pytest.skip(str(error))
    return MetaWorldSuite("metaworld:mt4", image_size=32)


@pytest.fixture(scope="module")
def environment(suite):
    with_push = suite.make("push")
    yield with_push
    with_push.close()


def test_the_suite_says_what_there_is(suite):
    assert isinstance(suite, Suite)
    assert [task.name for task in suite.tasks] == ["reach", "push", "pick-place", "coffee-push"]
    assert suite.tasks[1].instruction == "push the puck to the ball"
    assert {task.max_steps for task in suite.tasks} == {160}
    assert {task.initial_states for task in suite.tasks} == {None}
    assert set(suite.versions()) == {"metaworld", "mujoco", "gymnasium", "renderer"}
    assert len(find_suite("metaworld:mt8").tasks) == 8
    assert "plate-slide" in [task.name for task in find_suite("metaworld:mt6").tasks]
    with pytest.raises(SuiteError, match="metaworld:mt9"):
        MetaWorldSuite("metaworld:mt9")


def test_an_initial_state_is_the_published_seeds_episode(suite, environment):
    assert isinstance(environment, Environment)
    seen, info = environment.reset(initial_state=3)
    first = seen.images["corner"]
    assert info == {"success": False}
    environment.reset(initial_state=4)
    assert not np.array_equal(environment.reset(initial_state=4)[0].images["corner"], first)
    again, _ = environment.reset(initial_state=3)
    np.testing.assert_array_equal(again.images["corner"], first)
    with metaworld.MetaWorldEnv("push", 32) as alone:
        np.testing.assert_array_equal(alone.reset(metaworld.EVALUATION_SEED + 3).images["image"], first)
    with pytest.raises(SuiteError, match="from 0 on; found -1"):
        environment.reset(initial_state=-1)


def test_images_are_drawn_when_looked_at_and_not_later(environment):
    drawn = environment.images_drawn
    seen, _ = environment.reset(initial_state=0)
    after, *_ = environment.step(np.zeros(4))
    assert environment.images_drawn == drawn
    with pytest.raises(SessionError, match="moved on"):
        seen.images["corner"]
    assert after.images["corner"].shape == (32, 32, 3)
    assert after.images["corner"] is after.images["corner"]
    assert environment.images_drawn == drawn + 1
    assert environment.frame(48).shape == (48, 48, 3)


def test_the_expert_succeeds_and_doing_nothing_is_truncated(suite, environment):
    expert = suite.expert()
    assert isinstance(suite.expert(), SeesTheState)
    with pytest.raises(SessionError, match="call watch"):
        MetaWorldExpert().act({}, "")
    environment.reset(initial_state=0)
    expert.watch(environment)
    ends = _run(environment, lambda: expert.act({}, "")[0])
    assert ends[-1] == (1.0, True, False, {"success": True})
    assert len(ends) < 160
    with pytest.raises(SessionError, match="episode is over"):
        environment.step(np.zeros(4))
    environment.reset(initial_state=0)
    ends = _run(environment, lambda: np.zeros(4))
    assert ends[-1] == (0.0, False, True, {"success": False})
    assert len(ends) == 160


def _run(environment, act):
    ends = []
    while not ends or not (ends[-1][1] or ends[-1][2]):
        _, *end = environment.step(act())
        ends.append(tuple(end))
    return ends


def test_the_one_camera_episode_is_that_of_the_simulator_alone(suite, environment):
    """Every look, and every command in between, is that of one control step that repeats its action four times."""
    convention = suite.convention(ReferencePolicy(ReferenceConfig(image_size=32)))
    seen, _ = environment.reset(initial_state=0)
    expert, looks, over = metaworld.scripted_expert("push"), 0, False
    with metaworld.MetaWorldEnv("push", 32) as alone:
        expected, success = alone.reset(metaworld.EVALUATION_SEED), False
        while not over:
            shown = convention.observe(seen)
            images, proprio = shown.images, shown.proprio
            np.testing.assert_array_equal(images["image"], expected.images["image"])
            np.testing.assert_array_equal(proprio, expected.proprio)
            looks += 1
            action = expert(environment.state)
            expected, success, over = alone.step(action)
            for command in convention.plan(action[None]):
                seen, _, solved, truncated, _ = environment.step(command)
                if solved or truncated:
                    break
            assert (solved or truncated, solved) == (over, success)
    assert success
    assert looks > 3


@pytest.mark.usefixtures("suite")
def test_the_two_camera_policy_sees_both_cameras_and_carries_out_half_a_chunk():
    suite = MetaWorldSuite("metaworld:mt4", image_size=64)
    assert suite.cameras == ("corner", "corner_64", "wrist_64")
    assert MetaWorldSuite().cameras == ("corner", "corner_128", "wrist_128")
    policy: Any = random_policy("reference-chunk")
    convention = suite.convention(policy)
    chunk = np.arange(32.0).reshape(8, 4)
    np.testing.assert_array_equal(convention.plan(chunk), chunk[:4])
    environment = suite.make("push")
    with metaworld.MetaWorldEnv("push", 64, render=False) as alone:
        seen, _ = environment.reset(initial_state=2)
        alone.reset(metaworld.EVALUATION_SEED + 2)
        shown = convention.observe(seen)
        images, proprio = shown.images, shown.proprio
        np.testing.assert_array_equal(images["image"], alone.image(metaworld.CORNER))
        np.testing.assert_array_equal(images["wrist_image"], alone.image(metaworld.WRIST))
    assert environment.images_drawn == 2
    assert proprio is not None
    assert policy.act(images, policy.instructions[0], proprio).shape == (8, 4)
    environment.close()
    for change in ({"suite": "libero_object"}, {"cameras": ("image", "side_image")}, {"action_dimensions": 7}):
        other = copy.copy(policy)
        other.config = replace(policy.config, **change)
        with pytest.raises(SuiteError, match="one camera, 'image' of 64 pixels, or two"):
            suite.convention(other)
    with pytest.raises(SuiteError, match="images of 64 pixels and a state of 4"):
        MetaWorldSuite().convention(policy)


def test_the_convention_of_the_reference_policy_and_the_refusal_of_others(suite, environment):
    policy = ReferencePolicy(ReferenceConfig(image_size=32, words=("push",), tasks=(("push", "push"),)))
    convention = suite.convention(policy)
    seen, _ = environment.reset(initial_state=0)
    shown = convention.observe(seen)
    images, proprio = shown.images, shown.proprio
    assert {name: image.shape for name, image in images.items()} == {"image": (32, 32, 3)}
    assert proprio is not None
    assert proprio.shape == (4,)
    assert suite.convention(MetaWorldExpert()).observe(seen) == Observation({}, seen.instruction)

    class Bimanual:
        cameras = ("left", "right")
        proprio_size = 14

    with pytest.raises(SuiteError, match="takes the cameras 'left', 'right' and a state of 14"):
        suite.convention(Bimanual())


def test_options_of_another_simulator_are_refused() -> None:
    with pytest.raises(SuiteError, match=r"metaworld:mt4 has no option 'assets' \(--suite-option\).* are image_size"):
        find_suite("metaworld:mt4", assets="/nope")
