"""What a user may do with any of LeRobot's policies: ask what is pruned, show other images, leave a camera out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

import vla_pruner as vp
from vla_pruner.policies.base import example_of
from vla_pruner.policies.eo1_random import random_eo1_policy
from vla_pruner.policies.groot_random import random_groot_policy
from vla_pruner.policies.lerobot import random_lerobot
from vla_pruner.policies.molmoact2_random import random_molmoact2_policy
from vla_pruner.policies.vla_jepa_random import random_vla_jepa_policy

POLICIES = {
    "pi0": lambda: random_lerobot("pi0"),
    "pi0_fast": lambda: random_lerobot("pi0_fast"),
    "smolvla": lambda: random_lerobot("smolvla"),
    "molmoact2": random_molmoact2_policy,
    "eo1": random_eo1_policy,
    "groot": random_groot_policy,
    "vla_jepa": random_vla_jepa_policy,
}
LACKING_NONE = ("eo1", "vla_jepa")


@pytest.mark.parametrize("name", POLICIES)
def test_it_is_explained_before_a_step_and_after_it(name):
    policy = POLICIES[name]()
    seen = example_of(policy)
    shares = set()
    for target in (policy, policy.module):
        with vp.FastV(keep=0.5, layer=2).attach(target) as session:
            before = vp.explain(session)
            assert session.step is None, "explaining runs no control step"
            policy.act(seen.images, seen.instruction, seen.proprio)
            step, memory = session.step, session.memory
            found = vp.explain(session)
            assert session.step is step
            assert torch.equal(session.memory.steps, memory.steps)
        assert found.share is not None
        assert found.ceiling > 1
        shares.add((found.share, found.ceiling, found.whole_step))
        assert before.untouched == found.untouched
        assert ("decoding" in str(found)) == (name == "pi0_fast")
        assert "attach(model, cameras" not in str(found), "no family of LeRobot takes that"
        with pytest.raises(vp.UnsupportedModelError) as refused, vp.FastV(keep=0.5, layer=2).attach(target) as session:
            session.export({})
        assert ("session.compile()" in str(refused.value)) == ("compile" not in dict(found.refused))
    if name not in ("eo1", "groot"):  # their prompts are known of random policies alone
        assert len(shares) == 1, "LeRobot's own class has the share of the policy around it"
    assert found.whole_step == (name not in ("eo1", "groot"))


@pytest.mark.parametrize("name", POLICIES)
def test_images_may_have_sizes_of_their_own(name):
    policy = POLICIES[name]()
    seen = example_of(policy)
    first = next(iter(seen.images))
    images = {**seen.images, first: np.zeros((30, 90, 3), np.uint8)}
    with vp.FastV(keep=0.5, layer=2).attach(policy):
        assert np.isfinite(policy.act(images, seen.instruction, seen.proprio)).all()


@pytest.mark.parametrize("name", POLICIES)
def test_a_camera_is_left_out_where_lerobot_allows_it(name):
    policy = POLICIES[name]()
    seen = example_of(policy)
    (absent, _), *present = seen.images.items()
    assert policy.takes_absent_cameras == (name not in LACKING_NONE)
    with vp.FastV(keep=0.5, layer=2).attach(policy):
        if policy.takes_absent_cameras:
            assert np.isfinite(policy.act(dict(present), seen.instruction, seen.proprio)).all()
        else:
            with pytest.raises(vp.ObservationError, match=f"No image of '{absent}' was given"):
                policy.act(dict(present), seen.instruction, seen.proprio)
