"""The two-camera reference policy behind the server: openpi's keys, and batches in which each robot is alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import vla_pruner as vp
from tests.serving.robots import WAIT, alone, observation, seen
from tests.serving.test_memory import Serve, ok
from vla_pruner.client import PolicyClient
from vla_pruner.serving.engine import Engine, Job, Robot
from vla_pruner.serving.observations import reader_of
from vla_pruner.serving.settings import ServerSettings

METHOD = vp.VLAPruner(keep=0.25, layer=2, pruned="freeze", preset="paper")


@pytest.fixture
def policy() -> Any:
    return vp.random_policy("reference-chunk", "tiny")


def test_its_cameras_are_openpis_keys(policy: Any) -> None:
    reader = reader_of(policy)
    assert dict(reader.keys) == {"image": "observation/image", "wrist_image": "observation/wrist_image"}
    assert reader.state == ("observation/state",)


def test_robots_share_passes_and_each_is_as_if_it_were_alone(policy: Any) -> None:
    engine = Engine(policy, METHOD, reader_of(policy), ServerSettings(max_batch=4))
    engine.open()
    try:
        robots, answers = [Robot(number) for number in range(4)], []
        for step in range(5):
            answers.append(ok(engine.run([Job(robot, seen(policy, robot.number, step)) for robot in robots])))
    finally:
        engine.close()
    assert {answer.batch for step in answers for answer in step} == {4}
    for robot in range(4):
        expected = alone(policy, METHOD, robot, range(5))
        assert [ids is None for _, ids in expected] == [True, True, True, False, False]
        for step, (actions, _) in zip(answers, expected, strict=True):
            assert step[robot].actions.shape == (8, 4)
            np.testing.assert_allclose(step[robot].actions, actions, rtol=0, atol=1e-5)


def test_over_the_wire(policy: Any, serve: Serve) -> None:
    server = serve(policy=policy, pruner=METHOD, batch_window=0.01)

    def drive(robot: int) -> list[np.ndarray]:
        with PolicyClient(server.url, timeout=10 * WAIT) as client:
            return [client.infer(observation(policy, robot, step))["actions"] for step in range(5)]

    with ThreadPoolExecutor(3) as robots:
        driven = list(robots.map(drive, range(3)))
    server.stop()
    for robot, found in enumerate(driven):
        expected = [actions for actions, _ in alone(policy, METHOD, robot, range(5))]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
