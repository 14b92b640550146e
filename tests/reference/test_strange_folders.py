"""Folders of the reference policy that lie, and a policy that is not finite."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import vla_pruner as vp
from vla_pruner.models.reference import network, save_policy


@pytest.fixture
def policy() -> Any:
    return vp.random_policy("reference")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", 10**6),
        ("num_layers", 8.0),
        ("vision_layers", 10**6),
        ("image_size", 10**9),
        ("hidden_size", 10**7),
        ("num_heads", 3),
        ("num_bins", 2**40),
        ("patch_size", 0),
        ("proprio_scale", [0, 0, 0, 0]),
        ("proprio_mean", [float("nan")] * 4),
        ("proprio_mean", ["x"] * 4),
        ("words", [1, 2]),
        ("words", "abc"),
        ("tasks", [["a"]]),
        ("tasks", [[1, 2]]),
        ("rope_theta", -1),
        ("instruction_length", True),
    ],
)
def test_configs_that_lie_are_refused_before_memory_is_spent(policy, tmp_path, monkeypatch, name, value):
    save_policy(policy, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
    monkeypatch.setattr("vla_pruner.models.saved.read_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(vp.CheckpointError, match=r"config\.json"):
        vp.load_policy(tmp_path)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(policy, tmp_path, wrong):
    with torch.no_grad():
        policy.language_model.lm_head.weight[-1] = wrong
    save_policy(policy, tmp_path)
    with pytest.raises(vp.CheckpointError, match=r"model\.safetensors hold numbers that are not finite.*lm_head"):
        vp.load_policy(tmp_path)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_network_of_nan_does_not_act(policy, rows):
    """The most likely of logits that are NaN would be the lowest bin: the hardest of all actions."""
    side = policy.image_size
    images = np.zeros((rows, side, side, 3), np.uint8)
    given = (images, policy.instructions[0], np.zeros((rows, policy.proprio_size)))
    assert np.isfinite(policy.predict_action(*given)).all()
    with torch.no_grad():
        for weight in policy.parameters():
            weight.fill_(torch.nan)
    with pytest.raises(vp.CheckpointError, match=r"not finite .* in float32, though its inputs are finite"):
        policy.predict_action(*given)


def test_one_late_logit_is_enough(policy, monkeypatch):
    calls = []

    def spoil(module, args, output):
        calls.append(module)
        if len(calls) == policy.config.action_dimensions:
            output.logits[0, -1, network.BOS - 1] = torch.nan

    policy.language_model.register_forward_hook(spoil)
    side = policy.image_size
    with pytest.raises(vp.CheckpointError, match="not finite"):
        policy.act({"image": np.zeros((side, side, 3), np.uint8)}, policy.instructions[0], np.zeros(4))
