"""The pieces of training that would fail silently."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from reference.dataset import expert_actions, moved_hands
from reference.evaluate import ARMS, rate, summarise
from reference.experts import EXPERTS, HAND
from reference.packing import packed_forward, pool_grid, suffix_layout, to_bins
from vla_pruner.models.reference import ReferenceConfig, ReferencePolicy
from vla_pruner.simulators.metaworld import TASKS

CONFIG = ReferenceConfig(
    vision_width=32, vision_heads=2, hidden_size=32, num_layers=2, num_heads=2, num_key_value_heads=1, words=("a", "b")
)


def test_packed_suffixes_compute_what_they_compute_alone() -> None:
    torch.manual_seed(0)
    policy = ReferencePolicy(CONFIG).eval()
    text, proprio = torch.randint(0, 4, (2, 3, 6)), torch.rand(2, 3, 4)
    bins = torch.randint(0, CONFIG.num_bins, (2, 3, 4))
    visual = policy.visual_tokens(torch.randint(0, 255, (2, 112, 112, 3), dtype=torch.uint8))
    packed, _ = packed_forward(policy, visual, text, proprio, bins, suffix_layout(CONFIG, 3, pooled=False))
    for number in range(3):
        bos = policy.embed(torch.zeros((2, 1), dtype=torch.long))
        tail = policy.embed(bins[:, number, :3] + CONFIG.first_action_token)
        body = policy.proprio_projector(proprio[:, number])[:, None]
        prompt = torch.cat([bos, visual, policy.embed(text[:, number]), body, tail], dim=1)
        alone = policy.language_model(inputs_embeds=prompt, attention_mask=torch.ones(prompt.shape[:2])).logits
        torch.testing.assert_close(packed[:, number], alone[:, -4:, CONFIG.first_action_token :], atol=1e-4, rtol=0)


def test_pooling_keeps_the_grid() -> None:
    grid = torch.arange(16.0).view(1, 16, 1)
    assert pool_grid(grid).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_bins_round_to_the_nearest() -> None:
    values = torch.linspace(-1, 1, 33)
    assert torch.equal(to_bins(values + 0.02, 33)[:-1], torch.arange(32))
    assert to_bins(torch.tensor([-5.0, 5.0]), 33).tolist() == [0, 32]


def test_hands_that_may_hold_something_hardly_move() -> None:
    states = np.zeros((200, 39))
    states[:, HAND] = [0, 0.6, 0.1]
    states[:100, 4:7] = [0, 0.6, 0.08]
    states[100:, 4:7] = [0, 0.8, 0.02]
    tasks = np.full(200, list(TASKS).index("push"))
    moved = moved_hands(np.random.default_rng(0), tasks, states)
    distance = np.linalg.norm(moved[:, HAND] - states[:, HAND], axis=1)
    assert distance[:100].max() < 0.03 < np.median(distance[100:])


def test_experts_are_bounded_and_cover_every_task() -> None:
    states = np.random.default_rng(0).normal(0, 0.3, (50, 39))
    for number, task in enumerate(TASKS):
        actions = EXPERTS[task](states)
        assert actions.shape == (50, 4)
        assert np.abs(actions).max() <= 1
        np.testing.assert_array_equal(actions, expert_actions(np.full(50, number), states))


def test_arms_have_one_order_whichever_process_finished_first() -> None:
    done = [("reach", "random:keep=0.25", 1.0), ("reach", "blank", 0.0), ("reach", "fastv:keep=0.5", 0.5)]
    done += [("push", "blank", 0.5), ("reach", "policy", 1.0)]
    results = [{"task": task, "arm": arm, "success_rate": share} for task, arm, share in done]
    for given in (results, results[::-1]):
        found = summarise(given, ("policy", "blank", "wrong_scene"))
        assert list(found) == ["policy", "blank", "fastv:keep=0.5", "random:keep=0.25"]
        assert found["blank"] == {"mean": 0.25, "by_task": {"reach": 0.0, "push": 0.5}}
    assert summarise([], ("policy",)) == {}


@pytest.mark.parametrize("name", ["reference_policy", "metaworld_policy", "libero_object_policy"])
def test_the_committed_figures_are_those_of_their_episodes(name: str) -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / f"{name}_success.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["summary"] == summarise(report["results"], ARMS)
    for entry in report["results"]:
        outcomes = entry["success_by_seed"].values()
        assert rate(sum(outcomes), len(outcomes)).items() <= entry.items()
