"""Real-time chunking: each chunk is steered towards the rest of the previous one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

from lerobot.policies.rtc.configuration_rtc import RTCConfig

import vla_pruner as vp
from tests.lerobot.test_sessions import STEPS, noise, scene
from tests.lerobot.tiny import KINDS
from tests.state import whole_state
from vla_pruner.auditing.reference import FullLength
from vla_pruner.policies.lerobot import random_lerobot

CALLS = 5
each_kind = pytest.mark.parametrize("kind", KINDS)
# Importing the compiler raises a warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def build(kind):
    policy = random_lerobot(kind, **STEPS[kind])
    module = policy.module
    module.config.rtc_config = RTCConfig(execution_horizon=8)
    module.init_rtc_processor()
    assert module.model._rtc_enabled()
    return policy


def chunk(policy, number, left_over):
    """Run one control step like the rollout's thread; `left_over` are the rows that were not executed."""
    return policy.module.predict_action_chunk(
        scene(policy, number), noise=noise(seed=number), inference_delay=2, prev_chunk_left_over=left_over
    )


def episode(policy, session=None):
    found, left_over = [], None
    for number in range(CALLS):
        found.append(chunk(policy, number, left_over))
        left_over = found[-1][:, 3:]
        for score in () if session is None else (*session.scores.values(), session.memory.action):
            assert score.grad_fn is None
            assert not score.requires_grad
    return found


@each_kind
def test_keep_all_changes_no_bit(kind):
    policy = build(kind)
    untouched = episode(policy)
    before = whole_state(policy.module)
    assert (untouched[1] - chunk(policy, 1, None)).abs().max() > 1e-3, "guidance must show, or this test could not fail"
    for pruned in ("drop", "freeze"):
        with vp.VLAPruner(keep=1.0, window=1, pruned=pruned, preset="paper").attach(policy) as session:
            for one, other in zip(episode(policy, session), untouched, strict=True):
                assert torch.equal(one, other)
    assert whole_state(policy.module) == before


@each_kind
@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_pruned_agrees_with_the_full_length_reference(kind, pruned):
    policy = build(kind)
    untouched = episode(policy)
    with vp.VLAPruner(keep=0.25, window=1, pruned=pruned, preset="paper").attach(policy) as session:
        found = episode(policy, session)
        kept, layout, steps = session.kept, session.step.layout, int(session.memory.steps)
    assert steps == CALLS, "a chunk is a control step"
    assert torch.equal(found[0], untouched[0])
    assert (found[-1] - untouched[-1]).abs().max() > 1e-3, "pruning must show, or this test could not fail"
    with FullLength(policy.module, layout, kept, layer=3, pruned=pruned):
        expected = chunk(policy, CALLS - 1, found[-2][:, 3:])
    assert (found[-1] - expected).abs().max() < 1e-4


@each_kind
def test_without_gradients_of_the_weights_it_is_the_same_chunk(kind):
    """The advice of docs/lerobot.md is right: the guidance never reaches the weights."""
    policy = build(kind)
    with vp.VLAPruner(keep=0.25, window=1, preset="paper").attach(policy) as session:
        found = episode(policy, session)
        policy.module.requires_grad_(False)
        session.reset()
        for one, other in zip(episode(policy, session), found, strict=True):
            assert torch.equal(one, other)


def test_compiled():
    policy = build("pi05")
    policy.module.requires_grad_(False)
    with vp.VLAPruner(keep=0.25, window=1, preset="paper").attach(policy) as session:
        found = episode(policy, session)
    with vp.VLAPruner(keep=0.25, window=1, preset="paper").attach(policy) as session:
        session.compile("eager")
        for one, other in zip(episode(policy, session), found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
