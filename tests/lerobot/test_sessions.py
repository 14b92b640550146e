"""LeRobot's policies with a session attached: cameras, queues, episodes, variants of the architecture, refusals."""

from __future__ import annotations

import copy
import inspect
import threading

import pytest
import torch

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

import vla_pruner as vp
from tests.attach.test_threads import in_thread
from tests.lerobot.tiny import KINDS, random_batch
from tests.state import whole_state
from vla_pruner.auditing.reference import FullLength
from vla_pruner.families import family_of, lerobot_common
from vla_pruner.policies.lerobot import random_lerobot

each_kind = pytest.mark.parametrize("kind", KINDS)
STEPS = {"pi0": {"num_inference_steps": 3}, "pi05": {"num_inference_steps": 3}, "smolvla": {"num_steps": 3}}


def build(kind, **config):
    return random_lerobot(kind, **STEPS[kind], **config)


def scene(policy, seed=0, rows=1, cameras=None):
    side = policy.module.config.image_features["observation.images." + policy.cameras[0]].shape[-1]
    return random_batch(seed, rows, policy.cameras if cameras is None else cameras, side)


def noise(rows=1, seed=0):
    return torch.randn(rows, 10, 32, generator=torch.Generator().manual_seed(seed))


@each_kind
def test_users_see_the_same_policy(kind):
    module = build(kind).module
    names = ("select_action", "predict_action_chunk", "reset", "forward")
    before = {name: inspect.signature(getattr(module, name)) for name in names}
    with vp.VLAPruner(preset="paper").attach(module):
        assert type(module).__name__ in ("PI0Policy", "PI05Policy", "SmolVLAPolicy")
        assert {name: inspect.signature(getattr(module, name)) for name in names} == before


@each_kind
def test_select_action_is_one_control_step_per_queue(kind):
    policy = build(kind, n_action_steps=4)
    module = policy.module
    with vp.VLAPruner(keep=0.5, window=2, preset="paper").attach(module) as session:
        counts = []
        for step in range(9):
            module.select_action(scene(policy, step))
            counts.append(int(session.memory.steps))
    assert counts == [1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert session.kept.shape == (1, round(0.5 * session.step.layout.tokens))


@each_kind
def test_the_policys_reset_is_an_episode(kind):
    policy = build(kind)
    module = policy.module

    def episode(session, seeds):
        chunks = [module.predict_action_chunk(scene(policy, seed), noise=noise()) for seed in seeds]
        return torch.stack(chunks), session.kept

    with vp.VLAPruner(keep=0.25, window=1, preset="paper").attach(module) as session:
        first, kept = episode(session, (0, 1, 2))
        module.reset()
        assert session.memory is None
        episode(session, (5, 6))
        policy.reset()
        again, kept_again = episode(session, (0, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(kept, kept_again)
    module.reset()


@each_kind
def test_action_score_is_the_experts_attention(kind):
    """The score, computed here from softmax weights of a second, unattached run."""
    policy = build(kind)
    module = policy.module
    family = family_of(module)
    with vp.VLAPruner(keep=1.0, layer=3, preset="paper").attach(module) as session:
        module.predict_action_chunk(scene(policy, rows=2), noise=noise(2))
        scores, layout = session.scores["action"], session.step.layout
    rows = slice(1, None) if kind == "pi0" else slice(None)
    weights = attention_weights(
        kind, module, lambda: module.predict_action_chunk(scene(policy, rows=2), noise=noise(2))
    )
    later_half = [layer for layer in range(family.depth) if layer >= family.depth // 2]
    means = [weight[:, :, rows].mean(dim=(1, 2))[:, : layout.length] for weight in weights if len(weight)]
    assert len(means) == 3 * family.depth
    wanted = [mean for index, mean in enumerate(means) if index % family.depth in later_half]
    expected = torch.stack(wanted).mean(dim=0).gather(1, layout.visual)
    assert (scores - expected).abs().max() < 1e-6
    assert scores.max() > 2 * scores.min()


def attention_weights(kind, module, run):
    """Softmax weights (B, H, Q, S) of every expert layer and denoising step, in the order in which they run."""
    found = []
    if kind == "smolvla":
        both = module.model.vlm_with_expert
        original = both.eager_attention_forward

        def kernel(mask, batch, dim, query, key, value):
            if query.shape[1] == module.config.chunk_size:
                groups = query.shape[2] // key.shape[2]
                logits = torch.einsum("bqhd,bshd->bhqs", query, key.repeat_interleave(groups, 2)) * dim**-0.5
                found.append(logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1))
            return original(mask, batch, dim, query, key, value)

        both.eager_attention_forward = kernel
        run()
        del both.eager_attention_forward
        return found
    layers = module.model.paligemma_with_expert.gemma_expert.model.layers
    hooks = [layer.self_attn.register_forward_hook(lambda _, args, output: found.append(output[1])) for layer in layers]
    run()
    for hook in hooks:
        hook.remove()
    return found


@each_kind
def test_absent_cameras_go_first(kind):
    policy = build(kind, **({"empty_cameras": 1} if kind == "smolvla" else {}))
    module = policy.module
    others = policy.cameras[1:]
    batch = scene(policy, rows=2, cameras=others)
    untouched = module.predict_action_chunk(dict(batch), noise=noise(2))
    with vp.VLAPruner(keep=1.0, preset="paper").attach(module):
        assert torch.equal(module.predict_action_chunk(dict(batch), noise=noise(2)), untouched)
    with vp.RandomKeep(keep=0.5).attach(module) as session:
        pruned = module.predict_action_chunk(dict(batch), noise=noise(2))
        layout, kept = session.step.layout, session.kept
    each = layout.cameras[0]
    assert set(layout.cameras) <= {0, each}
    # LeRobot puts the blank image behind the others, but the ids stay those of the cameras' order.
    assert 0 in layout.absent
    assert layout.visual[0, 0] == (len(others)) * each
    assert layout.visual[0, each] == 0
    assert not layout.valid[:, :each].any()
    assert layout.valid[:, each : each * (1 + len(others))].all()
    assert (kept >= each).all(), "no budget is spent on what is not there"
    assert kept.shape[1] == round(0.5 * len(others) * each)
    with FullLength(module, layout, kept, layer=3):
        expected = module.predict_action_chunk(dict(batch), noise=noise(2))
    assert (pruned - expected).abs().max() < 1e-4
    assert (pruned - untouched).abs().max() > 1e-3


@each_kind
def test_keep_per_camera(kind):
    policy = build(kind)
    module = policy.module
    one, two, three = policy.cameras
    with vp.RandomKeep(keep={one: 5, two: 0.5, three: 1.0}).attach(module) as session:
        pruned = module.predict_action_chunk(scene(policy), noise=noise())
        layout, kept = session.step.layout, session.kept
        each = layout.cameras[0]
        assert [int(((kept // each) == camera).sum()) for camera in range(3)] == [5, each // 2, each]
        # Without its camera a budget is not spent; the others keep theirs.
        module.reset()
        module.predict_action_chunk(scene(policy, cameras=(one, three)), noise=noise())
        assert session.step.layout.absent == {1}
        visual = session.step.layout.visual.gather(1, session.kept)
        assert visual.shape[1] == 5 + each
        assert int((visual < each).sum()) == 5
        module.reset()
        module.predict_action_chunk(scene(policy, cameras=(two, three)), noise=noise())
        assert session.step.layout.absent == {0}
        assert session.kept.shape[1] == each // 2 + each
    with FullLength(module, layout, kept, layer=3):
        expected = module.predict_action_chunk(scene(policy), noise=noise())
    assert (pruned - expected).abs().max() < 1e-4
    with pytest.raises(vp.OptionError, match=one):
        vp.RandomKeep(keep={"front": 5}).attach(module)


def test_smolvla_without_a_camera_and_without_a_blank_for_it():
    policy = build("smolvla")
    module = policy.module
    with vp.RandomKeep(keep=0.5).attach(module) as session:
        module.predict_action_chunk(scene(policy, cameras=policy.cameras[1:]), noise=noise())
        layout = session.step.layout
        assert layout.cameras == (0, 64, 64)
        assert layout.visual[0].tolist() == list(range(128))
        assert session.kept.shape == (1, 64)
        with pytest.raises(vp.SessionError, match="reset"):
            module.predict_action_chunk(scene(policy), noise=noise())


def test_a_camera_of_smolvla_that_one_robot_lacks():
    """A padding mask says so by row, so the number of kept tokens is that of all cameras."""
    policy = build("smolvla")
    module = policy.module
    batch = scene(policy, rows=2)
    batch["observation.images.camera2_padding_mask"] = torch.tensor([1, 0])
    with vp.RandomKeep(keep=0.5).attach(module) as session:
        pruned = module.predict_action_chunk(dict(batch), noise=noise(2))
        layout, kept = session.step.layout, session.kept
    assert not layout.absent
    assert layout.valid.sum(dim=1).tolist() == [192, 128]
    assert kept.shape == (2, 96)
    assert [int((row // 64 == 1).sum() > 0) for row in kept] == [1, 0]
    with FullLength(module, layout, kept, layer=3):
        expected = module.predict_action_chunk(dict(batch), noise=noise(2))
    assert (pruned - expected).abs().max() < 1e-4


VARIANTS = {
    "special tokens": {"add_image_special_tokens": True},
    "padded prefix": {"prefix_length": 260},
    # LeRobot itself fails with fewer expert layers if some layers attend to themselves.
    "fewer expert layers": {"num_expert_layers": 3, "self_attn_every_n_layers": 0},
    "self-attention in every layer": {"attention_mode": "self_attn"},
    "cross-attention in every layer": {"self_attn_every_n_layers": 0},
}


@pytest.mark.parametrize("pruned_as", ["drop", "freeze"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_smolvla(variant, pruned_as):
    policy = build("smolvla", **VARIANTS[variant])
    module = policy.module
    batch = scene(policy, rows=2)
    untouched = module.predict_action_chunk(dict(batch), noise=noise(2))
    with vp.VLAPruner(keep=1.0, pruned=pruned_as, preset="paper").attach(module):
        assert torch.equal(module.predict_action_chunk(dict(batch), noise=noise(2)), untouched)
    with vp.VLAPruner(keep=0.25, window=1, pruned=pruned_as, preset="paper").attach(module) as session:
        for _ in range(2):
            pruned = module.predict_action_chunk(dict(batch), noise=noise(2))
        layout, kept = session.step.layout, session.kept
    if variant == "special tokens":
        assert layout.visual[0, [0, 63, 64, 128]].tolist() == [2, 65, 69, 136]
    assert kept.shape == (2, 48)
    with FullLength(module, layout, kept, layer=3, pruned=pruned_as):
        expected = module.predict_action_chunk(dict(batch), noise=noise(2))
    assert (pruned - expected).abs().max() < 1e-4
    assert (pruned - untouched).abs().max() > 1e-3


@each_kind
def test_bfloat16(kind):
    policy = random_lerobot(kind, dtype=torch.bfloat16, **STEPS[kind])
    module = policy.module
    assert policy.dtype == torch.bfloat16
    untouched = module.predict_action_chunk(scene(policy), noise=noise())
    for pruned in ("drop", "freeze"):
        with vp.VLAPruner(keep=1.0, pruned=pruned, preset="paper").attach(module):
            assert torch.equal(module.predict_action_chunk(scene(policy), noise=noise()), untouched)
        with vp.VLAPruner(keep=0.5, window=1, pruned=pruned, preset="paper").attach(module):
            for _ in range(2):
                assert module.predict_action_chunk(scene(policy), noise=noise()).isfinite().all()


@each_kind
def test_sample_actions_without_a_batch_takes_the_cameras_as_they_are(kind):
    policy = build(kind)
    module = policy.module
    images, masks = getattr(module, family_of(module).prepare)(scene(policy))
    batch = scene(policy)
    tokens, mask = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
    state = () if kind == "pi05" else (torch.nn.functional.pad(batch["observation.state"], (0, 24)),)
    with vp.RandomKeep(keep=0.5).attach(module) as session:
        module.model.sample_actions(images, masks, tokens, mask, *state, noise=noise())
        assert not session.step.layout.absent
        assert session.kept is not None
        with pytest.raises(vp.SessionError, match="4 images"):
            module.model.sample_actions([*images, images[0]], [*masks, masks[0]], tokens, mask, *state, noise=noise())


@each_kind
def test_training_and_copies_are_refused(kind):
    policy = build(kind)
    module = policy.module
    before = whole_state(module)
    with vp.VLAPruner(preset="paper").attach(module):
        with pytest.raises(vp.SessionError, match="detach"):
            module.forward({**scene(policy), "action": torch.zeros(1, 10, 7)})
        with pytest.raises(vp.SessionError, match="copied"):
            copy.deepcopy(module)
    assert whole_state(module) == before
    copy.deepcopy(module)
    module.forward({**scene(policy), "action": torch.zeros(1, 10, 7)})


@each_kind
def test_what_is_not_supported_is_refused(kind, monkeypatch):
    module = build(kind).module
    monkeypatch.setattr(lerobot_common.metadata, "version", lambda _: "0.7.0")
    with pytest.raises(vp.UnsupportedModelError, match=r"lerobot 0\.7\.0 is installed; 0\.6"):
        vp.VLAPruner(preset="paper").attach(module)


def test_official_preset_needs_an_expert_at_its_layer(monkeypatch):
    module = build("smolvla", **VARIANTS["fewer expert layers"]).module
    before = whole_state(module)
    monkeypatch.setattr(vp.VLAPruner, "action_layers", lambda self, layers: (5,))
    with pytest.raises(vp.UnsupportedModelError, match="none of them has an expert layer"):
        vp.VLAPruner(preset="paper").attach(module)
    assert whole_state(module) == before


def test_smolvla_needs_its_cache():
    module = build("smolvla").module
    module.config.use_cache = False
    with pytest.raises(vp.UnsupportedModelError, match="use_cache"):
        vp.VLAPruner(preset="paper").attach(module)


@each_kind
def test_a_second_thread_is_refused_while_a_chunk_is_predicted(kind):
    policy = build(kind)
    module, refused = policy.module, []

    def intrude(*_):
        if threading.current_thread() is threading.main_thread():
            refused.append(in_thread(lambda: module.predict_action_chunk(scene(policy, 9), noise=noise())))

    with vp.VLAPruner(keep=0.25, window=1, preset="paper").attach(module) as session:
        expected = [module.predict_action_chunk(scene(policy, number), noise=noise()) for number in range(3)]
        session.reset()
        handle = family_of(module).decoder.layers[-1].mlp.register_forward_pre_hook(intrude)
        actual = [module.predict_action_chunk(scene(policy, number), noise=noise()) for number in range(3)]
        handle.remove()
    assert len(refused) >= 3
    assert all(isinstance(error, vp.SessionError) and "another thread" in str(error) for error in refused)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@each_kind
def test_a_session_that_nobody_holds_is_found_from_any_side(kind):
    policy = build(kind)
    before = whole_state(policy.module)
    wrapper = torch.nn.Module()
    wrapper.inner = policy.module
    for given in (policy, policy.module, policy.module.model, wrapper):
        vp.VLAPruner(keep=0.25, preset="paper").attach(policy)
        with pytest.raises(vp.SessionError, match=r"vla_pruner\.detach\(model\)"):
            vp.VLAPruner(keep=0.25, preset="paper").attach(policy.module)
        assert vp.detach(given)
        assert whole_state(policy.module) == before
