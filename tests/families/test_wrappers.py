"""`family_of` and sessions on policies that are not modules, and on policies with a reset of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vla_pruner as vp
from tests.families import cases
from vla_pruner.families import family_of


class Wrapped:
    """A policy around transformers' pi0, as `load_policy` makes them."""

    cameras = ("base", "wrist")

    def __init__(self):
        self.case = cases.pi0("sdpa")
        self.module = self.case.build()
        self.resets = 0

    def act(self, scene=0):
        return self.case.step(self.module, scene, slice(0, 2))

    def reset(self):
        self.resets += 1


def test_a_wrapped_policy_is_attached_to_and_names_its_cameras():
    policy = Wrapped()
    with vp.VLAPruner(keep={"base": 4, "wrist": 0.5}, warmup="semantic", preset="paper").attach(policy) as session:
        policy.act()
        assert session.kept is not None
        assert session.kept.shape == (2, 12)
        assert ((session.kept < 16).sum(1) == 4).all()


def test_an_unnamed_camera_cannot_have_a_budget():
    method = vp.VLAPruner(keep={"base": 4, "wrist": 0.5}, preset="paper")
    with pytest.raises(vp.OptionError, match=r"attach\(model, cameras="):
        method.attach(Wrapped().module)
    with pytest.raises(vp.OptionError, match="distinct names"):
        method.attach(Wrapped().module, cameras=("base", "base"))
    policy = Wrapped()
    with method.attach(policy.module, cameras=("wrist", "base")) as session:
        policy.act()
        policy.act()
        assert session.memory is not None


def test_the_number_of_named_cameras_is_checked():
    policy = Wrapped()
    with (
        vp.RandomKeep(keep={"a": 4, "b": 4, "c": 4}).attach(policy.module, cameras=("a", "b", "c")),
        pytest.raises(vp.SessionError, match="holds 2 per row"),
    ):
        policy.act()


def test_a_parallel_wrapper_is_not_unwrapped():
    with pytest.raises(vp.UnsupportedModelError, match="DataParallel"):
        family_of(torch.nn.DataParallel(Wrapped().module))


@pytest.mark.parametrize(
    "build", [Wrapped, lambda: vp.reference_policy("autoregressive"), lambda: vp.random_policy("openvla")]
)
def test_a_policys_own_reset_begins_a_new_episode(build):
    policy = build()
    before = dict(vars(policy))
    with vp.VLAPruner(keep=0.25, preset="paper").attach(policy) as session:
        if isinstance(policy, Wrapped):
            policy.act()
        else:
            size = policy.config.image_size if hasattr(policy.config, "image_size") else 224
            state = None if policy.proprio_size is None else np.zeros(policy.proprio_size, np.float32)
            policy.act({"image": np.zeros((size, size, 3), np.uint8)}, "open the door", state)
        assert session.memory is not None
        policy.reset()
        assert session.memory is None
    assert dict(vars(policy)) == {**before, **({"resets": 1} if isinstance(policy, Wrapped) else {})}
    policy.reset()
