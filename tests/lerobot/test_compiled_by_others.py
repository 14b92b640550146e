"""Policies that LeRobot compiled: its compiled methods are set aside while a session is attached."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

import vla_pruner as vp
from tests.lerobot.test_sessions import build, noise, scene
from tests.lerobot.tiny import KINDS
from tests.state import whole_state

# Importing the compiler raises a warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def compiled_methods(module):
    """Return the compiled methods on the policy and on its network, by name."""
    parts = {"policy": module, "model": module.model}
    return {
        (part, name): value
        for part, owner in parts.items()
        for name, value in vars(owner).items()
        if hasattr(value, "_torchdynamo_orig_callable")
    }


def chunks(policy, count=3):
    return [policy.module.predict_action_chunk(scene(policy, seed), noise=noise()) for seed in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_its_compiled_methods_are_set_aside_and_put_back(kind):
    """The methods are those that `compile_model=True` and `lerobot-rollout --use_torch_compile` compile."""
    method = vp.VLAPruner(keep=0.25, window=1, preset="paper")
    plain = build(kind)
    untouched = chunks(plain)
    with method.attach(plain):
        expected = chunks(plain)
    policy = build(kind, compile_model=True)
    module = policy.module

    def never(*_):
        raise AssertionError("compiled by LeRobot while a session was attached")

    module.predict_action_chunk = torch.compile(module.predict_action_chunk, backend=lambda *_: never())
    with vp.Unpruned().attach(policy):
        chunks(policy, 1)  # LeRobot notes an attention backend in its configs when it first runs
    there, before = compiled_methods(module), whole_state(module)
    assert set(there) == {("policy", "predict_action_chunk"), ("model", "sample_actions"), ("model", "forward")}
    with method.attach(policy) as session:
        assert not compiled_methods(module)
        for one, other in zip(chunks(policy), expected, strict=True):
            assert torch.equal(one, other)
        assert session.kept is not None
    assert compiled_methods(module) == there
    assert whole_state(module) == before
    with pytest.raises(RuntimeError, match="fell over"), method.attach(policy):
        raise RuntimeError("the robot fell over")
    assert compiled_methods(module) == there
    with vp.VLAPruner(keep=1.0, window=1, preset="paper").attach(policy):
        assert all(torch.equal(one, other) for one, other in zip(chunks(policy), untouched, strict=True))
    assert whole_state(module) == before


def test_ours_are_compiled_in_their_place():
    policy = build("pi0", compile_model=True)
    there = compiled_methods(policy.module)
    method = vp.VLAPruner(keep=0.25, window=1, preset="paper")
    with method.attach(policy):
        expected = chunks(policy)
    before = whole_state(policy.module)
    with method.attach(policy) as session:
        session.compile("eager")
        for one, other in zip(chunks(policy), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert session._runner.compiled.programs > 2
    with vp.compiled(policy, "eager") as compiled:
        chunks(policy, 1)
        assert compiled.programs == 3
    assert compiled_methods(policy.module) == there
    assert whole_state(policy.module) == before
