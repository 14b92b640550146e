"""Several pruning layers in one control step: the tokens kept, the scores read, the cost, and the refusals."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

import vla_pruner as vp
from tests.attach.tiny import CACHE, LAYERS, LENGTH, TOKENS, VISUAL, K, decode, make_cache, prompt, tiny_lm
from tests.families.matrix import kept_at
from tests.state import whole_state
from vla_pruner.auditing import FullLength, audit
from vla_pruner.caches import cache_of
from vla_pruner.cost import DecoderShape, StepShape, count_flops, decoder_flops

THREE = vp.SparseVLM(keep=0.75, layer=1, then=((3, 0.5), (5, 6)))
CAMERAS = {"front": slice(1, 17), "wrist": slice(17, 25)}


@dataclass(frozen=True)
class Fixed(vp.KeepFixed):
    """KeepFixed at several layers; the ids of a later one are places among the tokens that the one before left."""

    then: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def stages(self) -> tuple[vp.Method, ...]:
        return (
            replace(self, then=()),
            *(vp.KeepFixed(ids, layer=layer, pruned=self.pruned) for layer, ids in self.then),
        )


def step(model, rows=2, seed=1, padding=None, cache="dynamic"):
    embeds, mask = prompt(rows, padding, seed)
    return decode(model, embeds, mask if padding else None, make_cache(cache, model), 3)[1]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_agrees_with_the_full_length_reference(pruned, backend, padding, cache):
    model = tiny_lm(backend=backend)
    options = {"visual": VISUAL, "padding_side": "left" if padding == "left" else "right"}
    with replace(THREE, pruned=pruned).attach(model, **options) as session:
        actual = step(model, padding=padding, cache=cache)
        assert session.step is not None
        layout, kept = session.step.layout, kept_at(session.step)
        assert session.kept is not None
        assert session.kept.tolist() == kept[5].tolist()
    assert {layer: ids.shape[1] for layer, ids in kept.items()} == {1: 18, 3: 12, 5: 6}
    for before, after in ((1, 3), (3, 5)):
        for row in range(2):
            assert set(kept[after][row].tolist()) < set(kept[before][row].tolist())
    later = {3: kept[3], 5: kept[5]}
    with FullLength(model, layout, kept[1], layer=1, then=later, pruned=pruned, **options):
        expected = step(model, padding=padding, cache=cache)
    assert (actual - expected).abs().max() < 1e-4
    with FullLength(model, layout, kept[1], layer=1, pruned=pruned, **options):
        assert (actual - step(model, padding=padding, cache=cache)).abs().max() > 1e-3, "later stages must show"


@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_each_stage_chooses_by_the_attention_before_it(pruned):
    """The score of a later stage is that of the model with the tokens of earlier ones masked; gone tokens count 0."""
    model = tiny_lm()
    method = vp.SparseVLM(keep=0.5, layer=2, then=((4, 0.25),), pruned=pruned)
    with method.attach(model, visual=VISUAL) as session:
        step(model)
        assert session.step is not None
        layout, kept, scores = session.step.layout, kept_at(session.step), session.scores["semantic"]
    reader = vp.SparseVLM(keep=1.0, layer=4)
    reference = FullLength(model, layout, kept[2], layer=2, pruned=pruned, visual=VISUAL)
    with reference, reader.attach(model, visual=VISUAL) as session:
        step(model)
        expected = session.scores["semantic"]
    assert (scores - expected).abs().max() < 1e-6
    assert (scores > 0).sum(1).tolist() == ([12, 12] if pruned == "drop" else [24, 24])
    among = expected.gather(1, kept[2]).topk(6, dim=1).indices.sort(dim=1).values
    assert torch.equal(kept[2].gather(1, among), kept[4])


def test_a_stage_is_the_method_of_its_layer_alone():
    """The first of two stages keeps everything: what is left is the second."""
    model = tiny_lm()
    with vp.SparseVLM(keep=0.25, layer=4).attach(model, visual=VISUAL):
        expected = step(model)
    with vp.SparseVLM(keep=1.0, layer=2, then=((4, 0.25),)).attach(model, visual=VISUAL):
        assert torch.equal(step(model), expected)
    with vp.SparseVLM(keep=0.25, layer=2).attach(model, visual=VISUAL):
        expected = step(model)
    with vp.SparseVLM(keep=0.25, layer=2, then=((4, 6),)).attach(model, visual=VISUAL) as session:
        assert torch.equal(step(model), expected), "6 of 24 tokens are .25: nothing is left to prune"
        assert list(kept_at(session.step)) == [2]


def test_keep_all_changes_no_bit_and_warm_up_prunes_at_no_stage():
    model = tiny_lm()
    untouched, before = step(model), whole_state(model)
    everything = replace(THREE, keep=1.0, then=((3, 1.0), (5, TOKENS)))
    for method in (everything, replace(THREE, warmup_steps=3)):
        with method.attach(model, visual=VISUAL) as session:
            for _ in range(3):
                assert torch.equal(step(model), untouched)
                assert session.kept is None
    assert whole_state(model) == before


def test_budgets_per_camera_hold_at_each_stage():
    model = tiny_lm()
    method = vp.SparseVLM(
        keep={"front": 0.5, "wrist": 0.75},
        layer=2,
        then=((3, {"front": 0.25, "wrist": 6}), (4, {"front": 1, "wrist": 2})),
    )
    with method.attach(model, visual=CAMERAS) as session:
        step(model)
        kept = kept_at(session.step)
    counts = {layer: [(ids < 16).sum(1).tolist(), (ids >= 16).sum(1).tolist()] for layer, ids in kept.items()}
    assert counts == {2: [[8, 8], [6, 6]], 3: [[4, 4], [6, 6]], 4: [[1, 1], [2, 2]]}


def test_ids_of_a_later_stage_are_places_among_what_is_left():
    model = tiny_lm()
    method = Fixed((2, 3, 5, 7, 11, 13), layer=2, then=((3, (0, 2, 5)), (4, (1,))))
    with method.attach(model, visual=VISUAL) as session:
        step(model)
        assert {layer: ids[0].tolist() for layer, ids in kept_at(session.step).items()} == {
            2: [2, 3, 5, 7, 11, 13],
            3: [2, 5, 13],
            4: [5],
        }


@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_hidden_states_keep_their_places_at_every_length(pruned):
    model = tiny_lm()
    embeds = prompt()[0]
    with replace(THREE, pruned=pruned).attach(model, visual=VISUAL) as session, torch.no_grad():
        found = model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
        assert session.step is not None
        layout, kept = session.step.layout, kept_at(session.step)
    assert [states.shape[1] for states in found] == [LENGTH] * (LAYERS + 1)
    later = {3: kept[3], 5: kept[5]}
    with FullLength(model, layout, kept[1], layer=1, then=later, pruned=pruned, visual=VISUAL), torch.no_grad():
        expected = model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
    for depth, (one, other) in enumerate(zip(found, expected, strict=True)):
        live = (one != 0).any(-1)
        left = [TOKENS, TOKENS, 18, 18, 12, 12, 6][depth]
        assert live.sum(1).tolist() == [LENGTH - TOKENS + left] * 2
        assert (one - other)[live].abs().max() < 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_the_formula_counts_what_is_computed(pruned, attention):
    model = tiny_lm(backend=attention, vocab_size=64)
    method = Fixed(tuple(range(18)), layer=1, then=((3, tuple(range(12))), (5, (1, 4))), pruned=pruned)
    embeds = prompt(1)[0]

    @torch.no_grad()
    def control_step():
        output = model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
        for _ in range(3):
            output = model(inputs_embeds=torch.randn(1, 1, 32), **{CACHE: cache_of(output)}, use_cache=True)

    shape, sizes = DecoderShape.of(model.config), StepShape(TOKENS, LENGTH - TOKENS, 4)
    with method.attach(model, visual=VISUAL):
        counted = count_flops(control_step)
    expected = decoder_flops(shape, sizes, 18, 1, pruned, then=((3, 12), (5, 2))).total
    assert counted == pytest.approx(expected, rel=0.005)
    assert expected < 0.97 * decoder_flops(shape, sizes, 18, 1, pruned).total
    assert decoder_flops(shape, sizes, 18, 1, pruned, then=((1, 2),)) == decoder_flops(shape, sizes, 2, 1, pruned)
    for wrong in (((0, 2),), ((3, 19),), ((7, 2),), ((3, 0),)):
        with pytest.raises(ValueError, match="must lie between"):
            decoder_flops(shape, sizes, 18, 1, pruned, then=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3, "then": ((3, 0.1),)}, "layer=3 with then at layer 3"),
        ({"layer": 3, "then": ((2, 0.1),)}, "layer=3 with then at layer 2"),
        ({"layer": 2, "then": ((6, 0.1),)}, "then at layer=6 was given"),
        (
            {"layer": 2, "keep": 0.25, "then": ((4, 0.5),)},
            "then at layer=4 is to keep 12 .*, but layer 2 leaves 6",
        ),
        ({"layer": 2, "keep": 0.25, "then": ((4, 25),)}, "then at layer 4: keep=25 tokens"),
        ({"layer": 2, "keep": 0.25, "then": ((4, {"image": 2}),)}, "per camera at some"),
        ({"then": [(4, 0.5)]}, "then="),
        ({"then": (4, 0.5)}, "then="),
        ({"then": ((4, 0.0),)}, "at its layer 4, keep=0.0"),
        ({"then": ((0, 0.5),)}, "ints of 1 or more"),
    ],
)
def test_stages_that_do_not_fit_are_refused(options, message):
    model = tiny_lm()
    before = whole_state(model)
    with pytest.raises(vp.OptionError, match=message):
        vp.SparseVLM(**options).attach(model, visual=VISUAL)
    assert whole_state(model) == before


def test_pruning_before_the_decoder_has_one_stage():
    with pytest.raises(vp.BudgetError, match="`layer` is 1 or more"):
        Fixed((1, 2), layer=0, then=((K, (0,)),)).attach(tiny_lm(), visual=VISUAL)


def test_the_audit_refuses_what_it_cannot_prove():
    for method in (THREE, vp.TextQuery(gate=3)):
        with pytest.raises(vp.OptionError, match="audit"):
            audit(vp.random_policy("reference"), method)
