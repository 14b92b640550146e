"""The Python of docs/openvla.md runs as it stands, on policies with random weights."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vla_pruner as vp
from vla_pruner.models.openvla import actions, random_openvla

BLOCKS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "openvla.md").read_text(encoding="utf-8"), re.DOTALL
)


@pytest.fixture
def policy() -> Any:
    return random_openvla(oft=True)


@pytest.fixture
def names(policy):
    random = np.random.default_rng(0)
    return {
        "policy": policy,
        "np": np,
        "torch": torch,
        "instruction": "Pick up the bowl",
        "image": random.integers(0, 256, (256, 256, 3), dtype=np.uint8),
        "wrist_image": random.integers(0, 256, (256, 256, 3), dtype=np.uint8),
        "proprio": random.uniform(-0.4, 0.4, 8),
    }


def test_loading_and_pruning(names, policy, monkeypatch):
    monkeypatch.setattr(vp, "load_policy", lambda name, device: policy, raising=False)
    exec(BLOCKS[0], names)
    assert names["actions"].shape == (8, 7)
    assert names["session"].kept is None  # its history is still empty


def test_the_official_calls_agree_with_act(names, policy):
    stats = policy.norm_stats["random"]["proprio"]
    names.update(unnorm_key="random", normalized_state=actions.normalize_proprio(names["proprio"], stats))
    exec(BLOCKS[1], names)
    images = {name: names[name] for name in policy.cameras}
    expected = policy.act(images, names["instruction"], names["proprio"])
    np.testing.assert_allclose(names["actions"], expected, rtol=0, atol=1e-6)


def test_a_chunk_of_libero(names, policy):
    for name in ("simplejpeg", "PIL"):
        pytest.importorskip(name, reason="LIBERO's JPEG stage needs pillow and simplejpeg (extra libero-images)")
    taken = []

    class Environment:
        def step(self, action):
            taken.append(action)
            return names["observation"], 0.0, False, {}

    names["axis_angle"] = np.zeros(3)
    names["environment"] = Environment()
    names["observation"] = {
        "agentview_image": names["image"],
        "robot0_eye_in_hand_image": names["wrist_image"],
        "robot0_eef_pos": np.zeros(3),
        "robot0_gripper_qpos": np.zeros(2),
    }
    exec(BLOCKS[2], names)
    assert np.shape(taken) == (8, 7)
    assert {action[-1] for action in taken} <= {-1.0, 1.0}
