"""Figures worked out by hand: costs, roofline, intervals and the sentences made of them."""

from __future__ import annotations

from math import comb
from types import SimpleNamespace
from typing import Any

import pytest

from vla_pruner.benching import roofline
from vla_pruner.benching.report import FlopCount
from vla_pruner.benching.roofline import Peaks, Work
from vla_pruner.benching.run import _speed
from vla_pruner.benching.verdict import Timed, why
from vla_pruner.cost import ControlStep, DecoderShape, Expert, StepShape, Tower, decoder_flops
from vla_pruner.statistics import median_interval

SHAPE = DecoderShape(layers=3, hidden=32, heads=4, kv_heads=2, head_dim=8, feed_forward=48, vocabulary=40)
STEP = ControlStep(SHAPE, visual=16, other=5, decoded=3)


@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_a_control_step_costs_what_its_decoder_costs(pruned: Any) -> None:
    for kept, layer in ((None, 0), (4, 1), (16, 2), (1, 3)):
        parts = STEP.flops(kept, layer, pruned)
        assert parts.pop("vision") == 0
        assert sum(parts.values()) == decoder_flops(SHAPE, StepShape(16, 5, 4), kept, layer, pruned).total


def test_vision_and_expert_by_hand() -> None:
    one = DecoderShape(layers=1, hidden=4, heads=1, kv_heads=1, head_dim=4, feed_forward=8, matrices=2)
    token = 2 * (4 * 4 * 4 + 2 * 4 * 8)
    step = ControlStep(
        one, 2, 1, towers=(Tower(one, 6, 1, patching=7.0),), cameras=2, projector=5.0, expert=Expert(one, 3, 10)
    )
    parts = step.flops()
    assert parts["vision"] == 2 * (6 * token + 4 * 6 * 6 * 4 + 7) + 2 * 5
    assert parts["decoding or denoising"] == 10 * (3 * token + 4 * 3 * (3 + 3) * 4)
    crossing = ControlStep(one, 2, 1, expert=Expert(one, 3, 10, cross=frozenset({0})))
    keys_and_values = 2 * 2 * 4 * 4
    expected = 10 * (3 * (token - keys_and_values) + 3 * keys_and_values + 4 * 3 * 3 * 4)
    assert crossing.flops()["decoding or denoising"] == expected


def test_a_prompt_that_runs_in_every_denoising_step() -> None:
    once, four = (ControlStep(SHAPE, 16, 5, prompt_passes=passes).flops(4, 1) for passes in (1, 4))
    assert four["prompt, layers pruned"] == 4 * once["prompt, layers pruned"]


def test_cache_by_hand() -> None:
    """A token has 2 * 2 * 8 = 32 numbers a layer; 21 tokens in the layer before, 9 in the two after."""
    assert STEP.cache_elements(4, 1) == {"written": 32 * 39, "read": 32 * (3 * 39 + 3 * (0 + 1 + 2))}
    assert STEP.cache_elements(4, 1, "freeze") == STEP.cache_elements()


def test_roofline_takes_the_longer_of_computing_and_reading() -> None:
    work = Work({"prefill": 2e9, "decode": 1e6}, {"prefill": 1e6, "decode": 5e8})
    peaks = Peaks(flops=1e12, bandwidth=1e11)
    assert work.milliseconds(peaks) == {"prefill": pytest.approx(2.0), "decode": pytest.approx(5.0)}
    assert not work.bound_by_reading("prefill", peaks)
    assert work.bound_by_reading("decode", peaks)


def test_known_gpus_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, bandwidth in (("NVIDIA H100 80GB HBM3", 3.35e12), ("NVIDIA H100 PCIe", 2.0e12), ("NVIDIA H200", 4.8e12)):
        assert roofline.data_sheet(name) == (pytest.approx(9e14, rel=0.2), bandwidth)
    assert roofline.data_sheet("Some other GPU") is None


def test_counted_and_formula_are_compared() -> None:
    counted = {"vision": 10.0, "prefill": 101.5, "pruning": 4.0, "decode": 0.0, "other": 0.0}
    found = FlopCount(counted, {"vision": 10.0, "prefill": 100.0, "pruning": 0.0, "decode": 0.0})
    assert found.difference == {"decoder": pytest.approx(0.015), "step": pytest.approx(5.5 / 110)}
    assert not found.agree
    assert FlopCount({**counted, "prefill": 100.5}, found.formula).agree


def test_speed_is_the_median_of_pairs() -> None:
    """A machine that is slow for one round is slow for both arms."""
    speed = _speed([10.0, 20.0, 90.0, 10.0, 20.0, 30.0, 10.0], [5.0, 10.0, 45.0, 5.0, 10.0, 15.0, 10.0])
    assert (speed.value, speed.low, speed.high, speed.rounds) == (2.0, 1.0, 2.0, 7)
    assert _speed([1.0], [2.0]).low is None


@pytest.mark.parametrize("n", [6, 9, 20, 51])
def test_the_interval_of_a_median_misses_in_at_most_five_percent(n: int) -> None:
    interval = median_interval(list(range(n, 0, -1)))
    assert interval is not None
    low, high = interval
    assert low + high == n + 1
    missed = 2 * sum(comb(n, i) for i in range(int(low))) / 2**n
    wider = 2 * sum(comb(n, i) for i in range(int(low) + 1)) / 2**n
    assert missed <= 0.05 < wider


def test_too_few_values_have_no_interval() -> None:
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None


PEAKS = Peaks(1e12, 1e11)
NOTHING = {"vision": 0.0, "pruning": 0.0, "decode": 0.0, "other": 0.0}


def timed(total: float, flops: float, moved: dict[str, float] | None = None, **stages: float) -> Timed:
    work = Work({"vision": 0.0, "prefill": flops, "pruning": 0.0, "decode": 1e6}, moved or {})
    return Timed(total, {**NOTHING, **stages}, work)


def test_a_saved_token_that_is_a_saved_millisecond() -> None:
    found = why(timed(10, 8e9, prefill=9), timed(5.5, 4e9, prefill=4.5), PEAKS, "", 0)
    assert "fall to 50 %, which would save 4.50 ms of 10.00; 4.50 ms are saved." in found
    assert found.endswith("Here a saved token is a saved millisecond.")


@pytest.mark.parametrize(
    ("base", "arm", "reason"),
    [
        (timed(10, 8e9, prefill=9), timed(12, 4e9, prefill=4.5, pruning=7), "cost 7.00 ms, more than"),
        (timed(10, 8e9, prefill=9), timed(7, 4e9, prefill=4.5, pruning=2), "cost 2.00 ms of that"),
        (timed(10, 8e9, prefill=9), timed(7, 4e9, prefill=6), "takes 6.00 ms where its FLOPs say 4.50"),
        (timed(10, 8e9, prefill=9), timed(7, 1e9, {"prefill": 1e9}, prefill=6), "reading the weights bounds it"),
        (
            timed(100, 8e9, {"decode": 79e9}, prefill=9, decode=90),
            timed(97, 4e9, prefill=4.5, decode=90),
            "Decoding takes 90.00 ms, and hardly less where tokens are gone, bound by memory: its 6 passes read 79.00",
        ),
        (timed(100, 8e9, prefill=9, vision=80), timed(97, 4e9, prefill=4.5), "vision encoder takes 80.00 ms"),
        (timed(100, 8e9, prefill=9, other=80), timed(97, 4e9, prefill=4.5), "80.00 ms are spent outside"),
    ],
)
def test_what_holds_it_up_is_named(base: Timed, arm: Timed, reason: str) -> None:
    found = why(base, arm, PEAKS, "decode", 6)
    assert reason in found
    assert "Here a saved token" not in found


def test_what_a_graph_hides_is_not_blamed_apart() -> None:
    """In a compiled arm, "pruning" is the work around the graphs, and freezing is part of its prompt."""
    slow = why(timed(10, 8e9, prefill=9), timed(7, 4e9, prefill=6, pruning=2), PEAKS, "", 0, compiled=True)
    assert "outside of the graphs, cost 2.00 ms of that" in slow
    assert "takes 6.00 ms where its FLOPs say 4.50: choosing and gathering are part of its graph" in slow
    assert "Choosing" not in slow
    assert "launching" not in slow
    arm = timed(7, 4e9, prefill=6)
    arm.work.flops["pruning"] = 1e9
    assert "FLOPs say 4.50: smaller" in why(timed(10, 8e9, prefill=9), arm, PEAKS, "", 0)
    assert "where its FLOPs say" not in why(timed(10, 8e9, prefill=9), arm, PEAKS, "", 0, compiled=True)


def test_overhead_is_not_called_bandwidth() -> None:
    """Ten passes that could be done in a millisecond."""
    base = timed(100, 8e9, {"decode": 1e8}, prefill=9, decode=90)
    found = why(base, timed(97, 4e9, prefill=4.5), PEAKS, "denoise", 10)
    assert "Denoising takes 90.00 ms, and hardly less where tokens are gone: computing and reading take 1.00" in found
    assert "bound by memory" not in found


def test_a_slower_step_is_called_slower() -> None:
    found = why(timed(10, 8e9, prefill=9), timed(12, 4e9, prefill=4.5, pruning=7), PEAKS, "", 0)
    assert "the step takes 2.00 ms more." in found


def test_a_busy_machine_and_wrong_formulas_are_warned_of() -> None:
    from vla_pruner.benching.run import _warnings

    good, wrong = FlopCount({"prefill": 1.0, "decode": 0.0}, {"prefill": 1.0, "decode": 0.0}), None
    wrong = FlopCount({"prefill": 1.1, "decode": 0.0}, good.formula)
    arms: Any = (
        SimpleNamespace(name="one", flops=good, kind="vla-pruner", pruned="freeze"),
        SimpleNamespace(name="two", flops=wrong, kind="fastv", pruned="drop"),
    )
    found = list(_warnings({"busy_cores_before": 1.5, "busy_cores_after": None}, arms, rounds=2))
    assert len(found) == 4
    assert "other programs used 1.5 cores before" in found[0]
    assert "too few for an interval" in found[1]
    assert "(vla-pruner freeze, fastv drop)" in found[2]
    assert "two: +10.0 %" in found[3]
    assert list(_warnings({"busy_cores_before": 0.1, "busy_cores_after": 0.0}, arms[:1], rounds=6)) == []


def test_published_vision_towers_are_those_of_the_table() -> None:
    """README's table of FLOPs and the benchmark have the same encoders."""
    from benchmarks.family_flops import FAMILIES
    from vla_pruner.benching.subject import _tower
    from vla_pruner.models.openvla.configuration import DINO, PUBLISHED_TOWERS, SIGLIP

    for tower, name in zip(FAMILIES["OpenVLA"].step.towers, (DINO, SIGLIP), strict=True):
        found = _tower(SimpleNamespace(size=PUBLISHED_TOWERS[name]))
        assert found is not None
        assert (found.tokens, found.layers) == (tower.tokens, tower.layers)
        assert found.shape.layer(7, 9) == tower.shape.layer(7, 9)
        assert found.patching == 2 * 3 * 14 * 14 * tower.shape.hidden * 256


def test_prompt_and_decoding_in_one_graph_are_judged_together() -> None:
    base, arm = timed(10, 8e9, prefill=9), timed(8, 4e9, prefill=7)
    for one in (base, arm):
        one.work.flops["decode"] = 2e9
    found = why(base, arm, PEAKS, "decode", 3, compiled=True, one_graph=True)
    assert "The FLOPs of prompt and decoding fall to 60 %, which would save 3.60 ms of 10.00; 2.00 ms" in found
    assert "Prompt and decoding, one graph, take 7.00 ms where their FLOPs say 5.40" in found
    assert "The pruned prompt" not in found
