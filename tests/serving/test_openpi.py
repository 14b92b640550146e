"""The real peer: PyPI's openpi-client, in an environment of its own, drives episodes against the server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vla_pruner as vp
from tests.serving.robots import WAIT
from vla_pruner.policies.pi0 import TransformersPI0
from vla_pruner.serving import PolicyServer, ServerSettings
from vla_pruner.simulators.metaworld import EVALUATION_SEED, TASKS

ROOT = Path(__file__).parents[2]
THREE = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
PYTHON = Path(os.environ.get("OPENPI_PYTHON", ROOT / ".venv-openpi" / "bin" / "python"))
METHOD = vp.VLAPruner(keep=0.25, preset="paper")

without_openpi = pytest.mark.skipif(not PYTHON.is_file(), reason=f"no {PYTHON}; make test-openpi makes it")


@pytest.mark.sim
@without_openpi
def test_a_closed_loop_with_openpis_client(tmp_path: Path) -> None:
    """The episode is solved, and every action is the one that the policy gives in this process for the same
    observations.
    """
    out = tmp_path / "episode.npz"
    with PolicyServer(vp.reference_policy("autoregressive"), METHOD, ServerSettings(port=0)) as server:
        command = [str(PYTHON), str(ROOT / "tests/serving/stock_client.py"), "127.0.0.1", str(server.port)]
        done = subprocess.run(
            [*command, "push", str(EVALUATION_SEED), str(out)],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            timeout=5 * WAIT,
        )
    assert done.returncode == 0, done.stderr
    episode: Any = np.load(out)
    said = json.loads(str(episode["said"]))
    assert said["success"]
    assert not said["torch"]
    assert said["metadata"]["model"] == "ReferencePolicy"
    assert "has no 'observation/image'" in said["error"]
    keys = {(group, key) for timing in said["timings"] for group, values in timing.items() for key in values}
    assert {("policy_timing", "kept_tokens"), ("server_timing", "prev_total_ms")} <= keys
    for timing in said["timings"]:  # openpi's own recorder needs every number in every reply
        assert {(group, key) for group, values in timing.items() for key in values} == keys
    kept = [timing["policy_timing"]["kept_tokens"] for timing in said["timings"]]
    assert kept == [196.0] * 3 + [49.0] * (len(kept) - 3)
    assert len(kept) > 5

    policy = vp.reference_policy("autoregressive")
    with METHOD.attach(policy):
        for image, state, action in zip(episode["images"], episode["states"], episode["actions"], strict=True):
            assert np.array_equal(policy.act({"image": image}, TASKS["push"], state)[0], action)


@without_openpi
@pytest.mark.parametrize(
    ("layout", "width", "state", "cameras"),
    [("libero", 7, 8, 2), ("droid", 8, 8, 2), ("aloha", 14, 14, 1)],
)
def test_what_openpis_programs_send_is_served_unchanged(
    layout: str, width: int, state: int, cameras: int, tmp_path: Path
) -> None:
    """The policy is a pi0 with three cameras. A hand that the robot lacks is absent, and ALOHA's simulation sends one
    camera and no prompt.
    """
    out = tmp_path / "chunks.npz"
    made: Any = vp.random_policy("pi0")
    scaling = {"state_mean": np.zeros(state), "state_std": np.ones(state)}
    policy = TransformersPI0(made.module, THREE, made.tokenizer, scaling)
    settings = ServerSettings(port=0, observations=layout, default_prompt="transfer the cube")
    with PolicyServer(policy, METHOD, settings) as server:
        command = [str(PYTHON), str(ROOT / "tests/serving/stock_shapes.py"), layout, "127.0.0.1", str(server.port)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run([*command, str(out)], env=environment, capture_output=True, text=True, timeout=5 * WAIT)
    assert done.returncode == 0, done.stderr
    found: Any = np.load(out)
    said = json.loads(str(found["said"]))
    assert found["chunks"].shape == (5, 10, width)
    assert said["one"] == [width]
    assert (said["metadata"]["action_horizon"], said["metadata"]["action_dim"]) == (10, width)
    tokens = 64 * cameras
    assert said["kept"] == [tokens] * 3 + [tokens // 4] * 2
