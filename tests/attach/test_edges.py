"""Corners of the attachment in which a naive hook goes silently wrong: each is right, or refused in a sentence."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

import vla_pruner as vp
from tests.attach.tiny import (
    CACHE,
    LAYERS,
    LENGTH,
    TOKENS,
    VISUAL,
    K,
    decode,
    make_cache,
    positions_of,
    prompt,
    tiny_lm,
)
from tests.state import whole_state
from vla_pruner.caches import cache_of

SEMANTIC = vp.VLAPruner(keep=0.25, layer=K, warmup="semantic", preset="paper")


def step(model, rows=2, cache=None, seed=1):
    return decode(model, prompt(rows, seed=seed)[0], None, cache or make_cache("dynamic", model), 3)[1]


@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_several_cameras_are_numbered_in_the_order_given(pruned):
    model = tiny_lm()
    embeds = prompt()[0]
    cameras = {"wrist": slice(14, 25), "front": slice(1, 14)}
    one = {"visual": VISUAL}
    with vp.KeepFixed((0, 11, 12), layer=K, pruned=pruned).attach(model, visual=cameras):
        two = decode(model, embeds, None, make_cache("dynamic", model), 2)[1]
    # Position 14 is the wrist camera's first token, positions 1 and 2 the front camera's.
    with vp.KeepFixed((13, 0, 1), layer=K, pruned=pruned).attach(model, **one):
        assert torch.equal(decode(model, embeds, None, make_cache("dynamic", model), 2)[1], two)


@pytest.mark.parametrize("method", [vp.VLAPruner(keep=0.25), SEMANTIC, vp.RandomKeep(keep=0.25)], ids=str)
def test_a_row_of_padding_alone_is_refused(method):
    model = tiny_lm()
    embeds, mask = prompt()
    mask[1] = 0
    with method.attach(model, visual=VISUAL, padding_side="right"), pytest.raises(vp.SessionError, match="as a whole"):
        decode(model, embeds, mask, make_cache("dynamic", model), 1)


@pytest.mark.parametrize("method", [vp.VLAPruner(keep=0.25), vp.DivPrune(keep=0.25)], ids=str)
def test_a_batch_of_no_rows_is_refused(method):
    model = tiny_lm()
    embeds = prompt()[0]
    with method.attach(model, visual=VISUAL) as session, torch.no_grad():
        with pytest.raises(vp.SessionError, match="a batch of no rows"):
            model(inputs_embeds=embeds[:0])
        assert session.memory is None
        model(inputs_embeds=embeds)
        assert session.step is not None


def test_an_absent_camera_is_never_kept():
    model = tiny_lm()
    embeds, mask = prompt()
    mask[1, 1:13] = 0
    with SEMANTIC.attach(model, visual=VISUAL) as session:
        decode(model, embeds, mask, make_cache("dynamic", model), 1)
        assert (session.kept[1] >= 12).all()  # type: ignore[index]
        assert (session.kept[0] < 12).any()  # type: ignore[index]
    mask[:, 0] = 0
    with SEMANTIC.attach(model, visual=slice(0, 24)), pytest.raises(vp.SessionError, match='padding_side="right"'):
        decode(model, embeds, mask, make_cache("dynamic", model), 1)
    with SEMANTIC.attach(model, visual=slice(0, 24), padding_side="right"):
        decode(model, embeds, mask, make_cache("dynamic", model), 1)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("pads_see", ["prompt", "themselves"])
def test_a_callers_4d_mask_says_what_a_2d_mask_says(additive, pads_see):
    model = tiny_lm()
    embeds, mask = prompt(padding="right")
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
    if pads_see == "themselves":
        itself = torch.eye(LENGTH, dtype=torch.bool)
        causal = torch.where(mask.bool()[:, None, :, None], causal, itself)
    if additive:
        causal = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    with SEMANTIC.attach(model, visual=VISUAL) as session, torch.no_grad():
        flat = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions_of(mask)).logits
        kept = session.kept
        session.reset()
        full = model(inputs_embeds=embeds, attention_mask=causal, position_ids=positions_of(mask)).logits
        assert torch.equal(session.kept, kept)  # type: ignore[arg-type]
    last = (mask * torch.arange(LENGTH)).argmax(-1)
    rows = torch.arange(2)
    assert (full[rows, last] - flat[rows, last]).abs().max() < 1e-5


def test_hidden_states_keep_their_length():
    model = tiny_lm()
    embeds = prompt()[0]
    with SEMANTIC.attach(model, visual=VISUAL), torch.no_grad():
        out = model.model(inputs_embeds=embeds, output_hidden_states=True)
        parts = model.model(inputs_embeds=embeds, output_hidden_states=True, return_dict=False)
    assert [h.shape[1] for h in out.hidden_states] == [LENGTH] * (LAYERS + 1)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert [h.shape[1] for h in parts[2]] == [LENGTH] * (LAYERS + 1)


@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_a_static_cache_is_reused_over_control_steps(pruned):
    model = tiny_lm()
    method = vp.VLAPruner(keep=0.25, layer=K, window=1, pruned=pruned, preset="paper")
    with method.attach(model, visual=VISUAL) as session:
        fresh = [step(model, seed=s) for s in range(4)]
        session.reset()
        cache = make_cache("static", model)
        for seed in range(4):
            assert (step(model, cache=cache, seed=seed) - fresh[seed]).abs().max() < 1e-4
            cache.reset()


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_a_window_that_decoding_crosses_is_refused(kind):
    model = tiny_lm(kind, "eager", sliding_window=LENGTH + 2)
    with SEMANTIC.attach(model, visual=VISUAL), pytest.raises(vp.UnsupportedModelError, match="33 positions"):
        step(model)


def test_layers_of_another_attention_type_must_come_first():
    types = ["sliding_attention"] * 4 + ["full_attention"] * 2
    model = tiny_lm("qwen2", use_sliding_window=True, sliding_window=99, layer_types=types)
    with pytest.raises(vp.UnsupportedModelError, match="give layer=5 or more"):
        SEMANTIC.attach(model, visual=VISUAL)
    with vp.VLAPruner(keep=0.25, layer=5, warmup="semantic", preset="paper").attach(model, visual=VISUAL):
        step(model)


def test_an_image_at_the_end_is_refused():
    model = tiny_lm()
    with SEMANTIC.attach(model, visual=slice(7, 31)), pytest.raises(vp.SessionError, match="must end in text"):
        step(model)


def test_padding_that_pushes_the_image_over_the_end_is_refused():
    model = tiny_lm()
    embeds, mask = prompt()
    mask[0, :12] = 0
    with (
        SEMANTIC.attach(model, visual=VISUAL, padding_side="left"),
        pytest.raises(vp.SessionError, match="beyond the end"),
    ):
        decode(model, embeds, mask, make_cache("dynamic", model), 1)


def test_text_queries_need_text_after_the_image():
    model = tiny_lm()
    method = vp.VLAPruner(keep=0.25, layer=K, warmup="semantic", semantic_queries="text", preset="paper")
    embeds, mask = prompt()
    mask[1, 25:] = 0
    with method.attach(model, visual=slice(1, 24)) as session:
        decode(model, embeds, None, make_cache("dynamic", model), 1)
        assert (session.scores["semantic"].sum(1) > 0).all()
    with method.attach(model, visual=VISUAL), pytest.raises(vp.SessionError, match="must end in text"):
        decode(model, embeds, mask, make_cache("dynamic", model), 1)


def test_changing_the_backend_while_attached_is_refused():
    model = tiny_lm(backend="eager")
    with vp.VLAPruner(keep=1.0, preset="paper").attach(model, visual=VISUAL):
        step(model)
        model.set_attn_implementation("sdpa")
        with pytest.raises(vp.SessionError, match="'eager' to 'sdpa'"):
            step(model)


def test_a_compiled_decoder_is_refused():
    model = tiny_lm()
    model.model.compile(backend="eager")
    with pytest.raises(vp.UnsupportedModelError, match="compiled"):
        SEMANTIC.attach(model, visual=VISUAL)


def test_a_layer_that_is_run_twice_is_refused():
    """Layers may share weights, but a hook on one module cannot tell at which of its places it runs."""
    model = tiny_lm()
    model.model.layers[4].mlp = model.model.layers[3].mlp
    model.model.layers[4].self_attn.k_proj.weight = model.model.layers[3].self_attn.k_proj.weight
    with vp.FastV(keep=4).attach(model, visual=VISUAL) as session:
        decode(model, prompt()[0], None, make_cache("dynamic", model), 1)
        assert session.kept is not None
    model.model.layers[4] = model.model.layers[3]
    before = whole_state(model)
    with pytest.raises(vp.UnsupportedModelError, match="Layers 3 and 4 of LlamaModel are one and the same module"):
        vp.FastV(keep=4).attach(model, visual=VISUAL)
    assert whole_state(model) == before


def test_copying_an_attached_model_is_refused():
    model = tiny_lm()
    with SEMANTIC.attach(model, visual=VISUAL):
        for copier in (copy.deepcopy, pickle.dumps):
            with pytest.raises(vp.SessionError, match="detach first"):
                copier(model)
    copy.deepcopy(model)


def test_steps_cannot_be_interleaved():
    model = tiny_lm()
    embeds = prompt()[0]
    with SEMANTIC.attach(model, visual=VISUAL), torch.no_grad():
        one = model(inputs_embeds=embeds, **{CACHE: make_cache("dynamic", model)})
        model(inputs_embeds=embeds, **{CACHE: make_cache("dynamic", model)})
        with pytest.raises(vp.SessionError, match="interleaved"):
            model(input_ids=torch.ones(2, 1, dtype=torch.int64), **{CACHE: cache_of(one)})


def test_prompts_in_pieces_are_refused():
    model = tiny_lm()
    embeds = prompt()[0]
    with SEMANTIC.attach(model, visual=VISUAL), torch.no_grad():
        out = model(inputs_embeds=embeds[:, :26])
        with pytest.raises(vp.SessionError, match="several pieces"):
            model(inputs_embeds=embeds[:, 26:], **{CACHE: cache_of(out)})


def test_other_caches_are_refused():
    model = tiny_lm()
    cache = DynamicCache(config=model.config, offloading=False)
    cache.offloading = True
    with SEMANTIC.attach(model, visual=VISUAL), pytest.raises(vp.UnsupportedModelError, match="not offloaded"):
        step(model, cache=cache)


def test_a_detached_session_is_not_entered_again():
    model = tiny_lm()
    session = SEMANTIC.attach(model, visual=VISUAL)
    session.detach()
    with pytest.raises(vp.SessionError, match="attach the method anew"), session:
        pass


def test_the_baseline_fits_any_depth():
    model = tiny_lm(num_hidden_layers=2)
    untouched = step(model)
    with vp.Unpruned().attach(model, visual=VISUAL):
        assert torch.equal(step(model), untouched)


def test_features_are_the_hidden_states_entering_the_pruning_layer():
    model = tiny_lm()
    embeds = prompt()[0]
    seen = {}

    class Spy(vp.RandomKeep):
        @property
        def needs(self):
            return frozenset({"features"})

        def select(self, evidence, k):
            seen["features"] = evidence.features
            return super().select(evidence, k)

    with torch.no_grad():
        expected = model.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states[K][:, VISUAL]
    with Spy(keep=0.5, layer=K).attach(model, visual=VISUAL):
        step(model)
    assert seen["features"].shape == (2, TOKENS, 32)
    assert torch.equal(seen["features"], expected)


def test_a_method_that_is_replaced_twice_calls_both():
    from vla_pruner.replacements import Replacements

    class Owner:
        def double(self, number):
            return 2 * number

    owner, first, second = Owner(), Replacements(), Replacements()
    first.put(owner, "double", lambda original, number: original(number) + 1)
    second.put(owner, "double", lambda original, number: original(number) * 10)
    assert owner.double(3) == 70
    second.remove()
    assert owner.double(3) == 7
    first.remove()
    assert owner.double(3) == 6
    assert not vars(owner)


@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_a_frame_of_nan_leaves_no_trace_in_the_memory(pruned):
    """A camera's driver that gives NaN once must not decide what is kept in the control steps after it."""
    model = tiny_lm()
    embeds = prompt()[0]
    spoiled = embeds.clone()
    spoiled[:, VISUAL] = torch.nan
    method = vp.VLAPruner(keep=0.25, layer=K, pruned=pruned, window=3, preset="paper")

    def act(inputs):
        return decode(model, inputs, None, make_cache("dynamic", model), 2)[1]

    with method.attach(model, visual=VISUAL) as session:
        act(embeds)
        before = session.memory
        act(spoiled)
        after = session.memory
        assert torch.equal(after.action[:, -1], before.action[:, -1])
        assert torch.equal(after.age[:, -1], before.age[:, -1] + 1)
        assert all(value.isfinite().all() for value in (after.action, after.semantic))
        act(embeds)
        act(embeds)
        assert session.kept is not None
        assert all(value.isfinite().all() for value in (session.memory.action, session.memory.semantic))
