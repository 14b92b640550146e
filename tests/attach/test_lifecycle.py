"""Attaching leaves no trace, refuses what it cannot do, and keeps episodes and rows apart."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import vla_pruner as vp
from tests.attach.tiny import CACHE, LENGTH, TOKENS, VISUAL, K, decode, make_cache, prompt, tiny_lm
from tests.state import whole_state
from vla_pruner.caches import cache_of

METHODS = [
    vp.VLAPruner(keep=0.5, layer=K, warmup="semantic", preset="paper"),
    vp.VLAPruner(keep=0.25, layer=K, warmup="semantic", pruned="freeze", preset="paper"),
    vp.RandomKeep(keep=0.25, layer=K),
    vp.KeepFixed((1, 2, 5), layer=K, pruned="freeze"),
    vp.Unpruned(),
]


def step(model, rows=2, seed=1, cache="dynamic"):
    return decode(model, prompt(rows, seed=seed)[0], None, make_cache(cache, model), 3)[1]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_detach_leaves_no_trace(method):
    model = tiny_lm()
    untouched, before = step(model), whole_state(model)
    with method.attach(model, visual=VISUAL):
        assert whole_state(model) != before
        step(model)
        step(model)
    assert whole_state(model) == before
    assert torch.equal(step(model), untouched)


def test_exception_inside_leaves_no_trace():
    model = tiny_lm()
    untouched, before = step(model), whole_state(model)

    def fail(*_):
        raise RuntimeError("robot fell over")

    with pytest.raises(RuntimeError, match="fell over"), METHODS[0].attach(model, visual=VISUAL):
        step(model)
        handle = model.model.layers[K + 1].register_forward_pre_hook(fail)
        try:
            step(model)
        finally:
            handle.remove()
    assert whole_state(model) == before
    assert torch.equal(step(model), untouched)


def test_a_failed_call_does_not_disturb_the_next():
    model = tiny_lm()
    with METHODS[0].attach(model, visual=VISUAL) as session:
        expected = [step(model), step(model)]
        session.reset()
        step(model)
        handle = model.model.layers[K + 2].register_forward_pre_hook(lambda *_: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                step(model)
        handle.remove()
        assert session.memory.steps.tolist() == [1, 1]  # type: ignore[union-attr]
        assert torch.equal(step(model), expected[1])


def test_a_refused_attachment_leaves_no_trace():
    model = tiny_lm()
    before = whole_state(model)
    with pytest.raises(vp.BudgetError, match="6 layers"):
        vp.VLAPruner(keep=0.5, preset="official").attach(model, visual=VISUAL)
    assert whole_state(model) == before
    METHODS[0].attach(model, visual=VISUAL).detach()


def test_one_session_at_a_time():
    model = tiny_lm()
    first = METHODS[0].attach(model, visual=VISUAL)
    with pytest.raises(vp.SessionError, match="already"):
        METHODS[2].attach(model, visual=VISUAL)
    first.detach()
    first.detach()
    with METHODS[2].attach(model, visual=VISUAL):
        step(model)


def test_two_models_do_not_disturb_each_other():
    one, two = tiny_lm(seed=0), tiny_lm(seed=5)
    alone = step(two)
    with METHODS[0].attach(one, visual=VISUAL) as session:
        pruned = step(one)
        with METHODS[0].attach(two, visual=VISUAL):
            step(two)
        session.reset()
        assert torch.equal(step(one), pruned)
    assert torch.equal(step(two), alone)


def test_lengths_of_every_layer_in_prefill_and_decode():
    for pruned, cached in (("drop", LENGTH - TOKENS + 6), ("freeze", LENGTH)):
        model = tiny_lm()
        seen = []
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                part.register_forward_pre_hook(
                    lambda module, args, kwargs, seen=seen: seen.append(
                        (args[0] if args else kwargs["hidden_states"]).shape[1]
                    ),
                    with_kwargs=True,
                )
        with vp.VLAPruner(keep=0.25, layer=K, warmup="semantic", pruned=pruned, preset="paper").attach(
            model, visual=VISUAL
        ):
            cache = make_cache("dynamic", model)
            decode(model, prompt()[0], None, cache, 2)
        short = LENGTH - TOKENS + 6
        assert seen[:12] == [LENGTH] * 2 * K + [short] * 2 * (6 - K)
        assert seen[12:] == [1] * 24
        assert [layer.keys.shape[-2] for layer in cache.layers] == [LENGTH + 2] * K + [cached + 2] * (6 - K)


def test_output_keeps_its_length():
    model = tiny_lm()
    embeds = prompt()[0]
    with vp.KeepFixed((0, 5), layer=K).attach(model, visual=VISUAL), torch.no_grad():
        assert model(inputs_embeds=embeds).logits.shape[1] == LENGTH
        hidden = model.model(inputs_embeds=embeds).last_hidden_state
        as_tuple = model.model(inputs_embeds=embeds, return_dict=False)[0]
    gone = [VISUAL.start + i for i in range(TOKENS) if i not in (0, 5)]
    assert torch.equal(hidden, as_tuple)
    assert (hidden[:, gone] == 0).all()
    assert (hidden[:, VISUAL.start] != 0).any()


@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_without_a_cache_and_without_a_mask(pruned):
    """The original positions of kept tokens must not be read as packed sequences; frozen keys need a cache of their
    own.
    """
    model = tiny_lm()
    embeds = prompt()[0]
    with vp.KeepFixed((0, 5, 9), layer=K, pruned=pruned).attach(model, visual=VISUAL), torch.no_grad():
        without = model(inputs_embeds=embeds, use_cache=False)
        with_cache = model(inputs_embeds=embeds, use_cache=True)
    assert cache_of(without) is None
    assert torch.equal(without.logits, with_cache.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_half_precision_models_are_scored_in_float32(dtype, pruned):
    model = tiny_lm().to(dtype)
    embeds = prompt()[0].to(dtype)
    untouched = decode(model, embeds, None, make_cache("dynamic", model), 3)[1]
    with vp.VLAPruner(keep=1.0, layer=K, pruned=pruned, preset="paper").attach(model, visual=VISUAL):
        assert torch.equal(decode(model, embeds, None, make_cache("dynamic", model), 3)[1], untouched)
    with vp.VLAPruner(keep=0.5, layer=K, warmup="semantic", pruned=pruned, preset="paper").attach(
        model, visual=VISUAL
    ) as session:
        logits = decode(model, embeds, None, make_cache("dynamic", model), 3)[1]
        assert {score.dtype for score in session.scores.values()} == {torch.float32}
        assert session.memory.action.dtype == torch.float32  # type: ignore[union-attr]
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_generate_is_pruned_too():
    model = tiny_lm()
    embeds, mask = prompt(padding="left")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with vp.KeepFixed((0, 5, 9), layer=K).attach(model, visual=VISUAL, padding_side="left") as session:
        by_hand = decode(model, embeds, mask, make_cache("dynamic", model), 3)[0]
        for cache in (None, "static"):
            generated = model.generate(inputs_embeds=embeds, attention_mask=mask, cache_implementation=cache, **options)
            assert torch.equal(generated, by_hand)
            assert session.kept is not None


def test_history_belongs_to_one_episode():
    model = tiny_lm()
    method = vp.VLAPruner(keep=0.25, layer=K, window=2, preset="paper")
    with method.attach(model, visual=VISUAL) as session:
        session.reset()
        first = [(step(model, seed=s), session.kept) for s in range(5)]
        session.reset()
        assert session.kept is None
        assert session.memory is None
        second = [(step(model, seed=s), session.kept) for s in range(5)]
    for (logits, kept), (again, kept_again) in zip(first, second, strict=True):
        assert torch.equal(logits, again)
        assert (kept is None) == (kept_again is None)
    assert [kept is None for _, kept in first] == [True, True, False, False, False]


@pytest.mark.parametrize("pruned", ["drop", "freeze"])
@pytest.mark.parametrize("keep", [0.5, 0.125])
def test_batch_rows_equal_single_runs(keep, pruned):
    model = tiny_lm()
    method = vp.VLAPruner(keep=keep, layer=K, window=2, pruned=pruned, preset="paper")
    embeds = [prompt(3, seed=s)[0] for s in range(4)]

    def episode(session, rows):
        session.reset()
        out = []
        for e in embeds:
            logits = decode(model, e[rows], None, make_cache("dynamic", model), 3)[1]
            out.append((logits, session.kept, session.scores["action"]))
        return out

    with method.attach(model, visual=VISUAL) as session:
        together = episode(session, slice(None))
        for row in range(3):
            for (logits, kept, action), (l1, k1, a1) in zip(
                together, episode(session, slice(row, row + 1)), strict=True
            ):
                assert (l1[0] - logits[row]).abs().max() < 1e-4
                assert (a1[0] - action[row]).abs().max() < 1e-6
                assert (kept is None) == (k1 is None)
                if kept is not None and k1 is not None:
                    assert torch.equal(k1[0], kept[row])


def test_resetting_one_row_leaves_the_others():
    model = tiny_lm()
    method = vp.VLAPruner(keep=0.25, layer=K, window=2, warmup="semantic", preset="paper")
    with method.attach(model, visual=VISUAL) as session:
        for s in range(3):
            step(model, rows=3, seed=s)
        session.reset(rows=[0, 2])
        memory = session.memory
        assert memory is not None
        assert memory.steps.tolist() == [0, 3, 0]
        assert memory.episode.tolist() == [1, 0, 1]
        assert (memory.action[[0, 2]] == 0).all()
        assert (memory.action[1] > 0).any()
        session.reset(rows=[])
        for wrong in ([3], [-1], [True, False], 0):
            with pytest.raises(vp.SessionError, match="rows"):
                session.reset(rows=wrong)  # type: ignore[arg-type]
        step(model, rows=3, seed=9)
        reset_row, kept = session.kept[0], session.kept  # type: ignore[index]
        session.reset()
        step(model, rows=3, seed=9)
        assert torch.equal(session.kept[0], reset_row)  # type: ignore[index]
        assert kept.shape == (3, 6)


def test_memory_can_be_swapped_and_restored(tmp_path):
    model = tiny_lm()
    method = vp.VLAPruner(keep=0.25, layer=K, window=2, preset="paper")
    with method.attach(model, visual=VISUAL) as session:
        for s in range(3):
            step(model, rows=1, seed=s)
        torch.save(session.memory.state_dict(), tmp_path / "memory.pt")
        expected = step(model, rows=1, seed=7)
        session.reset()
        for s in range(20, 24):
            step(model, rows=1, seed=s)
        session.memory = vp.Memory(**torch.load(tmp_path / "memory.pt"))
        assert torch.equal(step(model, rows=1, seed=7), expected)
        for wrong in (session.memory.state_dict(), vp.Memory.empty(1, 5, TOKENS)):
            with pytest.raises(vp.SessionError, match=r"session\.memory was set"):
                session.memory = wrong


def test_another_batch_size_is_refused():
    model = tiny_lm()
    with METHODS[0].attach(model, visual=VISUAL) as session:
        step(model, rows=2)
        with pytest.raises(vp.SessionError, match=r"2 rows .* 3 rows"):
            step(model, rows=3)
        session.reset()
        step(model, rows=3)


def test_reading_in_the_middle_of_a_step_changes_nothing():
    model = tiny_lm()
    method = vp.VLAPruner(keep=0.25, layer=K, window=1, preset="paper")
    embeds = prompt()[0]
    with method.attach(model, visual=VISUAL) as session, torch.no_grad():
        expected = [step(model), session.scores["action"], step(model)]
        session.reset()
        out = model(inputs_embeds=embeds, use_cache=True)
        assert session.memory.steps.tolist() == [1, 1]
        assert "semantic" in session.scores
        for i in range(3):
            token = expected[0][:, i].argmax(-1, keepdim=True)
            out = model(input_ids=token, **{CACHE: cache_of(out)})
        assert torch.equal(session.scores["action"], expected[1])
        assert torch.equal(step(model), expected[2])


REFUSED = [
    ({"layer": 6}, {"visual": VISUAL}, "6 layers"),
    ({"keep": 25}, {"visual": VISUAL}, "24 visual tokens"),
    ({}, {}, "where its visual tokens are"),
    ({}, {"visual": slice(5, 5)}, "larger stop"),
    ({}, {"visual": {"a": slice(1, 9), "b": slice(8, 12)}}, "overlap"),
    ({}, {"visual": {1: slice(1, 9)}}, "names"),
    ({}, {"visual": slice(1, 17.5)}, "whole numbers"),
    ({}, {"visual": slice("1", 17)}, "whole numbers"),
    ({}, {"visual": slice(False, 17)}, "whole numbers"),
    ({}, {"visual": slice(0, 10**9)}, "at most 128 positions"),
    ({}, {"visual": {"a": slice(1, 9), "b": slice(9, 129)}}, "at most 128 positions"),
    ({}, {"visual": VISUAL, "padding_side": "top"}, "right"),
    ({}, {"visual": VISUAL, "cameras": 2}, "cameras"),
]


@pytest.mark.parametrize(("options", "family", "message"), REFUSED)
def test_bad_budgets_and_options_are_refused(options, family, message):
    with pytest.raises(vp.OptionError, match=message):
        vp.VLAPruner(**{"keep": 0.5, **options}, preset="paper").attach(tiny_lm(), **family)


def test_slices_and_rows_may_come_out_of_arrays():
    model = tiny_lm()
    start, stop = np.array([VISUAL.start, VISUAL.stop])
    with METHODS[0].attach(model, visual=slice(start, stop)) as session:
        step(model)
        assert session.kept is not None
        session.reset(rows=list(np.array([1])))
        assert session.memory.steps.tolist() == [1, 0]  # type: ignore[union-attr]


def test_unsupported_models_are_refused(monkeypatch):
    import transformers

    method = vp.VLAPruner(keep=0.5, preset="paper")
    with pytest.raises(vp.UnsupportedModelError, match="Linear"):
        method.attach(torch.nn.Linear(2, 2))
    model = tiny_lm()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(vp.UnsupportedModelError, match=r"flex_attention.*sdpa"):
        method.attach(model, visual=VISUAL)
    with pytest.raises(vp.UnsupportedModelError, match="'gpt_neox'"):
        method.attach(tiny_neox(), visual=VISUAL)
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    with pytest.raises(vp.UnsupportedModelError, match=r"4\.57\.6.*5\.4"):
        method.attach(tiny_lm(), visual=VISUAL)


def tiny_neox():
    model = tiny_lm()
    model.model.config.model_type = "gpt_neox"
    return model


def test_wrong_calls_are_refused():
    model = tiny_lm()
    embeds, mask = prompt(padding="left")
    with METHODS[0].attach(model, visual=VISUAL) as session, torch.no_grad():
        with pytest.raises(vp.SessionError, match="too few"):
            model(input_ids=torch.ones(2, 3, dtype=torch.int64))
        with pytest.raises(vp.SessionError, match="Position 0 is masked"):
            model(inputs_embeds=embeds, attention_mask=mask)
        with pytest.raises(vp.SessionError, match="before the first control step"):
            session.reset(rows=[0])
        cache = make_cache("dynamic", model)
        model(inputs_embeds=embeds, **{CACHE: cache})
        with pytest.raises(vp.SessionError, match="holds 31 positions"):
            model(inputs_embeds=embeds, **{CACHE: cache})
    windowed = tiny_lm("mistral", sliding_window=16)
    with METHODS[0].attach(windowed, visual=VISUAL), pytest.raises(vp.UnsupportedModelError, match="window is 16"):
        windowed(inputs_embeds=embeds)


def test_import_patches_nothing_and_pulls_in_nothing_heavy():
    code = "import sys, vla_pruner; print(sorted({'transformers', 'mujoco', 'metaworld'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
