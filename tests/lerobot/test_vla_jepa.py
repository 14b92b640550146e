"""LeRobot's VLA-JEPA: the rows for embodied actions act, in the prompt's own pass."""

from __future__ import annotations

import contextlib

import pytest
import torch

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")
pytest.importorskip("diffusers", reason="diffusers is not installed; make test-lerobot installs it")

from lerobot.policies.vla_jepa import modeling_vla_jepa

import vla_pruner as vp
from tests.families import matrix
from tests.state import whole_state
from vla_pruner.policies.vla_jepa_random import random_vla_jepa_policy

BOTH = slice(0, 2)
each_pruned = pytest.mark.parametrize("pruned", matrix.POLICIES)


@pytest.fixture
def in_float32(monkeypatch):
    """Run the decoder in float32: LeRobot runs it in half precision, whatever the dtype of its weights."""
    monkeypatch.setattr(modeling_vla_jepa, "_get_autocast_context", lambda *_: contextlib.nullcontext())


def step(policy, scene, rows):
    """Run a control step of two robots, whose prompts differ in length, each with its own noise."""
    generator = torch.Generator().manual_seed(scene)
    batch = {key: torch.rand(2, 3, 80, 100, generator=generator)[rows] for key in policy.module.config.image_features}
    batch["observation.state"] = torch.zeros(2, 8)[rows]
    noise = torch.randn(2, 7, 7, generator=torch.Generator().manual_seed(3))[rows]
    original = torch.randn
    torch.randn = lambda *_, **__: noise
    try:
        return policy.module.predict_action_chunk({**batch, "task": ["put the bowl on the plate", "open it"][rows]})
    finally:
        torch.randn = original


CASE = matrix.Case("lerobot-vla-jepa", random_vla_jepa_policy, step)


@pytest.mark.usefixtures("in_float32")
class TestMatrix:
    def test_visual_tokens_are_what_depends_on_the_images(self):
        matrix.check_layout(CASE)

    @each_pruned
    def test_keep_all_changes_no_bit(self, pruned):
        matrix.check_keep_all(CASE, pruned)

    @each_pruned
    @pytest.mark.parametrize("keep", matrix.KEEPS)
    def test_pruned_agrees_with_the_full_length_reference(self, pruned, keep):
        matrix.check_reference(CASE, keep, pruned)

    @each_pruned
    def test_progressive_pruning_agrees_with_the_full_length_reference(self, pruned):
        matrix.check_progressive(CASE, pruned)

    @each_pruned
    def test_nothing_is_left_behind(self, pruned):
        matrix.check_no_trace(CASE, pruned)

    @each_pruned
    def test_episodes_do_not_leak(self, pruned):
        matrix.check_episodes(CASE, pruned)

    @each_pruned
    def test_rows_are_what_single_robots_are(self, pruned):
        matrix.check_rows(CASE, pruned)

    def test_action_score_is_that_of_the_embodied_rows(self):
        policy = CASE.build()
        inner, ids = policy.module.model, []
        original = inner.qwen.build_inputs
        inner.qwen.build_inputs = lambda **given: ids.append(original(**given)) or ids[-1]
        with vp.ActionOnly(keep=1.0).attach(policy) as session:
            step(policy, 0, BOTH)
            score, layout = session.scores["action"], session.step.layout
        decoder, found = inner.qwen.model.model.language_model, []
        acts = ids[0]["input_ids"] == inner.embodied_action_token_id
        assert acts.sum(dim=1).tolist() == [6, 6]
        assert torch.equal(layout.reading, layout.prompt & ~acts), "they read no prompt"

        def read(module, args, output):
            rows = [weights[:, here].mean(dim=(0, 1)) for weights, here in zip(output[1], acts, strict=True)]
            found.append(torch.stack(rows))

        backend, decoder.config._attn_implementation = decoder.config._attn_implementation, "eager"
        hooks = [layer.self_attn.register_forward_hook(read) for layer in decoder.layers[4:]]
        step(policy, 0, BOTH)
        decoder.config._attn_implementation = backend
        for hook in hooks:
            hook.remove()
        expected = torch.stack(found).mean(dim=0).gather(1, layout.visual)
        assert len(found) == 4
        assert (score - expected).abs().max() < 1e-6


@each_pruned
def test_as_lerobot_runs_it(pruned):
    policy = random_vla_jepa_policy()
    untouched = step(policy, 0, BOTH)
    with vp.VLAPruner(keep=1.0, pruned=pruned, preset="paper").attach(policy):
        assert torch.equal(step(policy, 0, BOTH), untouched)
    with vp.VLAPruner(keep=0.5, window=1, pruned=pruned, preset="paper").attach(policy):
        for scene in range(2):
            assert step(policy, scene, BOTH).isfinite().all()


def test_what_is_not_supported_is_refused():
    policy = random_vla_jepa_policy()
    before = whole_state(policy.module)
    with pytest.raises(vp.BudgetError, match="a layer from 1 to 7"):
        vp.VLAPruner(layer=0, refresh_every=9, preset="paper").attach(policy)
    assert whole_state(policy.module) == before
    with vp.VLAPruner(preset="paper").attach(policy), pytest.raises(vp.SessionError, match="detach before training"):
        policy.module.forward({})
