"""LeRobot's EO-1: its own layers denoise, with the prompt's cache."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

import vla_pruner as vp
from tests.families import matrix
from tests.state import whole_state
from vla_pruner.policies.eo1_random import random_eo1_policy

BOTH = slice(0, 2)
each_pruned = pytest.mark.parametrize("pruned", matrix.POLICIES)


def step(policy, scene, rows):
    """Run a control step of two robots, whose prompts differ in length, each with its own noise."""
    generator = torch.Generator().manual_seed(scene)
    pictures = [list(torch.rand(len(policy.cameras), 3, 80, 100, generator=generator)) for _ in range(2)]
    texts = [list(b"put the bowl on the plate"), list(b"open it")]
    batch = policy.preprocessor.batch(pictures, texts, torch.zeros(2, 8))
    given = {}
    for key, value in batch.items():
        if not isinstance(value, torch.Tensor):
            given[key] = value
        elif key in ("pixel_values", "image_grid_thw"):
            given[key] = value.unflatten(0, (2, -1))[rows].flatten(0, 1)
        else:
            given[key] = value[rows]
    inner = policy.module.model
    noise = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(3))[rows]
    inner.sample_noise = lambda _, device: noise.to(device)
    try:
        return policy.module.predict_action_chunk(given)
    finally:
        del inner.sample_noise


CASE = matrix.Case("lerobot-eo1", random_eo1_policy, step)


def test_visual_tokens_are_what_depends_on_the_images():
    matrix.check_layout(CASE)


@each_pruned
def test_keep_all_changes_no_bit(pruned):
    matrix.check_keep_all(CASE, pruned)


@each_pruned
@pytest.mark.parametrize("keep", matrix.KEEPS)
def test_pruned_agrees_with_the_full_length_reference(pruned, keep):
    matrix.check_reference(CASE, keep, pruned)


@each_pruned
def test_progressive_pruning_agrees_with_the_full_length_reference(pruned):
    matrix.check_progressive(CASE, pruned)


@each_pruned
def test_nothing_is_left_behind(pruned):
    matrix.check_no_trace(CASE, pruned)


@each_pruned
def test_episodes_do_not_leak(pruned):
    matrix.check_episodes(CASE, pruned)


@each_pruned
def test_rows_are_what_single_robots_are(pruned):
    matrix.check_rows(CASE, pruned)


def test_action_score_is_that_of_the_rows_that_are_denoised():
    """The score equals one that is computed here from the attention weights of a second run without a session."""
    policy = CASE.build()
    with vp.ActionOnly(keep=1.0).attach(policy) as session:
        step(policy, 0, BOTH)
        score, layout = session.scores["action"], session.step.layout
    decoder, found = policy.module.model.vlm_backbone.model.language_model, []

    def read(module, args, output):
        if output[1].shape[2] == 8:
            found.append(output[1].mean(dim=(1, 2)))

    backend, decoder.config._attn_implementation = decoder.config._attn_implementation, "eager"
    hooks = [layer.self_attn.register_forward_hook(read) for layer in decoder.layers[3:]]
    step(policy, 0, BOTH)
    decoder.config._attn_implementation = backend
    for hook in hooks:
        hook.remove()
    assert len(found) == 3 * 3, "three denoising steps, the later half of six layers"
    expected = torch.stack(found).mean(dim=0)[:, : layout.length].gather(1, layout.visual)
    assert (score - expected).abs().max() < 1e-6
    assert score.max() > 2 * score.min()


@each_pruned
def test_columns_of_the_step_before_are_gone(pruned):
    """Short layers of the cache hold the prompt and the current rows, and nothing of the previous denoising step."""
    policy = CASE.build()
    decoder, seen = policy.module.model.vlm_backbone.model.language_model, []
    layers = {index: decoder.layers[index] for index in (0, 3, 5)}
    hooks = [
        layer.register_forward_hook(
            lambda _, args, kwargs, output, index=index: seen.append(
                (index, kwargs["past_key_values"].layers[index].keys.shape[2])
            ),
            with_kwargs=True,
        )
        for index, layer in layers.items()
    ]
    with vp.RandomKeep(keep=0.25, pruned=pruned).attach(policy) as session:
        step(policy, 0, BOTH)
        length = session.step.layout.length
    for hook in hooks:
        hook.remove()
    short = length if pruned == "freeze" else length - 96
    assert [held for index, held in seen if index == 0] == [length, *[length + 8] * 3]
    for layer in (3, 5):
        assert [held for index, held in seen if index == layer] == [short, *[short + 8] * 3]


def test_what_is_not_supported_is_refused():
    policy = CASE.build()
    before = whole_state(policy.module)
    with pytest.raises(vp.BudgetError, match="a layer from 1 to 5"):
        vp.VLAPruner(layer=0, refresh_every=9, preset="paper").attach(policy)
    assert whole_state(policy.module) == before
    with vp.VLAPruner(preset="paper").attach(policy), pytest.raises(vp.SessionError, match="detach before training"):
        policy.module.forward({})
    flash = CASE.build()
    flash.module.model.vlm_backbone.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(vp.UnsupportedModelError, match="sdpa and eager"):
        vp.VLAPruner(preset="paper").attach(flash)


def test_bfloat16():
    policy = random_eo1_policy(dtype=torch.bfloat16)
    assert policy.dtype == torch.bfloat16
    untouched = step(policy, 0, BOTH)
    for pruned in matrix.POLICIES:
        with vp.VLAPruner(keep=1.0, pruned=pruned, preset="paper").attach(policy):
            assert torch.equal(step(policy, 0, BOTH), untouched)
        with vp.VLAPruner(keep=0.5, window=1, pruned=pruned, preset="paper").attach(policy):
            for scene in range(2):
                assert step(policy, scene, BOTH).isfinite().all()
