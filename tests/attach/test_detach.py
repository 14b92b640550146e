"""Detaching: after any failure on the way, and also if nothing holds the session any more."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch

import vla_pruner as vp
from tests.attach.tiny import CACHE, VISUAL, K, decode, make_cache, prompt, tiny_lm
from tests.families import cases
from tests.families.matrix import BOTH
from tests.state import whole_state
from vla_pruner.attach.control_step import ControlStep
from vla_pruner.timing import StageTimer

METHOD = vp.VLAPruner(keep=0.25, layer=K, warmup="semantic", preset="paper")


def step(model, seed=1):
    return decode(model, prompt(2, seed=seed)[0], None, make_cache("dynamic", model), 3)[1]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_all_is_taken_away_whatever_fails_and_the_first_error_is_raised(monkeypatch, compiled):
    policy = vp.reference_policy("autoregressive")
    case = cases.reference()
    untouched, before = case.step(policy, 0, BOTH), whole_state(policy)
    session = METHOD.attach(policy)
    if compiled:
        session.compile("eager")
    else:
        case.step(policy, 0, BOTH)

    def fail(message):
        def raises(*_):
            raise RuntimeError(message)

        return raises

    taken_away = session.family.remove

    def last():
        taken_away()
        raise RuntimeError("the family")

    monkeypatch.setattr(session.family, "remove", last)
    monkeypatch.setattr(ControlStep, "settle", fail("what was put off"))
    with pytest.raises(RuntimeError, match="the family"):
        session.detach()
    assert not session.attached
    session.detach()
    assert whole_state(policy) == before
    assert torch.equal(case.step(policy, 0, BOTH), untouched)


def test_an_error_while_settling_comes_after_the_removal(monkeypatch):
    model = tiny_lm()
    before = whole_state(model)
    session = METHOD.attach(model, visual=VISUAL)
    step(model)
    monkeypatch.setattr(ControlStep, "settle", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.detach()
    assert whole_state(model) == before
    session.detach()


def test_speculative_decoding_is_refused_before_it_begins():
    model = tiny_lm()
    ids = torch.randint(1, 60, (1, 31), generator=torch.Generator().manual_seed(0))
    ids[0, 25:] = torch.tensor([5, 6, 7, 5, 6, 7])
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    untouched, before = model.generate(ids, **options), whole_state(model)
    in_config = copy.deepcopy(model.generation_config)
    in_config.prompt_lookup_num_tokens = 3
    with METHOD.attach(model, visual=VISUAL):
        for asked in (
            {"prompt_lookup_num_tokens": 3},
            {"assistant_model": tiny_lm(seed=1)},
            {"generation_config": in_config},
        ):
            with pytest.raises(vp.SessionError, match="speculative"):
                model.generate(ids, **options, **asked)
    assert whole_state(model) == before
    assert torch.equal(model.generate(ids, **options), untouched)


def test_a_cache_that_is_cropped_or_reset_within_a_step_is_refused():
    model = tiny_lm()
    before = whole_state(model)
    token = torch.ones(2, 1, dtype=torch.int64)
    for change in (lambda cache: cache.crop(-2), lambda cache: cache.reset()):
        with METHOD.attach(model, visual=VISUAL), torch.no_grad():
            cache = make_cache("dynamic", model)
            model(inputs_embeds=prompt()[0], **{CACHE: cache})
            model(input_ids=token, **{CACHE: cache})
            held = cache.get_seq_length()
            change(cache)
            if cache.get_seq_length() == held:
                continue  # early versions of transformers fill a growing cache with zeros and keep its length
            with pytest.raises(vp.SessionError, match="reset or cropped"):
                model(input_ids=token, **{CACHE: cache})
        assert whole_state(model) == before


def test_an_older_session_does_not_end_a_newer_one():
    model = tiny_lm()
    before = whole_state(model)
    first = METHOD.attach(model, visual=VISUAL)
    first.detach()
    second = METHOD.attach(model, visual=VISUAL)
    first.detach()
    with pytest.raises(vp.SessionError, match="attach the method anew"), first:
        pass
    assert second.attached
    second.detach()
    assert whole_state(model) == before


def test_a_session_that_nobody_holds_is_found_and_detached():
    model = tiny_lm()
    before = whole_state(model)
    for given in (model, model.model, torch.nn.ModuleList([model])):
        METHOD.attach(model, visual=VISUAL)
        gc.collect()
        with pytest.raises(vp.SessionError, match=r"vla_pruner\.detach\(model\)"):
            METHOD.attach(model, visual=VISUAL)
        assert vp.detach(given)
        assert not vp.detach(given)
        assert whole_state(model) == before
    with pytest.raises(vp.UnsupportedModelError, match="detach was given a str"):
        vp.detach("policy")


@pytest.mark.parametrize("name", ["decoder", "llava", "paligemma", "qwen3-vl"])
def test_a_session_is_found_on_a_model_that_has_no_call_of_a_whole_step(name):
    if name == "decoder":
        model, options = tiny_lm().model, {"visual": VISUAL}
    else:
        model, options = vp.random_policy(name).module.model, {}
    before = whole_state(model)
    vp.FastV(keep=0.5).attach(model, **options)
    gc.collect()
    with pytest.raises(vp.SessionError, match=r"vla_pruner\.detach\(model\)"):
        vp.FastV(keep=0.5).attach(model, **options)
    assert vp.detach(model)
    assert whole_state(model) == before


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_compiled_a_policy_is_found_too():
    policy = vp.reference_policy("autoregressive")
    before = whole_state(policy)
    vp.compiled(policy, "eager")
    gc.collect()
    with pytest.raises(vp.UnsupportedModelError, match=r"vla_pruner\.detach\(model\)"):
        METHOD.attach(policy)
    assert vp.detach(policy)
    assert whole_state(policy) == before


@pytest.mark.parametrize("name", ["reference", "openvla", "openvla-oft"])
def test_a_policy_under_a_stage_timer_cannot_be_copied(name):
    policy = vp.random_policy(name)
    watched = None
    if name != "reference":
        from vla_pruner.families import family_of
        from vla_pruner.timing import watched_of

        watched = watched_of(family_of(policy))
    with StageTimer(policy, watched):
        for copier in (copy.deepcopy, pickle.dumps):
            with pytest.raises(vp.SessionError, match="stage timer"):
                copier(policy)
    copy.deepcopy(policy)


@pytest.mark.parametrize("first", ["timer", "session"])
def test_timers_and_sessions_go_in_any_order(first):
    policy = vp.reference_policy("autoregressive")
    case = cases.reference()
    untouched, before = case.step(policy, 0, BOTH), whole_state(policy)
    if first == "timer":
        timer = StageTimer(policy, [(policy, "predict_action", lambda *_: "prefill")]).__enter__()
        session = METHOD.attach(policy)
        timer.__exit__(None, None, None)
        case.step(policy, 0, BOTH)
        session.detach()
    else:
        session = METHOD.attach(policy)
        timer = StageTimer(policy, [(policy, "predict_action", lambda *_: "prefill")]).__enter__()
        session.detach()
        with timer.step():
            assert torch.equal(case.step(policy, 0, BOTH), untouched)
        assert timer.steps[0].prefill > 0
        timer.__exit__(None, None, None)
    assert whole_state(policy) == before
    assert torch.equal(case.step(policy, 0, BOTH), untouched)


def test_what_a_user_put_on_top_while_attached_works_on_after_detaching():
    policy = vp.reference_policy("autoregressive")
    case = cases.reference()
    untouched = case.step(policy, 0, BOTH)
    calls = []
    with METHOD.attach(policy):
        within = policy.predict_action
        policy.predict_action = lambda *args, **kwargs: (calls.append(1), within(*args, **kwargs))[1]
        case.step(policy, 0, BOTH)
    assert torch.equal(case.step(policy, 0, BOTH), untouched)
    assert len(calls) == 2


def test_a_session_says_in_one_line_what_it_is_and_did():
    model = tiny_lm()
    session = METHOD.attach(model, visual=VISUAL)
    assert repr(session) == (
        "<Session of VLAPruner(pruned='drop', keep=0.25, preset='paper', warmup='semantic', semantic_queries='all') "
        "on DecoderLM: before the first control step>"
    )
    step(model)
    step(model)
    assert "on DecoderLM: control step 2, 6 of 24 visual tokens kept>" in repr(session)
    session.reset(rows=[1])
    step(model)
    assert "control steps 1 to 3" in repr(session)
    session.detach()
    assert repr(session).endswith("kept, detached>")
    with vp.Unpruned().attach(model, visual=VISUAL) as session:
        step(model)
        assert "all 24 visual tokens kept" in repr(session)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (vp.VLAPruner(), "VLAPruner(keep=0.25)"),
        (vp.VLAPruner(pruned="drop"), "VLAPruner(pruned='drop', keep=0.25)"),
        # What a preset brings and what was given in its place are told apart: this one freezes, as the default does.
        (
            vp.VLAPruner(preset="paper", pruned="freeze"),
            "VLAPruner(pruned='freeze', keep=0.25, preset='paper', semantic_queries='all')",
        ),
        (
            vp.VLAPruner(preset="paper", semantic_queries="last"),
            "VLAPruner(pruned='drop', keep=0.25, preset='paper', semantic_queries='last')",
        ),
    ],
)
def test_what_a_session_says_of_a_method_makes_the_same_method(method: vp.VLAPruner, told: str) -> None:
    with method.attach(tiny_lm(), visual=VISUAL) as session:
        assert repr(session).startswith(f"<Session of {told} on")
        assert eval(told, {"VLAPruner": vp.VLAPruner}) == method
