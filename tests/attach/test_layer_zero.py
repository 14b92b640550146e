"""Pruning before the first layer: the decoder's call is short, and agrees with the full one with tokens masked."""

from __future__ import annotations

import pytest
import torch

import vla_pruner as vp
from tests.attach.tiny import (
    CACHE,
    LAYERS,
    LENGTH,
    TOKENS,
    TYPES,
    VISUAL,
    decode,
    make_cache,
    prompt,
    reference_hidden,
    tiny_lm,
)
from tests.families import cases
from tests.pairwise import pairwise

KEPT = (0, 3, 4, 9, 15, 22)
STEPS = 4
PRUNED = pairwise(
    TYPES,
    ("sdpa", "eager"),
    ("dynamic", "static"),
    (None, "right", "left"),
    ("drop", "freeze"),
    possible=lambda kind, backend, *_: (kind, backend) != ("gemma2", "sdpa"),
)


def options(padding):
    return {"visual": VISUAL, "padding_side": "left" if padding == "left" else "right"}


@pytest.mark.parametrize(("kind", "backend", "cache", "padding", "pruned"), PRUNED)
def test_pruned_agrees_with_full_length_reference(kind, backend, cache, padding, pruned):
    model = tiny_lm(kind, backend)
    embeds, mask = prompt(padding=padding)
    given = None if padding is None else mask
    untouched = decode(model, embeds, given, make_cache(cache, model), STEPS)[1]
    with vp.KeepFixed(KEPT, layer=0, pruned=pruned).attach(model, **options(padding)):
        tokens, logits = decode(model, embeds, given, make_cache(cache, model), STEPS)
    assert torch.equal(decode(model, embeds, given, make_cache(cache, model), STEPS)[1], untouched)
    assert (logits - untouched).abs().max() > 1e-2, "pruning must show, or this test could not fail"

    gone = torch.zeros(2, LENGTH + STEPS, dtype=torch.bool)
    dropped = torch.tensor([i for i in range(TOKENS) if i not in KEPT])
    for row in range(2):
        start = VISUAL.start + (row + 1 if padding == "left" else 0)
        gone[row, (start + dropped).clamp_max(LENGTH - 1)] = True
    decoded = model.get_input_embeddings()(tokens[:, :STEPS])
    full = torch.cat([mask, torch.ones(2, STEPS, dtype=mask.dtype)], dim=1)
    with torch.no_grad():
        sequence = torch.cat([embeds, decoded], dim=1)
        expected = model.lm_head(reference_hidden(model.model, sequence, full, gone, 0, frozen=pruned == "freeze"))
        cap = getattr(model.config, "final_logit_softcapping", None)
        expected = torch.tanh(expected / cap) * cap if cap else expected
    last = (mask * torch.arange(LENGTH)).argmax(-1)
    first = expected[torch.arange(2), last][:, None]
    expected = torch.cat([first, expected[:, LENGTH:]], dim=1)
    assert (expected - logits).abs().max() < 1e-4


@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_every_layer_is_short_and_the_output_is_not(pruned):
    model = tiny_lm()
    embeds = prompt()[0]
    lengths = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    cache = make_cache("dynamic", model)
    with vp.KeepFixed(KEPT, layer=0, pruned=pruned).attach(model, visual=VISUAL):
        out = model(inputs_embeds=embeds, **{CACHE: cache}, output_hidden_states=True)
    short = LENGTH - TOKENS + len(KEPT)
    assert lengths == [short] * LAYERS
    assert {layer.keys.shape[-2] for layer in cache.layers} == {short if pruned == "drop" else LENGTH}
    assert out.logits.shape[1] == LENGTH
    assert {hidden.shape[1] for hidden in out.hidden_states} == {LENGTH}


def test_tokens_by_id_and_without_positions_or_masks():
    """Callers that leave everything to the decoder get the original positions all the same."""
    model = tiny_lm()
    ids = torch.arange(LENGTH)[None] % 60 + 1
    with vp.KeepFixed(KEPT, layer=0).attach(model, visual=VISUAL), torch.no_grad():
        cache = make_cache("dynamic", model)
        model(input_ids=ids, **{CACHE: cache})
        bare = model(input_ids=torch.tensor([[5]]), **{CACHE: cache}).logits
        cache = make_cache("dynamic", model)
        mask, positions = torch.ones(1, LENGTH + 1, dtype=torch.int64), torch.arange(LENGTH + 1)[None]
        model(input_ids=ids, **{CACHE: cache}, attention_mask=mask[:, :-1], position_ids=positions[:, :-1])
        told = model(
            input_ids=torch.tensor([[5]]),
            **{CACHE: cache},
            attention_mask=mask,
            position_ids=positions[:, -1:],
        ).logits
    assert torch.equal(bare, told)


def run(model, scene):
    return decode(model, prompt(seed=scene)[0], None, make_cache("dynamic", model), 2)[1]


@pytest.mark.parametrize("pruned", ["drop", "freeze"])
@pytest.mark.parametrize("unseen", ["zero", "carry"])
def test_vla_pruner_chooses_by_what_it_remembers(pruned, unseen):
    model = tiny_lm()
    method = vp.VLAPruner(keep=6, layer=0, window=2, refresh_every=4, pruned=pruned, unseen=unseen, preset="paper")
    with method.attach(model, visual=VISUAL) as session:
        pattern = []
        for scene in range(9):
            run(model, scene)
            pattern.append(session.kept is not None)
            assert session.scores["semantic"].shape == (2, TOKENS)
        assert pattern == [False, False, True, True, False, True, True, True, False]
        # The choice of a pruned step is made by the memory before it, whatever the image is.
        session.reset()
        for scene in range(2):
            run(model, scene)
        memory = session.memory
        run(model, 2)
        one = session.kept
        session.memory = memory
        run(model, 3)
        assert one is not None
        assert session.kept is not None
        if pruned == "drop":
            seen = session.scores["semantic"] > 0
            assert torch.equal(seen.nonzero()[:, 1].view(2, 6), session.kept)
        after = session.memory
        assert after is not None
        assert after.semantic.shape == (2, 2, TOKENS)
        assert (after.age[:, -1] > 0).sum() == (2 * (TOKENS - 6) if pruned == "drop" else 0)


def test_the_semantic_score_of_an_unpruned_step_is_that_of_layer_three():
    model = tiny_lm()
    scores = []
    for method in (
        vp.VLAPruner(keep=6, layer=0, refresh_every=4, preset="paper"),
        vp.VLAPruner(keep=6, layer=3, preset="paper"),
    ):
        with method.attach(model, visual=VISUAL) as session:
            run(model, 1)
            scores.append(session.scores["semantic"])
    assert torch.equal(*scores)


@pytest.mark.parametrize(
    "method", [vp.RandomKeep(keep=1.0, layer=0), vp.VLAPruner(keep=1.0, layer=0, refresh_every=4, preset="paper")]
)
def test_keep_all_is_bit_identical(method):
    model = tiny_lm()
    untouched = [run(model, scene) for scene in range(5)]
    with method.attach(model, visual=VISUAL):
        for scene in range(5):
            assert torch.equal(run(model, scene), untouched[scene])


@pytest.mark.parametrize(
    "case", [cases.reference(), cases.chunk(), cases.openvla("sdpa"), cases.openvla_oft("l1")], ids=str
)
@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_policies(case, pruned):
    """Half the tokens at random before the decoder: short layers, rows alone as together, no trace."""
    from tests.families import matrix
    from tests.state import whole_state

    model = case.build()
    untouched = case.step(model, 0, matrix.BOTH)
    before = whole_state(model)
    with vp.RandomKeep(keep=0.5, layer=0, pruned=pruned).attach(model) as session:
        both = case.step(model, 0, matrix.BOTH)
        kept, layout = session.kept, session.step.layout
    assert whole_state(model) == before
    assert (both - untouched).abs().max() > 1e-3
    with matrix.FullLength(model, layout, kept, layer=0, pruned=pruned):
        assert (case.step(model, 0, matrix.BOTH) - both).abs().max() < 1e-4


def test_what_needs_this_steps_attention_cannot_choose_before_it():
    with pytest.raises(vp.BudgetError, match="FastV chooses by attention in the layer before"):
        vp.FastV(layer=0)
    with pytest.raises(vp.OptionError, match="refresh_every"):
        vp.VLAPruner(layer=0, preset="paper")
    with pytest.raises(vp.OptionError, match="from 1 to 5"):
        vp.RandomKeep(layer=0).attach(cases.pi0("sdpa").build())
    model = tiny_lm()
    with vp.VLAPruner(layer=3, preset="paper").attach(model, visual=VISUAL) as session:
        run(model, 0)
        other = session.memory
    with (
        vp.VLAPruner(layer=0, refresh_every=4, preset="paper").attach(model, visual=VISUAL) as session,
        pytest.raises(vp.SessionError, match="another layer"),
    ):
        session.memory = other
