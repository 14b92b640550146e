"""The demo in the real simulator, with an untrained policy: the wiring, not the success."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from vla_pruner.demo import DemoError, DemoSettings, run_demo
from vla_pruner.models.chunk import save_chunk_policy
from vla_pruner.models.reference import ReferenceConfig, ReferencePolicy, save_policy
from vla_pruner.policies.random import random_policy
from vla_pruner.simulators import metaworld

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module", autouse=True)
def _simulator() -> None:
    try:
        metaworld.MetaWorldEnv("push", 32).close()
    except metaworld.SimulatorUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five looks an episode, with four commands after each."""
    monkeypatch.setattr(metaworld, "MAX_COMMANDS", 20)


def test_four_arms_run_the_same_episode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    instruction = metaworld.TASKS["push"]
    config = ReferenceConfig(
        image_size=48,
        vision_width=16,
        vision_heads=2,
        hidden_size=32,
        num_layers=6,
        num_heads=2,
        num_key_value_heads=2,
        words=tuple(sorted(set(instruction.split()))),
        tasks=(("push", instruction),),
    )
    save_policy(ReferencePolicy(config), tmp_path / "weights")
    settings = DemoSettings(
        tasks=("push",), episodes=1, out=tmp_path / "out", weights=tmp_path / "weights", compile=False
    )
    assert run_demo(settings, Console(quiet=True)) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [episode["pruned_steps"] for episode in results["episodes"]] == [0, 2, 2, 5]
    assert [arm["cost"]["visual_tokens_kept"] for arm in results["arms"]] == [36, 9, 9, 9]
    assert len(results["conditions"]["weights_sha256"]) == 64


def test_the_two_camera_policy_runs_the_same_episode(tmp_path: Path) -> None:
    policy: Any = random_policy("reference-chunk")
    save_chunk_policy(policy, tmp_path / "weights")
    settings = DemoSettings(
        tasks=("push",), episodes=1, out=tmp_path / "out", weights=tmp_path / "weights", compile=False
    )
    assert run_demo(settings, Console(quiet=True)) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [episode["steps"] for episode in results["episodes"]] == [5] * 4
    assert [episode["pruned_steps"] for episode in results["episodes"]] == [0, 2, 2, 5]
    assert results["conditions"]["cameras"] == ["image", "wrist_image"]


def test_a_policy_of_another_simulator_is_refused(tmp_path: Path) -> None:
    policy: Any = random_policy("reference-chunk")
    policy.config = replace(policy.config, suite="simpler")
    save_chunk_policy(policy, tmp_path / "weights")
    settings = DemoSettings(
        tasks=("push",), episodes=1, out=tmp_path / "out", weights=tmp_path / "weights", compile=False
    )
    with pytest.raises(DemoError, match="trained in 'simpler'; the demo runs policies of metaworld, libero_object"):
        run_demo(settings, Console(quiet=True))
