"""The policy of docs/serving.md runs in inspect-robots' mock world, and each trial is an episode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vla_pruner as vp
from tests.docs.pages import blocks, page

robots: Any = pytest.importorskip("inspect_robots", reason="make test-peers installs inspect-robots")

BLOCK = next(block for block in blocks(page("serving.md")) if "PrunedPolicy" in block)
STEPS = 5


def test_trials_are_episodes(tmp_path: Path) -> None:
    from inspect_robots.mock import CubePickEmbodiment
    from inspect_robots.scorer import success_at_end
    from inspect_robots.task import Task

    names: dict[str, Any] = {"__name__": __name__}
    exec(BLOCK, names)
    world = CubePickEmbodiment()
    info = robots.PolicyInfo(name="pruned", action_space=world.info.action_space)
    policy: Any = names["PrunedPolicy"](vp.random_policy("openvla-7b"), info, {"image": "top"})
    kept: list[bool] = []
    act = policy.act

    def noted(observation: Any) -> Any:
        chunk = act(observation)
        kept.append(policy.session.kept is not None)
        return chunk

    policy.act = noted
    scenes = [robots.Scene(id=f"scene-{seed}", instruction="reach the cube", init_seed=seed) for seed in range(2)]
    task = Task(name="reach", scenes=scenes, scorer=success_at_end(), max_steps=STEPS)
    (log,) = robots.eval(task, policy, world, log_dir=str(tmp_path))
    assert log.status == "success"  # the run, and not the arm
    assert kept == ([False] * 3 + [True] * 2) * 2
    policy.session.detach()
