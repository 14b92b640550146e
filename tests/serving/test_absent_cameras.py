"""ALOHA's simulation sends one camera of three: the server masks the others, logs it, and prunes the one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import vla_pruner as vp
from tests.serving.robots import WAIT
from vla_pruner.client import PolicyClient, ServerError
from vla_pruner.policies.pi0 import CAMERAS, TransformersPI0
from vla_pruner.serving import PolicyServer

KEYS = ("cam_high", "cam_left_wrist", "cam_right_wrist")


@pytest.fixture
def three_cameras() -> TransformersPI0:
    made: Any = vp.random_policy("pi0")
    scaling = {"state_mean": np.zeros(14), "state_std": np.ones(14)}
    return TransformersPI0(made.module, CAMERAS, made.tokenizer, scaling)


def sent(step: int, *cameras: str) -> dict[str, Any]:
    random = np.random.default_rng(step)
    images = {name: random.integers(0, 256, (3, 112, 112), dtype=np.uint8) for name in cameras}
    return {"state": np.full(14, 0.1 * step), "images": images, "prompt": "transfer the cube"}


def test_one_camera_of_three(
    three_cameras: TransformersPI0, serve: Callable[..., PolicyServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(three_cameras, observations="aloha", seed=3)
    with caplog.at_level(logging.INFO, "vla_pruner.serving"), PolicyClient(server.url, timeout=WAIT) as client:
        one = [client.infer(sent(step, "cam_high")) for step in range(5)]
        two = client.infer({**sent(0, "cam_high", "cam_left_wrist"), "reset": True})
        with pytest.raises(ServerError, match="'images/cam_left' is none of the layout's images"):
            client.infer(sent(0, "cam_high", "cam_left"))
    assert [answer["policy_timing"]["kept_tokens"] for answer in one] == [64.0] * 3 + [16.0] * 2
    assert [answer["policy_timing"]["total_tokens"] for answer in one] == [64.0] * 5
    assert two["policy_timing"]["total_tokens"] == 128.0
    assert {answer["actions"].shape for answer in one} == {(10, 14)}
    told = [record.getMessage() for record in caplog.records]
    first = "Robot 1 sends no images/cam_left_wrist and no images/cam_right_wrist; the policy takes it as absent."
    assert told.count(first) == 1
    assert told.count("Robot 1 sends no images/cam_right_wrist; the policy takes it as absent.") == 1
    server.stop()
    # The same as the policy itself with this one image, from the noise of the server for a robot's first step.
    torch.manual_seed(3 * 1_000_003**2)
    alone = three_cameras.act(
        {CAMERAS[0]: sent(0, "cam_high")["images"]["cam_high"].transpose(1, 2, 0)},
        "transfer the cube",
        np.zeros(14, np.float32),
    )
    assert np.array_equal(one[0]["actions"], alone[:, :14])


def test_all_cameras_are_as_before(three_cameras: TransformersPI0, serve: Callable[..., PolicyServer]) -> None:
    server = serve(three_cameras, observations="aloha", action_horizon=4)
    with PolicyClient(server.url, timeout=WAIT) as client:
        assert client.metadata["action_horizon"] == 4
        answer = client.infer(sent(0, *KEYS))
    assert answer["policy_timing"]["total_tokens"] == 192.0
    assert answer["actions"].shape == (4, 14)
