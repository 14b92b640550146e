"""Random policies see, attend, and are the same for the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vla_pruner as vp
from vla_pruner.policies import random
from vla_pruner.policies.base import Policy, module_of

HERE = ("reference", "reference-chunk", "openvla", "openvla-oft", "pi0")


def act(policy, seed):
    side = getattr(policy, "image_size", 64)
    draws = np.random.default_rng(seed)
    images = {camera: draws.integers(0, 256, (side, side, 3), dtype=np.uint8) for camera in policy.cameras}
    proprio = None if policy.proprio_size is None else np.zeros(policy.proprio_size)
    torch.manual_seed(0)
    return policy.act(images, getattr(policy, "instructions", ("lift the cup",))[0], proprio)


@pytest.mark.parametrize("name", HERE)
def test_actions_follow_images_and_seeds(name):
    policy, same, other = (vp.random_policy(name, seed=seed) for seed in (0, 0, 1))
    assert isinstance(policy, Policy)
    first = act(policy, 0)
    np.testing.assert_array_equal(act(same, 0), first)
    assert np.abs(act(other, 0) - first).max() > 1e-3
    assert np.abs(act(policy, 1) - first).max() > 1e-3
    assert not module_of(policy).training


@pytest.mark.parametrize("seed", [-1, "x", 2**40, True])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(vp.OptionError, match="was given; it is an int of 0 or more"):
        vp.random_policy("reference-chunk", seed=seed)


@pytest.mark.parametrize("name", ["reference", "reference-chunk", "pi0"])
def test_attention_is_peaked(name):
    """Some tokens receive several times what others do, or a choice among them would be noise."""
    policy = vp.random_policy(name)
    with vp.VLAPruner(keep=0.25, preset="paper").attach(policy) as session:
        act(policy, 0)
        action = session.scores["action"][0].sort().values
    count = len(action) // 10
    assert action[-count:].mean() > 5 * action[:count].mean()


@pytest.mark.parametrize("name", ["reference", "reference-chunk", "pi0"])
def test_every_weight_is_drawn(name):
    """A weight that is built without a start must not keep the content of its memory."""
    module = module_of(vp.random_policy(name))
    own = {"visual_position", "vision.position", "action_rows"}  # made by the policy itself
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    random.draw_weights(module, seed=0)
    left = {key for key, parameter in module.named_parameters() if parameter.isnan().any()}
    assert left <= own


def test_dtype_and_device_are_where_they_were_asked():
    for name in HERE:
        module = module_of(vp.random_policy(name, dtype=torch.bfloat16))
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_the_two_camera_policy_has_the_shape_that_is_trained():
    from reference.chunk.train import CONFIGS

    policy: Any = vp.random_policy("reference-chunk", size="full")
    assert policy.config == CONFIGS["metaworld"]
    assert policy.config.num_visual_tokens == 512


def test_published_size_of_pi0_without_its_memory(monkeypatch):
    """Built on "meta": sizes alone."""
    monkeypatch.setattr(random, "draw_weights", lambda *_: None)
    policy = vp.random_policy("pi0", size="full", device="meta", dtype=torch.bfloat16)
    count = sum(parameter.numel() for parameter in module_of(policy).parameters())
    assert 3.4e9 < count < 3.6e9
    assert policy.cameras == ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


def test_refusals():
    with pytest.raises(vp.UnsupportedModelError, match=r"'gpt' was given; .*openvla-oft"):
        vp.random_policy("gpt")
    with pytest.raises(vp.UnsupportedModelError, match="'tiny' or 'full'"):
        vp.random_policy("pi0", size="huge")


def test_a_missing_lerobot_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lerobot", None)
    for name in ("lerobot-pi0", "lerobot-pi05", "lerobot-smolvla", "smolvla"):
        with pytest.raises(vp.UnsupportedModelError, match=r"lerobot is not installed\. It needs Python 3\.12"):
            vp.random_policy(name)
