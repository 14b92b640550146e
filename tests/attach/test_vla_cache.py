"""Keys and values that cross control steps: reused ones agree with a full-length model whose rows were left as they
were, equal images change nothing, and nothing outlives an episode.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from torch import nn

import vla_pruner as vp
from tests.adapters import CHANGES, change_adapters
from tests.attach.tiny import CACHE, LENGTH, TOKENS, VISUAL, decode, make_cache, prompt, tiny_lm
from tests.families import cases
from tests.families.matrix import BOTH, kept_at
from tests.state import whole_state
from vla_pruner.attach.reuse import pixel_similarity
from vla_pruner.caches import cache_of
from vla_pruner.cost import DecoderShape, StepShape, count_flops, decoder_flops
from vla_pruner.families import family_of
from vla_pruner.families.decoder_lm import DecoderLM

ANY = {"threshold": -0.99}
"""Noise is not static; with this it counts as such."""


class StaleRows:
    """While it is open, a decoder runs at full length, and rows that are named stale are normalised, projected and read
    as in the last call in which they were not.

    Attributes:
        stale: (B, N) bool for each layer from which on they are, in order; empty if none is.
    """

    def __init__(self, decoder):
        self.stale = {}
        self._layers = decoder.layers
        self._entered = {}
        self._handles = []

    def __enter__(self):
        for index, layer in enumerate(self._layers):
            handle = layer.input_layernorm.register_forward_pre_hook(partial(self._overwrite, index))
            self._handles.append(handle)
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()

    def _overwrite(self, index, module, args):
        (hidden,) = args
        if hidden.shape[1] == 1:
            return None
        rows = [stale for first, stale in self.stale.items() if first <= index]
        if rows:
            hidden = torch.where(rows[-1][..., None], self._entered[index], hidden)
        self._entered[index] = hidden
        return (hidden,)


class Seeing(DecoderLM):
    """A language model whose images are its prompt's embeddings."""

    def __init__(self, model, padding_side=None):
        super().__init__(model, VISUAL, padding_side)
        self.eye = EYE

    def patches(self, pixels):
        return pixels[:, VISUAL]


EYE = nn.Identity()


def attach(method, model, padding=None):
    return vp.Session(method, model, Seeing(model, "right" if padding else None))


def step(model, rows=2, seed=1, cache=None, padding=None, embeds=None):
    drawn, mask = prompt(rows, padding, seed)
    embeds = drawn if embeds is None else embeds
    EYE(embeds)
    if cache is not None:
        cache.reset()
    return decode(model, embeds, mask if padding else None, cache or make_cache("dynamic", model), 2)[1]


def stale_of(one):
    """Return the rows that `StaleRows` must overwrite for a step to be the session's."""
    found = {}
    for layer, ids in kept_at(one).items():
        stale = torch.zeros_like(one.layout.prompt).scatter(1, one.layout.visual, True)
        found[layer] = stale.scatter(1, one.layout.visual.gather(1, ids), False)
    return found


def compare(method, session, run, decoder):
    """Run three scenes and the first again, with the session and at full length; return the tokens that the last step
    kept.
    """
    with session:
        actual, steps = [], []
        for scene in (0, 1, 2, 0):
            actual.append(run(scene))
            steps.append(session.step)
    assert [one.kept is None for one in steps] == [True, False, False, False]
    assert steps[1].kept.tolist() != steps[2].kept.tolist(), "the choice must move, or reuse of reuse would not show"
    with StaleRows(decoder) as reference:
        for scene, result, one in zip((0, 1, 2, 0), actual, steps, strict=True):
            reference.stale = stale_of(one)
            assert (result - run(scene)).abs().max() < 1e-4, (method, scene)
    assert (actual[1] - run(1)).abs().max() > 1e-3, "reuse must show, or this test could not fail"
    return kept_at(steps[-1])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_agrees_with_the_full_length_reference(backend, padding, cache):
    model = tiny_lm(backend=backend)
    method = vp.VLACache(keep=0.5, layer=2, **ANY)
    # A static cache is emptied and written again, below what is held.
    static = make_cache("static", model) if cache == "static" else None
    session = attach(method, model, padding)
    kept = compare(method, session, lambda scene: step(model, seed=scene, cache=static, padding=padding), model.model)
    assert {layer: ids.shape for layer, ids in kept.items()} == {2: (2, 12)}


def test_agrees_with_the_full_length_reference_at_several_layers():
    model = tiny_lm()
    method = vp.VLACache(keep=0.75, layer=1, then=((3, 0.5), (5, 3)), **ANY)
    kept = compare(method, attach(method, model), lambda scene: step(model, seed=scene), model.model)
    assert {layer: ids.shape[1] for layer, ids in kept.items()} == {1: 18, 3: 12, 5: 3}


FAMILIES = [
    cases.reference(),
    cases.chunk(),
    cases.openvla("sdpa"),
    cases.openvla("eager"),
    cases.openvla_oft("l1"),
    cases.openvla_oft("l1", "eager"),
    cases.openvla_oft(None),
]


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_families_agree_with_the_full_length_reference(case):
    model = case.build()
    method = vp.VLACache(keep=0.5, layer=1, **ANY)
    compare(method, method.attach(model), lambda scene: case.step(model, scene, BOTH), family_of(model).decoder)


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_equal_images_change_nothing_but_the_rounding(case):
    model = case.build()
    untouched, before = [case.step(model, scene, BOTH) for scene in (0, 1)], whole_state(model)
    with vp.VLACache(keep=1, layer=1, relevance=1.0).attach(model) as session:
        for scene in (0, 0, 0, 1, 1):
            result = case.step(model, scene, BOTH)
            assert (result - untouched[scene]).abs().max() < 1e-4
        assert session.kept is not None
        assert session.kept.shape == (2, 1)
    assert whole_state(model) == before


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_keep_all_changes_no_bit(case):
    model = case.build()
    untouched = case.step(model, 0, BOTH)
    with vp.VLACache(keep=1.0, layer=1).attach(model) as session:
        for _ in range(3):
            assert torch.equal(case.step(model, 0, BOTH), untouched)
            assert session.kept is None


def test_rows_are_what_single_robots_are():
    model = tiny_lm()
    method = vp.VLACache(keep=0.5, layer=2, **ANY)
    with attach(method, model) as session:
        together = [step(model, seed=scene) for scene in range(3)]
        kept = session.kept
        for row in range(2):
            session.reset()
            alone = [step(model, rows=1, embeds=prompt(2, seed=scene)[0][row : row + 1]) for scene in range(3)]
            assert torch.equal(session.kept[0], kept[row])
            for one, both in zip(alone, together, strict=True):
                assert (one[0] - both[row]).abs().max() < 1e-4


def test_a_step_is_whole_where_nothing_is_held():
    model = tiny_lm()
    untouched = [step(model, seed=seed) for seed in range(4)]
    method = vp.VLACache(keep=0.5, layer=2, **ANY)
    with attach(method, model) as session:

        def runs_whole(seed):
            whole = torch.equal(step(model, seed=seed), untouched[seed])
            assert whole == (session.kept is None)
            return whole

        assert [runs_whole(seed) for seed in (0, 1)] == [True, False]
        session.reset()
        assert [runs_whole(seed) for seed in (2, 3)] == [True, False]
        session.reset(rows=[1])
        assert [runs_whole(seed) for seed in (0, 1)] == [True, False]
        session.memory = session.memory
        assert [runs_whole(seed) for seed in (0, 1)] == [True, False]


def test_a_failed_call_leaves_what_was_held():
    model = tiny_lm()
    method = vp.VLACache(keep=0.5, layer=2, **ANY)
    before = whole_state(model)
    with attach(method, model) as session:
        expected = [step(model, seed=0), step(model, seed=1)]
        session.reset()
        step(model, seed=0)
        handle = model.model.layers[4].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(model, seed=3)
        handle.remove()
        assert torch.equal(step(model, seed=1), expected[1])
    assert whole_state(model) == before


def test_actions_that_are_refused_are_followed_by_a_whole_step():
    policy = vp.random_policy("reference")
    case = cases.reference()
    with vp.VLACache(keep=0.5, layer=2, **ANY).attach(policy) as session:

        def runs_whole():
            case.step(policy, 0, BOTH)
            return session.kept is None

        assert [runs_whole(), runs_whole()] == [True, False]
        handle = policy.language_model.lm_head.register_forward_hook(lambda *args: args[-1] * torch.nan)
        with pytest.raises(vp.CheckpointError, match="not finite"):
            runs_whole()
        handle.remove()
        assert [runs_whole(), runs_whole()] == [True, False]


def test_steps_that_changed_too_much_run_whole():
    model = tiny_lm()
    embeds = prompt()[0]
    method = vp.VLACache(keep=6, layer=2)
    with attach(method, model) as session:
        step(model, embeds=embeds)
        for changed, pruned in ((7, False), (6, True), (0, True)):
            embeds = embeds.clone()
            embeds[1, VISUAL.start : VISUAL.start + changed] *= -1
            step(model, embeds=embeds)
            assert (session.kept is not None) == pruned, changed


def test_warm_up_and_refreshing_run_whole():
    model = tiny_lm()
    for options, whole in (({}, 1), ({"warmup_steps": 3}, 3)):
        with attach(vp.VLACache(keep=6, layer=2, **options), model) as session:
            assert [(step(model), session.kept is None)[1] for _ in range(5)] == [i < whole for i in range(5)]
    with attach(vp.VLACache(keep=6, layer=2, refresh_every=3), model) as session:
        assert [(step(model), session.kept is None)[1] for _ in range(7)] == [i % 3 == 0 for i in range(7)]


def test_what_moved_and_what_the_text_looks_at_is_computed():
    valid = torch.ones(1, 6, dtype=torch.bool)
    evidence = vp.Evidence(
        valid=valid,
        memory=vp.Memory.empty(1, 0, 6),
        semantic=torch.tensor([[0.1, 0.9, 0.1, 0.44, 0.5, 0.1]]),
        similarity=torch.tensor([[0.9, 1.0, 0.2, 1.0, 1.0, -1.0]]),
    )
    chosen = [vp.VLACache(keep=k).select(evidence, k).tolist()[0] for k in range(1, 7)]
    assert chosen == [[1], [1, 4], [1, 4, 5], [1, 2, 4, 5], [0, 1, 2, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert vp.VLACache(keep=2, relevance=1.0).select(evidence, 2).tolist() == [[1, 5]]
    absent = replace(evidence, valid=torch.tensor([[True, False, True, True, True, True]]))
    assert vp.VLACache(keep=2).select(absent, 2).tolist() == [[3, 4]], "shares of the most attended that is there"
    method = vp.VLACache()
    static = torch.tensor([[0.997, 0.999, 0.99], [0.9, 1.0, 1.0]])
    assert [method.reuses(static, count) for count in (1, 2, 3)] == [True, True, False]


def test_similarity_is_the_cosine_of_pixels():
    pixels = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [3.0, 3.0]]])
    before = torch.tensor([[[2.0, 1.0], [0.0, 0.0], [1.0, 0.0], [3.0, 3.0]]])
    assert pixel_similarity(pixels, before)[0].tolist() == pytest.approx([0.8, 1.0, 0.0, 1.0])


TILED = [cases.reference(), cases.chunk(), cases.openvla("sdpa"), cases.openvla_oft("l1")]


@pytest.mark.parametrize("case", TILED, ids=str)
def test_each_token_covers_its_tile_of_its_camera(case):
    """A change in one place of one camera is less similar there alone, and by the cosine of the colours."""
    model = case.build()
    reference = case.name in ("reference", "chunk")
    cameras, side = len(model.cameras), 16 if not reference else model.config.image_size // model.config.patch_size
    size = model.config.image_size if reference else 224
    tile = size // side
    colours = torch.randint(0, 256, (2, cameras, size, size, 3), generator=torch.Generator().manual_seed(0))
    changed = colours.clone()
    row, column, camera = 2, side - 3, cameras - 1
    box = changed[:, camera, row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
    old = box.clone()
    box[..., 1] = 255 - box[..., 1]
    family = family_of(model)
    found = []
    for images in (colours, changed):
        pixels = images.to(torch.uint8)
        if reference:
            seen = model.pixels(pixels[:, 0] if cameras == 1 else pixels)
        else:
            seen = model.processor.pixel_values(list(pixels.numpy().swapaxes(0, 1)))
        found.append(family.patches(seen))
    similarity = pixel_similarity(*found)
    token = (camera * side + row) * side + column
    others = torch.arange(cameras * side * side) != token
    assert (similarity[:, others] == 1).all()
    expected = torch.nn.functional.cosine_similarity(old.flatten(1).float(), box.flatten(1).float())
    assert similarity[:, token].tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@dataclass(frozen=True)
class Fixed(vp.KeepFixed):
    """Computes given tokens and reuses the others."""

    pruned: str = field(default="reuse", kw_only=True)

    @property
    def treatments(self):
        return ("reuse",)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_formula_counts_what_is_computed(attention):
    model = tiny_lm(backend=attention)
    embeds = prompt(1)[0]

    @torch.no_grad()
    def control_step():
        EYE(embeds)
        output = model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
        for _ in range(3):
            output = model(inputs_embeds=torch.randn(1, 1, 32), **{CACHE: cache_of(output)}, use_cache=True)

    shape, sizes = DecoderShape.of(model.config), StepShape(TOKENS, LENGTH - TOKENS, 4)
    with attach(Fixed((1, 4, 7, 9), layer=2), model):
        control_step()
        counted = count_flops(control_step)
    expected = decoder_flops(shape, sizes, 4, 2, "reuse").total
    assert counted == pytest.approx(expected, rel=0.005)
    assert expected < 0.97 * decoder_flops(shape, sizes, 4, 2, "freeze").total


def test_models_whose_pixels_nobody_knows_are_refused():
    for model, options in ((tiny_lm(), {"visual": VISUAL}), (cases.pi0("sdpa").build(), {})):
        before = whole_state(model)
        with pytest.raises(vp.UnsupportedModelError, match="pixels under each visual token"):
            vp.VLACache().attach(model, **options)
        assert whole_state(model) == before
    with pytest.raises(vp.UnsupportedModelError, match="without a diffusion head"):
        vp.VLACache().attach(cases.openvla_oft("diffusion").build())


def test_a_prompt_without_images_and_a_graph_are_refused():
    model = tiny_lm()
    with attach(vp.VLACache(layer=2), model) as session:
        with pytest.raises(vp.SessionError, match="no images went through"):
            decode(model, prompt()[0], None, make_cache("dynamic", model), 1)
        with pytest.raises(vp.UnsupportedModelError, match=r"without compile\(\)"):
            session.compile()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruned": "drop"}, "pruned='drop'"),
        ({"layer": 0}, "layer=0"),
        ({"threshold": 1.1}, "threshold="),
        ({"threshold": True}, "threshold="),
        ({"relevance": 0}, "relevance="),
        ({"refresh_every": 1}, "refresh_every="),
        ({"then": ((4, 2.0),)}, "keep=2.0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(vp.OptionError, match=message):
        vp.VLACache(**options)
    with pytest.raises(vp.OptionError, match="'drop', 'freeze'"):
        vp.FastV(pruned="reuse")


def test_keys_of_another_type_are_not_reused():
    """A policy that is moved to another type, or run under autocast, begins anew instead of mixing two types."""
    case = cases.reference()
    model = case.build()
    with vp.VLACache(keep=0.5).attach(model) as session:

        def reuses() -> bool:
            case.step(model, 0, BOTH)
            return session.kept is not None

        assert [reuses(), reuses()] == [False, True]
        model.bfloat16()
        assert [reuses(), reuses()] == [False, True]
        model.float()
        assert [reuses(), reuses()] == [False, True]
        with torch.autocast("cpu", torch.bfloat16):
            assert [reuses(), reuses()] == [False, True]
        assert [reuses(), reuses()] == [False, True]


@pytest.mark.parametrize("change", CHANGES)
def test_keys_that_other_adapters_made_are_not_reused(change):
    case = cases.reference()
    model = case.build()
    layers = family_of(model).decoder.layers
    for earlier in CHANGES[: CHANGES.index(change)]:
        change_adapters(layers, earlier)
    with vp.VLACache(keep=0.5).attach(model) as session:
        kept = []
        for step in range(4):
            change_adapters(layers, change if step == 2 else None)
            case.step(model, 0, BOTH)
            kept.append(session.kept is not None)
        assert kept == [False, True, False, True]


def test_keys_are_held_without_their_graphs():
    """With gradients on, each step would otherwise hold all steps of the episode before it."""
    model = tiny_lm()
    given = []
    with attach(vp.VLACache(keep=0.5, layer=2, **ANY), model) as session, torch.enable_grad():
        for scene in range(3):
            embeds = prompt(1, seed=scene)[0].clone().requires_grad_()
            EYE(embeds)
            output = model.model(inputs_embeds=embeds, use_cache=True)
            assert output.last_hidden_state.requires_grad
            given.append(weakref.ref(embeds))
            del embeds, output
        assert session.kept is not None
        gc.collect()
        assert given[0]() is None
