"""LeRobot's GR00T N1.7: features and masks shortened together, its transformer's attention, DeepStack, refusals."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")
pytest.importorskip("diffusers", reason="diffusers is not installed; make test-lerobot installs it")

import vla_pruner as vp
from tests.families import matrix
from tests.state import whole_state
from vla_pruner import cli
from vla_pruner.auditing.reference import FullLength
from vla_pruner.policies.groot_random import random_groot_policy

DROP = "drop"
BOTH = slice(0, 2)


def step(policy, scene, rows):
    """Run a control step of two robots with prompts of one length, since LeRobot attends to features of padding."""
    generator = torch.Generator().manual_seed(scene)
    pictures = [list(torch.rand(len(policy.cameras), 3, 80, 100, generator=generator)) for _ in range(2)]
    texts = [list(b"put the bowl on the plate"), list(b"open the drawer and look.")]
    batch = policy.preprocessor.batch(pictures, texts, torch.zeros(2, 8))
    given = {}
    for key, value in batch.items():
        of_images = key in ("pixel_values", "image_grid_thw")
        given[key] = value.unflatten(0, (2, -1))[rows].flatten(0, 1) if of_images else value[rows]
    noise = torch.randn(2, 10, 12, generator=torch.Generator().manual_seed(3))[rows]
    original = torch.randn
    torch.randn = lambda *_, **__: noise
    try:
        return policy.module.predict_action_chunk(given)
    finally:
        torch.randn = original


CASE = matrix.Case("lerobot-groot", random_groot_policy, step)


def test_visual_tokens_are_what_depends_on_the_images():
    matrix.check_layout(CASE)


def test_keep_all_changes_no_bit():
    matrix.check_keep_all(CASE, DROP)


@pytest.mark.parametrize("keep", matrix.KEEPS)
def test_pruned_agrees_with_the_full_length_reference(keep):
    """The reference has the dropped tokens' features, and nothing in the action head may attend to them."""
    matrix.check_reference(CASE, keep, DROP)


def test_progressive_pruning_agrees_with_the_full_length_reference():
    matrix.check_progressive(CASE, DROP)


def test_nothing_is_left_behind():
    matrix.check_no_trace(CASE, DROP)


def test_episodes_do_not_leak():
    matrix.check_episodes(CASE, DROP)


def test_rows_are_what_single_robots_are():
    matrix.check_rows(CASE, DROP)


@pytest.mark.parametrize("layer", [1, 2])
def test_layers_to_which_deepstack_adds(layer):
    policy = CASE.build()
    with vp.RandomKeep(keep=0.25, layer=layer).attach(policy) as session:
        actual = step(policy, 0, BOTH)
        kept, layout = session.kept, session.step.layout
    assert layout.cameras == (64, 64, 64)
    with FullLength(policy, layout, kept, layer=layer):
        assert (actual - step(policy, 0, BOTH)).abs().max() < 1e-4


def test_action_score_is_that_of_the_blocks_that_attend_to_images():
    policy = CASE.build()
    with vp.ActionOnly(keep=1.0).attach(policy) as session:
        step(policy, 0, BOTH)
        score, layout = session.scores["action"], session.step.layout
    blocks, found = policy.module._groot_model.action_head.model.transformer_blocks, []

    def read(module, args, kwargs, output):
        def heads(tensor):
            return tensor.unflatten(-1, (module.heads, -1)).transpose(1, 2)

        features, mask = kwargs["encoder_hidden_states"], kwargs["attention_mask"][:, None, None]
        logits = heads(module.to_q(args[0])) @ heads(module.to_k(features)).transpose(2, 3) * module.scale
        weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
        attended = (weights @ heads(module.to_v(features))).transpose(1, 2).flatten(2)
        assert (module.to_out[0](attended) - output).abs().max() < 1e-4
        assert (weights.gather(3, layout.visual[:, None, None].expand(*weights.shape[:3], -1)).sum(-1) > 0.999).all()
        found.append(weights[:, :, 1:].mean(dim=(1, 2)))  # the first row is the state

    # Of eight blocks the odd ones attend to themselves, and the first of every four to the text.
    hook = blocks[6].attn1.register_forward_hook(read, with_kwargs=True)
    step(policy, 0, BOTH)
    hook.remove()
    assert len(found) == 3
    expected = torch.stack(found).mean(dim=0).gather(1, layout.visual)
    assert (score - expected).abs().max() < 1e-6
    assert score.max() > 1.5 * score.min()


def test_features_and_masks_are_short_together():
    policy = CASE.build()
    seen = []
    head = policy.module._groot_model.action_head
    original = head.process_backbone_output
    head.process_backbone_output = lambda output: seen.append(dict(output)) or original(output)
    with vp.RandomKeep(keep=0.25).attach(policy) as session:
        step(policy, 0, BOTH)
        layout = session.step.layout
    (given,) = seen
    length = layout.length - layout.tokens + 48
    assert given["backbone_features"].shape[1] == length, "no row is there without a feature of its own"
    assert given["image_mask"].sum(dim=1).tolist() == [48, 48]
    assert given["backbone_attention_mask"].shape == (2, length)
    assert given["backbone_features"].abs().sum(dim=2)[given["backbone_attention_mask"]].min() > 0


@pytest.mark.parametrize(
    "command", ["bench --model lerobot-groot --size tiny --threads 1 --iters 2", "audit lerobot-groot --random-weights"]
)
def test_commands_without_a_fate_say_the_one_that_works(command, capsys):
    assert cli.main(command.split()) == 2
    assert 'Drop them: VLAPruner(pruned="drop"), or --pruned drop' in " ".join(capsys.readouterr().err.split())


def test_what_is_not_supported_is_refused():
    policy = CASE.build()
    before = whole_state(policy.module)
    for method in (vp.VLAPruner(), vp.VLAPruner(pruned="freeze", preset="paper"), vp.FastV(pruned="freeze")):
        with pytest.raises(
            vp.UnsupportedModelError,
            match=rf'^{type(method).__name__} has pruned=.freeze.*VLAPruner\(pruned="drop"\), or --pruned drop',
        ):
            method.attach(policy)
    with pytest.raises(vp.BudgetError, match="a layer from 1 to 5"):
        vp.VLAPruner(layer=0, refresh_every=9, preset="paper").attach(policy)
    assert whole_state(policy.module) == before
    with vp.VLAPruner(preset="paper").attach(policy), pytest.raises(vp.SessionError, match="detach before training"):
        policy.module.forward({})
    images = list(torch.rand(3, 3, 80, 80))
    batch = policy.preprocessor.batch([images[:1], images[1:]], [[5, 6], [7]], torch.zeros(2, 8))
    with vp.VLAPruner(preset="paper").attach(policy), pytest.raises(vp.SessionError, match="as many images"):
        policy.module.predict_action_chunk(batch)


def test_under_autocast_as_lerobot_runs_it():
    policy = random_groot_policy(dtype=torch.bfloat16)
    assert policy.module.config.use_bf16
    untouched = step(policy, 0, BOTH)
    with vp.VLAPruner(keep=1.0, preset="paper").attach(policy):
        assert torch.equal(step(policy, 0, BOTH), untouched)
    with vp.VLAPruner(keep=0.5, window=1, preset="paper").attach(policy):
        for scene in range(2):
            assert step(policy, scene, BOTH).isfinite().all()


def test_what_it_needs_beside_lerobot_is_named(monkeypatch):
    from lerobot.policies.groot import groot_n1_7

    def lacks(name, extra, **_):
        raise ImportError(f"{name} is missing: pip install 'lerobot[{extra}]'")

    monkeypatch.setattr(groot_n1_7, "require_package", lacks)
    with pytest.raises(vp.UnsupportedModelError, match="diffusers is missing"):
        vp.random_policy("groot")
