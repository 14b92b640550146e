"""Arms take turns, the right calls count, and nothing stays on the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vla_pruner as vp
from tests.bench.conftest import LLAMA, subject_of
from tests.state import whole_state
from vla_pruner.benching import measure, run
from vla_pruner.benching.arms import BASELINE, Turns, arms_of, turn
from vla_pruner.benching.measure import STEPS_A_TURN, WARM_UP_ROUNDS, count_stages, time_stages, time_steps
from vla_pruner.benching.roofline import least_work
from vla_pruner.benching.settings import BenchSettings
from vla_pruner.benching.table import notes
from vla_pruner.errors import OptionError, SessionError
from vla_pruner.method_names import known_methods


def turns_of(subject: Any) -> Turns:
    return Turns(subject, arms_of(subject.settings))


def test_counted_flops_are_those_of_the_formula(subject: Any) -> None:
    turns = turns_of(subject)
    for arm in turns.arms:
        counted = count_stages(turns, arm)
        formula = least_work(subject, turns.kept[arm.name], arm.layer, arm.pruned).flops
        for stage in ("prefill", "decode"):
            assert counted[stage] == pytest.approx(formula[stage], rel=0.01), (arm.name, stage)
        assert counted["pruning"] >= formula["pruning"]
        assert (counted["pruning"] > 0) == (arm.method is not None)
        if subject.anatomy.towers and subject.vision_by_formula:
            assert counted["vision"] == pytest.approx(formula["vision"], rel=0.01)


@pytest.mark.parametrize("model", ["paligemma", "qwen2.5-vl", "qwen3-vl"])
def test_counted_flops_of_a_vision_language_model(model: str) -> None:
    """Qwen's encoder has windows, or mergers for DeepStack, and no formula covers it."""
    subject = subject_of(BenchSettings(model, size="tiny", cameras=1, decode_tokens=2))
    assert subject.vision_by_formula == (model == "paligemma")
    turns = turns_of(subject)
    for arm in turns.arms:
        formula = least_work(subject, turns.kept[arm.name], arm.layer, arm.pruned).flops
        counted = count_stages(turns, arm)
        for stage in ("prefill", "decode"):
            assert counted[stage] == pytest.approx(formula[stage], rel=0.01), (arm.name, stage)
        assert counted["vision"] > 0


@pytest.mark.parametrize("model", ["pi0", "reference-chunk"])
def test_an_encoder_that_reuses_patches_computes_what_the_formula_says(model: str) -> None:
    settings = BenchSettings(model, size="tiny", batch=2, keep=(1.0, 0.25), encoder_keep=(1.0, 0.25))
    subject = subject_of(settings)
    before = whole_state(subject.module)
    turns = turns_of(subject)
    reuse = vp.EncoderReuse(keep=0.25, refresh_every=None)
    assert [arm.encoder for arm in turns.arms] == [None, reuse, None, reuse], "keep=1.0 alone is the unpruned policy"
    vision = []
    for arm in turns.arms:
        counted = count_stages(turns, arm)
        formula = least_work(subject, turns.kept[arm.name], arm.layer, arm.pruned, encoder=arm.encoder).flops
        for stage in ("prefill", "decode", *(("vision",) if subject.vision_by_formula else ())):
            assert counted[stage] == pytest.approx(formula[stage], rel=0.01), (arm.name, stage)
        vision.append(counted["vision"])
    assert vision[0] == vision[2]
    assert vision[1] == vision[3] < vision[0]
    for arm in turns.arms[1:]:
        with turns.open(arm) as session:
            turns.ready(arm, session)
            subject.step()
            turns.check(arm, session)
            assert None not in session.encoded
            if arm.encoder is not None:
                session.reset()
                subject.step()
                with pytest.raises(SessionError, match=r"visual tokens, not|encoded all patches"):
                    turns.check(arm, session)
    assert whole_state(subject.module) == before


def test_a_report_of_an_encoder_that_reuses_patches(quick: None) -> None:
    report = run.bench("reference-chunk", size="tiny", keep=1.0, encoder_keep=(0.25,), iters=2)
    base, arm = report.arms
    assert (base.encoder, arm.encoder) == (None, "EncoderReuse(keep=0.25, refresh_every=None, attended=0.5)")
    assert arm.name == "vla-pruner 1.0 freeze K=3 semantic_queries=last encoder=0.25"
    assert arm.flops.counted["vision"] < base.flops.counted["vision"]
    assert arm.ceiling is not None
    assert arm.ceiling > 1
    assert "The vision encoder takes" in arm.why
    assert any("every step that is timed reuses patches" in note for note in notes(report))


def test_every_arm_keeps_what_it_says(subject: Any) -> None:
    turns = turns_of(subject)
    visual = subject.feed.visual
    assert turns.kept == {arm.name: None if arm.method is None else visual // 4 for arm in turns.arms}


def test_arms_take_turns_and_the_first_rounds_do_not_count(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[str] = []
    turns = turns_of(llama)
    known_open = turns.open

    def noted(arm: Any) -> Any:
        running.append(arm.name)
        return known_open(arm)

    monkeypatch.setattr(turns, "open", noted)
    clock = iter(range(1000))
    monkeypatch.setattr(measure, "step_milliseconds", lambda step, device: (step(), float(next(clock)))[1])
    timings = time_steps(turns, rounds=4)

    names = [arm.name for arm in turns.arms]
    assert names[0] == BASELINE
    assert len(names) == 3
    rounds = [running[start : start + 3] for start in range(0, len(running), 3)]
    assert len(rounds) == WARM_UP_ROUNDS + 4
    assert timings.order == rounds[WARM_UP_ROUNDS:]
    assert all(sorted(order) == sorted(names) for order in rounds)
    assert {order[0] for order in timings.order} == set(names)
    discarded = WARM_UP_ROUNDS * len(names) * STEPS_A_TURN
    samples = sorted(value for values in timings.steps.values() for value in values)
    assert samples == [float(value) for value in range(discarded, discarded + 4 * len(names) * STEPS_A_TURN)]
    assert {len(values) for values in timings.rounds.values()} == {4}


def test_a_turn_begins_with_another_arm_each_round() -> None:
    arms = arms_of(BenchSettings(LLAMA, keep=(0.5, 0.25)))
    assert [turn(arms, number)[0].name for number in range(4)] == [
        BASELINE,
        "vla-pruner 0.5 freeze K=3 semantic_queries=last",
        "vla-pruner 0.25 freeze K=3 semantic_queries=last",
        BASELINE,
    ]


def test_the_unpruned_arm_is_the_untouched_model_and_nothing_stays(subject: Any) -> None:
    subject.step()  # transformers puts hooks of its own into some vision towers in their first pass
    before = whole_state(subject.module)
    turns = turns_of(subject)
    for arm in turns.arms:
        with turns.open(arm) as session:
            if arm.method is None:
                assert session is None
                assert whole_state(subject.module) == before
            else:
                assert whole_state(subject.module) != before
    assert whole_state(subject.module) == before
    count_stages(turns, turns.arms[-1])
    time_stages(turns, 1)
    assert whole_state(subject.module) == before


def test_every_measured_step_is_pruned_from_the_first_on(llama: Any) -> None:
    """VLAPruner leaves the first steps of an episode unpruned; its memory comes back with each turn."""
    turns = turns_of(llama)
    arm = turns.arms[1]
    for _ in range(2):
        with turns.open(arm) as session:
            for _ in range(2):
                llama.step()
                assert session.kept.shape == (1, 64)


@pytest.mark.parametrize("every", [2, 3, 8])
def test_only_pruned_steps_count_where_some_are_not(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = turns_of(subject_of(BenchSettings(LLAMA, refresh_every=every, decode_tokens=2)))
    arm = turns.arms[1]
    assert arm.refresh_every == every
    clock = iter(range(1000))
    monkeypatch.setattr(measure, "step_milliseconds", lambda step, device: (step(), float(next(clock)))[1])
    timings = time_steps(turns, rounds=2)  # it checks every step itself
    assert len(timings.steps[arm.name]) == 2 * STEPS_A_TURN
    assert len(timings.fresh[arm.name]) == 2
    assert BASELINE not in timings.fresh
    assert count_stages(turns, arm)["prefill"] < count_stages(turns, turns.arms[0])["prefill"]
    assert time_stages(turns, 1)[arm.name]["pruning"] > 0


def test_layer_0_shortens_every_layer_and_sees_again() -> None:
    turns = turns_of(subject_of(BenchSettings(LLAMA, layer=(0,), methods=("vla-pruner", "divprune"), decode_tokens=2)))
    assert [arm.refresh_every for arm in turns.arms] == [None, 8, None]
    for arm in turns.arms:
        formula = least_work(turns.subject, turns.kept[arm.name], arm.layer, arm.pruned).flops
        assert count_stages(turns, arm)["prefill"] == pytest.approx(formula["prefill"], rel=0.01)


def test_a_step_that_is_not_as_its_arm_says_stops_the_benchmark(llama: Any) -> None:
    turns = turns_of(llama)
    turns.kept[turns.arms[1].name] = 63
    with pytest.raises(SessionError, match="kept 64 visual tokens, not 63"):
        time_steps(turns, rounds=1)


def test_an_arm_that_prunes_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match="pruned none of the first"):
        turns_of(subject_of(BenchSettings(LLAMA, keep=(1.0,))))


def test_every_method_is_an_arm() -> None:
    methods = tuple(name for name in known_methods() if name != "vla-cache")  # a Llama has no images
    turns = turns_of(subject_of(BenchSettings(LLAMA, methods=methods, layer=(2,), decode_tokens=2)))
    assert [arm.kind for arm in turns.arms] == [BASELINE, *methods]
    assert set(turns.kept.values()) == {None, 64}


def test_vla_cache_reuses_and_its_flops_are_the_formulas() -> None:
    subject = subject_of(BenchSettings("reference", size="tiny", methods=("vla-cache", "vla-cache:relevance=0.9")))
    turns = turns_of(subject)
    assert [arm.name for arm in turns.arms[1:]] == [
        "vla-cache 0.61 reuse K=3",
        "vla-cache 0.61 reuse K=3 relevance=0.9",
    ]
    assert turns.kept[turns.arms[1].name] == round(0.61 * subject.feed.visual)
    timings = time_steps(turns, rounds=1)  # stops if a step is not pruned
    assert len(timings.steps[turns.arms[1].name]) == STEPS_A_TURN
    for arm in turns.arms:
        counted = count_stages(turns, arm)
        formula = least_work(subject, turns.kept[arm.name], arm.layer, arm.pruned).flops
        for stage in ("prefill", "decode"):
            assert counted[stage] == pytest.approx(formula[stage], rel=0.01), (arm.name, stage)


def test_stages_add_up(subject: Any) -> None:
    turns = turns_of(subject)
    stages = time_stages(turns, 1)
    for arm in turns.arms:
        found = stages[arm.name]
        assert found["prefill"] > 0
        assert (found["pruning"] > 0) == (arm.method is not None)
        assert (found["decode"] > 0) == bool(subject.acting)
        assert (found["vision"] > 0) == bool(subject.anatomy.towers)


def test_the_decoded_tokens_of_the_plain_llama_are_its_own(llama: Any) -> None:
    """Against a loop without a cache."""
    model = llama.policy
    tokens = llama.step()
    assert tokens.shape == (1, 3)
    captured: dict[str, Any] = {}

    def note(_: Any, args: Any, kwargs: Any) -> None:
        captured.setdefault("prompt", kwargs["inputs_embeds"])

    handle = model.model.register_forward_pre_hook(note, with_kwargs=True)
    llama.step()
    handle.remove()
    sequence = captured["prompt"]
    with torch.inference_mode():
        for position in range(3):
            chosen = model(inputs_embeds=sequence).logits[:, -1].argmax(-1)
            assert chosen == tokens[0, position]
            sequence = torch.cat([sequence, model.get_input_embeddings()(chosen)[:, None]], dim=1)


def test_weights_are_read_once_a_pass(llama: Any) -> None:
    moved = llama.weight_bytes()
    layers = 4 * sum(parameter.numel() for parameter in llama.policy.model.layers.parameters())
    assert moved == {"vision": 0, "prefill": layers + 4 * 32 * 100, "decode": 2 * (layers + 4 * 32 * 100)}


def test_bench_is_part_of_the_library(quick: None) -> None:
    report = vp.bench(LLAMA, iters=2, layers=4)
    assert report.shape["layers"] == 4
    assert [arm.kind for arm in report.arms] == [BASELINE, "vla-pruner"]
    assert report.arms[1].refresh is None


def test_what_is_saved_is_what_the_speed_says(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds although the medians say the opposite: 20 ms unpruned, 19 ms pruned."""

    def timed(turns: Turns, *_: Any) -> measure.Timings:
        base, arm = (one.name for one in turns.arms)
        rounds = {base: [10.0, 20.0, 30.0], arm: [11.0, 19.0, 31.0]}
        return measure.Timings(steps=rounds, rounds=rounds, order=[[base, arm]] * 3)

    monkeypatch.setattr(run, "time_steps", timed)
    arm = vp.bench(LLAMA, iters=3).arms[1]
    assert arm.milliseconds["p50"] == 19.0
    assert arm.speed is not None
    assert arm.speed.value == pytest.approx(30 / 31)
    assert f"the step takes {20 * 31 / 30 - 20:.2f} ms more." in arm.why


def test_a_cycle_is_amortised(quick: None) -> None:
    from vla_pruner.benching.table import notes, rows, to_markdown

    report = vp.bench(LLAMA, iters=2, decode_tokens=2, refresh_every=4, methods=("vla-pruner", "fastv"))
    base, arm, other = report.arms
    assert base.refresh is None
    assert other.refresh is None
    assert arm.refresh is not None
    pruned, fresh = arm.milliseconds["mean"], arm.refresh.milliseconds
    assert arm.refresh.amortised == pytest.approx((3 * pruned + fresh) / 4)
    assert arm.refresh.speed == pytest.approx(base.milliseconds["mean"] / arm.refresh.amortised)
    assert dict(rows(report))["ms over a cycle"] == ["-", f"{arm.refresh.amortised:.2f}", "-"]
    assert "over a cycle" in to_markdown(report)
    assert any("every 4th step unpruned" in note for note in notes(report))


@pytest.mark.parametrize("name", ["openvla_tiny", "openvla_oft_tiny", "transformers_pi0_tiny"])
def test_a_checkpoint_is_benchmarked_as_it_is(golden: Any, name: str) -> None:
    subject = subject_of(BenchSettings(str(golden / name)))
    turns = turns_of(subject)
    arm = turns.arms[1]
    assert turns.kept[arm.name] == round(subject.feed.visual / 4)
    formula = least_work(subject, turns.kept[arm.name], 3, "freeze").flops
    assert count_stages(turns, arm)["prefill"] == pytest.approx(formula["prefill"], rel=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_timed_by_its_own_clock() -> None:
    report = vp.bench("llama:256,6", device="cuda", dtype="bfloat16", iters=2)
    assert report.conditions["device_name"] == torch.cuda.get_device_name()
    assert report.conditions["driver"]
    for arm in report.arms:
        assert arm.milliseconds["p50"] > 0
        assert arm.memory["kind"] == "peak allocated by torch"
        assert arm.flops.agree
