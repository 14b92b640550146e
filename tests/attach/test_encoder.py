"""Combinations with `encoder=EncoderReuse(...)` that are refused, and its details; its properties on every family are
in tests/families/encoders.py.
"""

from __future__ import annotations

import copy
import threading
from functools import partial

import pytest
import torch

import vla_pruner as vp
from tests.adapters import CHANGES, change_adapters
from tests.attach.test_threads import in_thread
from tests.attach.tiny import VISUAL, tiny_lm
from tests.families import cases
from tests.families.matrix import BOTH
from tests.state import whole_state
from vla_pruner.attach.encoder import cut
from vla_pruner.families import family_of
from vla_pruner.models.openvla import random_openvla
from vla_pruner.policies.base import example_of

REUSE = vp.EncoderReuse(keep=0.25)


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        (vp.FastV(), {"encoder": 0.25}, vp.OptionError, r"encoder=.*float.*EncoderReuse\(keep=0\.25\)"),
        (vp.VLACache(), {"encoder": REUSE}, vp.OptionError, "VLACache reuses tokens"),
        (vp.FastV(), {"encoder": REUSE, "compile": True}, vp.UnsupportedModelError, r"compile\(\) does not go with"),
        (
            vp.FastV(),
            {"encoder": REUSE, "only_if_faster": True},
            vp.UnsupportedModelError,
            r"only_if_faster \(detach_unless_faster\(\)\) does not go with",
        ),
        (vp.FastV(), {"encoder": vp.EncoderReuse(keep=10**6)}, vp.BudgetError, "1000000 patches was given"),
    ],
)
def test_refused_combinations(method, options, error, message):
    policy = vp.random_policy("reference-chunk")
    before = whole_state(policy)
    with pytest.raises(error, match=message):
        method.attach(policy, **options)
    assert whole_state(policy) == before


def test_families_without_patches_are_refused():
    model = tiny_lm()
    with pytest.raises(
        vp.UnsupportedModelError, match=r"DecoderLM does not say .* supported are LeRobot's SmolVLAPolicy"
    ):
        vp.FastV().attach(model, visual=VISUAL, encoder=REUSE)
    with pytest.raises(vp.UnsupportedModelError, match="Leave encoder out"):
        vp.FastV().attach(random_openvla(size="tiny"), encoder=REUSE)


def test_a_compiled_encoder_is_refused():
    policy = vp.random_policy("reference-chunk")
    policy.vision.blocks[0].compile(backend="eager")
    with pytest.raises(vp.UnsupportedModelError, match=r"vision encoder is compiled \(VisionBlock\)"):
        vp.FastV().attach(policy, encoder=REUSE)


def test_other_attention_backends_are_refused():
    policy = cases.pi0("sdpa").build()
    tower = policy.model.vlm.vision_tower
    getattr(tower, "vision_model", tower).encoder.layers[0].self_attn.config._attn_implementation_internal = "flex"
    with pytest.raises(
        vp.UnsupportedModelError, match=r"vision encoder uses the attention backend 'flex'.*sdpa and eager"
    ):
        vp.FastV().attach(policy, encoder=REUSE)


def test_export_is_refused():
    policy = vp.random_policy("reference-chunk")
    refused = pytest.raises(vp.UnsupportedModelError, match=r"export\(\.\.\.\) does not go with")
    with vp.FastV().attach(policy, encoder=REUSE) as session, refused:
        session.export({})


def test_a_policy_that_reuses_patches_is_not_copied():
    policy = vp.random_policy("reference-chunk")
    with vp.Unpruned().attach(policy, encoder=REUSE), pytest.raises(vp.SessionError, match="detach first"):
        copy.deepcopy(policy.vision)


def test_a_session_says_what_was_encoded():
    case = cases.chunk()
    policy = case.build()
    with vp.Unpruned().attach(policy, encoder=REUSE) as session:
        assert session.encoded == ()
        case.step(policy, 0, BOTH)
        assert "all patches encoded" in repr(session)
        case.step(policy, 1, BOTH)
        (ids,) = session.encoded
        assert ids.shape == (4, policy.config.patches // 4)
        assert f"{policy.config.patches // 4} patches of each image encoded" in repr(session)


def test_an_encoder_that_is_called_by_hand_is_untouched():
    case = cases.chunk()
    policy = case.build()
    pixels = torch.randn(1, 2, 3, policy.image_size, policy.image_size)
    with torch.no_grad():
        expected = policy.vision(pixels)
        with vp.Unpruned().attach(policy, encoder=REUSE) as session:
            for scene in (0, 1):
                case.step(policy, scene, BOTH)
                assert torch.equal(policy.vision(pixels), expected)
            assert None not in session.encoded


def test_a_failed_control_step_and_a_cut_are_followed_by_a_whole_one():
    case = cases.chunk()
    policy = case.build()

    def fail(*_):
        raise RuntimeError("robot fell over")

    with vp.Unpruned().attach(policy, encoder=REUSE) as session:
        case.step(policy, 0, BOTH)
        handle = policy.decoder.layers[-1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="fell over"):
            case.step(policy, 1, BOTH)
        handle.remove()
        whole = []
        for cut_before in (False, False, True, False):
            if cut_before:
                session.forget_images()
            case.step(policy, 1, BOTH)
            whole.append(session.encoded == (None,))
    assert whole == [True, False, True, False]


def test_an_image_that_is_not_finite_spoils_no_later_step():
    case = cases.pi0("sdpa")
    policy = case.build()
    spoilt = policy.model.vlm.vision_tower
    expected = case.step(policy, 1, BOTH)
    with vp.Unpruned().attach(policy, encoder=REUSE) as session:
        for scene in (0, 1):
            case.step(policy, scene, BOTH)
        handle = spoilt.register_forward_pre_hook(
            lambda _, args, kwargs: (tuple(pixels * torch.nan for pixels in args), kwargs),
            with_kwargs=True,
            prepend=True,
        )
        assert not case.step(policy, 1, BOTH).isfinite().all()
        handle.remove()
        assert torch.equal(case.step(policy, 1, BOTH), expected)
        assert session.encoded == (None,)


def test_actions_that_act_refuses_are_followed_by_a_whole_step():
    """On an accelerator nobody looks at the encoder's outputs, and only actions show that they were not finite."""
    policy = vp.random_policy("pi0")
    example = example_of(policy)

    def act():
        policy.act(example.images, example.instruction, example.proprio)
        return [ids is None for ids in session.encoded]

    with vp.Unpruned().attach(policy, encoder=vp.EncoderReuse(keep=0.25, refresh_every=None)) as session:
        whole = act()
        assert all(whole)
        assert not any(act())
        handle = policy.module.action_out_proj.register_forward_hook(lambda *args: args[-1] * torch.nan)
        with pytest.raises(vp.CheckpointError, match="not finite"):
            act()
        handle.remove()
        assert act() == whole
        assert not any(act())


def test_a_thread_that_is_refused_takes_nothing_from_the_step_that_runs():
    case = cases.chunk()
    policy = case.build()
    norm = policy.vision.blocks[0].norm1
    refused = []

    def intrude(*_):
        if threading.current_thread() is threading.main_thread():
            for call in (partial(case.step, policy, 9, BOTH), session.forget_images):
                refused.append(in_thread(call))

    with vp.Unpruned().attach(policy, encoder=REUSE) as session:
        expected = [case.step(policy, scene, BOTH) for scene in range(3)]
        session.reset()
        handle = norm.register_forward_pre_hook(intrude)
        actual = [case.step(policy, scene, BOTH) for scene in range(3)]
        handle.remove()
        assert None not in session.encoded
    assert len(refused) == 6
    assert all(isinstance(error, vp.SessionError) and "another thread" in str(error) for error in refused)
    assert all(map(torch.equal, actual, expected))


def test_patches_that_were_not_encoded_are_compared_with_what_they_were():
    """A change too small for its turn is not forgotten: it adds up."""
    policy = vp.random_policy("reference-chunk")
    side, cameras = policy.image_size, len(policy.cameras)
    images = torch.zeros(1, cameras, side, side, 3, dtype=torch.uint8)
    state = torch.zeros(1, policy.proprio_size)
    columns = side // 8
    reuse = vp.EncoderReuse(keep=1, refresh_every=None)
    with vp.Unpruned().attach(policy, encoder=reuse) as session:
        policy.predict_action(images, policy.instructions[0], state)
        for step in range(1, 4):
            images[:, :, 8:16, 16:24] = 20 * step  # patch (1, 2) changes more and more
            images[:, :, 0:8, 0:8] = 30 if step == 1 else 30 + 20 * (step - 1)  # and patch (0, 0) by more at first
            policy.predict_action(images, policy.instructions[0], state)
            (ids,) = session.encoded
            assert ids.flatten().tolist() == [0 if step == 1 else columns + 2 if step == 2 else 0] * cameras, step


def test_cut():
    images = torch.arange(2 * 5 * 7).reshape(1, 2, 5, 7)
    tiles = cut(images, 2)
    assert tiles.shape == (1, 6, 8)
    assert tiles[0, 4].tolist() == [16, 17, 23, 24, 51, 52, 58, 59]


@pytest.mark.parametrize("change", CHANGES)
def test_patches_that_other_adapters_encoded_are_not_reused(change):
    case = cases.reference()
    model = case.build()
    layers = family_of(model).encoder.layers  # type: ignore[union-attr]
    for earlier in CHANGES[: CHANGES.index(change)]:
        change_adapters(layers, earlier)
    with vp.VLAPruner(keep=1.0, preset="paper").attach(model, encoder=REUSE) as session:
        whole = []
        for step in range(4):
            change_adapters(layers, change if step == 2 else None)
            case.step(model, 0, BOTH)
            whole.append(None in session.encoded)
    assert whole == [True, False, True, False]
