"""Compiled sessions of LeRobot's policies."""

from __future__ import annotations

import contextlib
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")
pytest.importorskip("diffusers", reason="diffusers is not installed; make test-lerobot installs it")

from lerobot.policies.vla_jepa import modeling_vla_jepa

import vla_pruner as vp
from tests.families.compiled import check_family
from tests.families.matrix import PRESET
from tests.lerobot import test_eo1, test_groot, test_vla_jepa
from tests.lerobot.test_matrix import case, molmoact2, pi0_fast
from tests.state import whole_state
from vla_pruner.families import family_of
from vla_pruner.replacements import Replacements

# Importing the compiler warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.mark.parametrize(("kind", "pruned"), [("pi0", "drop"), ("pi05", "freeze")])
def test_same_as_uncompiled_and_no_graph_after_the_first_episode(kind, pruned):
    check_family(case(kind), vp.VLAPruner(keep=0.25, layer=1, window=1, pruned=pruned, preset=PRESET[pruned]))


def test_tokens_that_are_decoded():
    check_family(pi0_fast(), vp.VLAPruner(keep=0.25, layer=1, window=1, preset="paper"))


@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_smolvla_is_same_as_uncompiled_and_makes_no_graph_after_the_first_episode(pruned):
    check_family(case("smolvla"), vp.VLAPruner(keep=0.25, layer=1, window=1, pruned=pruned, preset=PRESET[pruned]))


def programs_of(one, method, steps=4):
    """Run control steps of two robots: the numbers of programs and of graphs after each; then those of the policy
    that is compiled as it is, after two steps.
    """
    policy = one.build()
    counters.clear()
    found = []
    with method.attach(policy) as session:
        session.compile("eager")
        for scene in range(steps):
            one.step(policy, scene, slice(0, 2))
            assert session._runner.compiled is not None
            found.append((session._runner.compiled.programs, counters["stats"]["unique_graphs"]))
    counters.clear()
    with vp.compiled(policy, "eager") as compiled:
        for scene in range(2):
            one.step(policy, scene, slice(0, 2))
        found.append((compiled.programs, counters["stats"]["unique_graphs"]))
    assert not counters["graph_break"]
    return found


def test_programs_of_a_control_step():
    """SmolVLA, pi0: the vision encoder, the prefix, and one for all denoising steps; pruned steps add the last two.
    pi0-FAST decodes tokens instead. MolmoAct2 is as pi0.
    """
    method = vp.VLAPruner(keep=0.25, layer=1, window=1, preset="paper")
    for one in (case("smolvla"), case("pi05"), pi0_fast(), molmoact2()):
        assert programs_of(one, method) == [(3, 3), (5, 5), (5, 5), (5, 5), (3, 3)], str(one)


FURTHER = {"molmoact2": molmoact2(), "eo1": test_eo1.CASE, "groot": test_groot.CASE, "vla_jepa": test_vla_jepa.CASE}


@pytest.mark.parametrize("name", FURTHER)
def test_further_families_are_same_as_uncompiled_and_make_no_graph_after_the_first_episode(name, monkeypatch):
    if name == "vla_jepa":
        # LeRobot runs its decoder in half precision, in which the last bit of a score may decide.
        monkeypatch.setattr(modeling_vla_jepa, "_get_autocast_context", lambda *_: contextlib.nullcontext())
    check_family(FURTHER[name], vp.VLAPruner(keep=0.25, layer=1, window=1, preset="paper"))


@pytest.mark.parametrize("name", ["molmoact2", "eo1"])
def test_further_families_that_freeze(name):
    check_family(FURTHER[name], vp.VLAPruner(keep=0.25, layer=3, window=1, pruned="freeze"))


TOGETHER = {**{kind: case(kind) for kind in ("pi0", "pi05", "smolvla")}, "pi0_fast": pi0_fast()}
"""Policies that encode each camera in a call of its own."""


@contextmanager
def calls_of(module):
    """Collect the shapes of the images with which a vision encoder is called."""
    shapes = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple((*args, *kwargs.values())[0].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", TOGETHER)
def test_all_cameras_are_encoded_in_one_call(kind):
    """With a session and without one; eager policies are as LeRobot has them. Nothing of it stays."""
    one = TOGETHER[kind]
    policy = one.build()
    one.step(policy, 0, slice(0, 2))  # LeRobot notes an attention backend in its configs when it first runs
    before = whole_state(policy.module)
    (tower,) = family_of(policy).anatomy.towers
    cameras = len(policy.cameras)
    method = vp.VLAPruner(keep=0.25, layer=1, window=1, preset="paper")
    assert cameras > 1
    with calls_of(tower) as eager:
        expected = one.step(policy, 0, slice(0, 2))
    with calls_of(tower) as attached, method.attach(policy):
        one.step(policy, 0, slice(0, 2))
    assert attached == eager
    assert len(eager) == cameras
    found = []
    for compile in (lambda: vp.compiled(policy, "eager"), lambda: session_of(policy, method)):
        with calls_of(tower) as shapes, compile():
            found.append(one.step(policy, 0, slice(0, 2)))
        assert shapes == [(cameras * eager[0][0], *eager[0][1:])]
    for actual in found:  # the first step of an episode is not pruned
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert whole_state(policy.module) == before


def session_of(policy, method):
    session = method.attach(policy)
    session.compile("eager")
    return session


def prefix_arguments(one, policy):
    """Return the method that makes the prefix, and the arguments that a control step of two robots gives it."""
    inner, seen = policy.module.model, []
    name = "embed_prefix_fast" if hasattr(inner, "embed_prefix_fast") else "embed_prefix"
    original = getattr(inner, name)

    def embed(*args, **kwargs):
        seen.append((args, kwargs))
        return original(*args, **kwargs)

    setattr(inner, name, embed)
    try:
        one.step(policy, 3, slice(0, 2))
    finally:
        delattr(inner, name)
    return name, *seen[0]


@contextmanager
def together(policy):
    replaced = Replacements()
    family_of(policy).encode_together(replaced)
    try:
        yield
    finally:
        replaced.remove()


@pytest.mark.parametrize("kind", TOGETHER)
def test_features_of_one_call_for_all_cameras_are_those_of_a_call_for_each(kind):
    """They differ by rounding alone: by less than 1e-5 of the largest."""
    one = TOGETHER[kind]
    policy = one.build()
    name, args, kwargs = prefix_arguments(one, policy)
    make = getattr(policy.module.model, name)
    with torch.no_grad():
        expected = make(*args, **kwargs)
        with together(policy):
            actual = getattr(policy.module.model, name)(*args, **kwargs)
    assert (actual[0] - expected[0]).abs().max() < 1e-5 * expected[0].abs().max()
    assert torch.equal(actual[1], expected[1])


def test_images_of_different_sizes_are_encoded_one_by_one():
    policy = TOGETHER["smolvla"].build()
    name, (images, *args), kwargs = prefix_arguments(TOGETHER["smolvla"], policy)
    images = [images[0], images[1][..., ::2, ::2]]
    (tower,) = family_of(policy).anatomy.towers
    with together(policy), calls_of(tower) as shapes, torch.no_grad():
        getattr(policy.module.model, name)(images, *args, **kwargs)
    assert shapes == [tuple(image.shape) for image in images]


@pytest.mark.parametrize("overridden", ["embed_image", "embed_prefix", "on the instance"])
def test_an_encoder_that_is_not_lerobots_own_is_called_as_it_is(overridden):
    """A subclass may treat cameras differently, so nothing is known of its calls."""
    policy = TOGETHER["pi0"].build()
    inner = policy.module.model
    owner = inner if overridden == "embed_prefix" else inner.paligemma_with_expert
    name = "embed_prefix" if overridden == "embed_prefix" else "embed_image"
    own = getattr(type(owner), name)

    def other(self, *args, **kwargs):
        return own(self, *args, **kwargs)

    if overridden == "on the instance":
        setattr(owner, name, other.__get__(owner))
    else:
        owner.__class__ = type("Own", (type(owner),), {name: other})
    (tower,) = family_of(policy).anatomy.towers
    with calls_of(tower) as shapes, vp.compiled(policy, "eager"):
        TOGETHER["pi0"].step(policy, 0, slice(0, 2))
    assert len(shapes) == len(policy.cameras)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eo1", [(2, 2), (4, 4), (4, 4), (2, 2)]),
        ("groot", [(3, 3), (6, 6), (6, 6), (3, 3)]),
        ("vla_jepa", [(2, 2), (3, 3), (3, 3), (2, 2)]),
    ],
)
def test_programs_of_policies_around_qwen(name, expected):
    """The prompt and the denoising steps, and both again for pruned steps; the encoder stays as it is. GR00T's layers
    between decoder and transformer are a third program; VLA-JEPA's transformer sees no visual token and has one.
    """
    assert programs_of(FURTHER[name], vp.VLAPruner(keep=0.25, layer=3, window=1, preset="paper"), steps=3) == expected
