"""The demo in the real simulator, with an untrained policy: the wiring, not the success."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vla_pruner.demo import DemoSettings, run_demo
from vla_pruner.models.reference import ReferenceConfig, ReferencePolicy, save_policy
from vla_pruner.simulators import metaworld

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module", autouse=True)
def _simulator() -> None:
    try:
        metaworld.MetaWorldEnv("push", 32).close()
    except metaworld.SimulatorUnavailable as error:
        pytest.skip(str(error))


def test_five_arms_run_the_same_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metaworld, "MAX_CONTROL_STEPS", 5)
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
    settings = DemoSettings(tasks=("push",), episodes=1, out=tmp_path / "out", weights=tmp_path / "weights")
    assert run_demo(settings, Console(quiet=True)) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [episode["pruned_steps"] for episode in results["episodes"]] == [0, 2, 2, 2, 5]
    assert [arm["cost"]["visual_tokens_kept"] for arm in results["arms"]] == [36, 9, 9, 4, 9]
    assert len(results["conditions"]["weights_sha256"]) == 64
