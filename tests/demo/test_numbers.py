"""FLOPs against the formulas, and the table and the verdict of made-up episodes."""

from __future__ import annotations

import dataclasses
import io
import re
from typing import Any

import pytest
from rich.console import Console

from tests.demo.conftest import FakeEnvironments, PairEnvironment
from vla_pruner.cost import Flops
from vla_pruner.demo.arms import Arm, default_arms
from vla_pruner.demo.compiled import Compiling
from vla_pruner.demo.episodes import Episode, Unit
from vla_pruner.demo.probe import ArmCost, arm_cost, decoder_shapes, timer_overhead, vision_flops
from vla_pruner.demo.summary import Summary, summarize
from vla_pruner.demo.table import floor_share, footnotes, heading, rows, to_markdown, to_rich
from vla_pruner.demo.verdict import headline, verdict
from vla_pruner.timing import StepTime


def _episode(arm: str, seed: int, success: bool, milliseconds: float, pruned: bool, pruning: float = 1.0) -> Episode:
    choosing = pruning if pruned else 0.0
    time = StepTime(
        milliseconds, vision=2.0, prefill=milliseconds - 4 - choosing, pruning=choosing, decode=1.5, other=0.5
    )
    slow = StepTime(20.0, vision=2.0, prefill=16.0, pruning=0.0, decode=1.5, other=0.5)
    kept: list[int | None] = [None, 4, 4, 4] if pruned else [None] * 4
    return Episode(arm, Unit("reach", seed), success, [slow, time, time, time], kept)


def _summary(arms: tuple[Arm, ...], drop: list[bool], random: list[bool], drop_ms: float = 10.0) -> Summary:
    units = [
        {
            "unpruned": _episode("unpruned", seed, True, 20.0, pruned=False),
            "drop": _episode("drop", seed, drop[seed], drop_ms, pruned=True),
            "random": _episode("random", seed, random[seed], 9.0, pruned=True, pruning=0.1),
        }
        for seed in range(len(drop))
    ]
    costs = {
        "unpruned": ArmCost(1000.0, Flops(800.0, 100.0), 16, 16),
        "drop": ArmCost(600.0, Flops(350.0, 50.0), 4, 16),
        "random": ArmCost(500.0, Flops(350.0, 50.0), 4, 16),
    }
    return summarize(units, arms, costs, vision_flops=100.0, layers=4)


def test_counted_flops_are_the_floor_plus_vision_where_nothing_is_pruned(
    policy: Any, arms: tuple[Arm, ...], environments: FakeEnvironments
) -> None:
    observation = environments("reach").reset(0)
    cost = arm_cost(policy, arms[0], observation)
    vision = vision_flops(policy, observation)
    assert (cost.kept, cost.visual) == (16, 16)
    proprio = 2 * (44 * 64 + 64 * 32)  # its projector's two layers
    assert cost.counted == pytest.approx(cost.floor.total + vision + proprio, rel=0.01)


def test_counted_flops_of_the_two_camera_policy_are_its_one_pass(chunk_policy: Any, arms: tuple[Arm, ...]) -> None:
    observation = PairEnvironment("reach").reset(0)
    decoder, shape = decoder_shapes(chunk_policy)
    assert (shape.visual, shape.other, shape.actions, decoder.vocabulary) == (128, 16, 1, 0)
    cost, vision = arm_cost(chunk_policy, arms[0], observation), vision_flops(chunk_policy, observation)
    proprio, head = 2 * (44 * 64 + 64 * 32), 8 * 2 * (32 * 64 + 64 * 4)
    assert cost.counted == pytest.approx(cost.floor.total + vision + proprio + head, rel=0.01)
    assert abs(timer_overhead(chunk_policy, observation, pairs=3)) < 1000


def test_pruned_steps_cost_less_and_never_less_than_the_floor(
    policy: Any, arms: tuple[Arm, ...], environments: FakeEnvironments
) -> None:
    observation = environments("reach").reset(0)
    vision = vision_flops(policy, observation)
    unpruned, drop, random = (arm_cost(policy, arm, observation) for arm in arms)
    assert drop.kept == random.kept == 4
    assert drop.floor == random.floor
    assert drop.floor.total < unpruned.floor.total
    assert vision + drop.floor.total <= random.counted < drop.counted
    assert random.counted < unpruned.counted


def test_step_shape_and_timer_overhead(policy: Any, environments: FakeEnvironments) -> None:
    decoder, shape = decoder_shapes(policy)
    assert (shape.visual, shape.other, shape.actions) == (16, 8, 4)
    assert decoder.vocabulary == policy.config.vocabulary_size
    assert abs(timer_overhead(policy, environments("reach").reset(0), pairs=3)) < 1000


def test_summary_separates_pruned_steps_from_all(arms: tuple[Arm, ...]) -> None:
    summary = _summary(arms, [True] * 4, [False] * 4)
    base, drop, _ = summary.arms
    assert (base.all_steps.steps, base.pruned_steps.steps, base.pruned_share) == (16, 16, 0.0)
    assert (drop.all_steps.steps, drop.pruned_steps.steps, drop.pruned_share) == (16, 12, 0.75)
    assert (drop.all_steps.p99, drop.pruned_steps.p99) == (20.0, 10.0)
    assert drop.difference is not None
    assert drop.difference.value == 0
    assert drop.by_task == {"reach": (4, 4)}
    # Prefill is 16 of 20 ms, and layers 1 to 3 of 4 can be pruned.
    assert summary.touchable_share == pytest.approx(16 / 20 * 3 / 4)
    assert summary.ceiling == pytest.approx(2.5)
    assert floor_share(summary, drop) == pytest.approx(0.5)


def test_nothing_finished_cannot_be_summed_up(arms: tuple[Arm, ...]) -> None:
    with pytest.raises(ValueError, match="nothing to sum up"):
        summarize([], arms, {}, 0.0, 4)


def test_table_has_one_cell_an_arm(arms: tuple[Arm, ...]) -> None:
    summary = _summary(arms, [True] * 3 + [False], [False] * 4)
    assert heading(summary) == ["unpruned", "VLA-Pruner 0.25 drop", "random 0.25 drop"]
    table = dict(rows(summary))
    assert all(len(cells) == 3 for cells in table.values())
    assert table["episodes solved"] == ["4/4", "3/4", "0/4"]
    assert table["difference"] == ["-", "-25", "-100"]
    assert list(table)[:4] == ["success", "  95 % interval", "ms a pruned step", "  speed"]
    assert table["ms a pruned step"] == ["20.0", "10.0", "9.0"]
    assert table["  speed"] == ["1.00x", "2.00x", "2.22x"]
    assert table["  choosing"] == ["0.0", "1.0", "0.1"]
    assert table["  of unpruned"] == ["100 %", "60 %", "50 %"]
    assert table["  least possible"] == ["100 %", "50 %", "50 %"]
    lines = to_markdown(summary).splitlines()
    assert {line.count("|") for line in lines} == {5}
    assert len(lines) == len(rows(summary)) + 2
    assert footnotes(summary)


def test_table_fits_a_terminal_of_80_columns(arms: tuple[Arm, ...]) -> None:
    summary = _summary(arms, [True], [True], drop_ms=1234.5)
    base, drop, random = summary.arms
    names = [dataclasses.replace(drop, arm=name) for name in default_arms(0.125)[1:3]]
    wide = dataclasses.replace(summary, arms=[base, *names, dataclasses.replace(random, arm=default_arms(0.125)[3])])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(to_rich(wide))
    text = console.export_text()
    assert text.count("-79 to +79") == 3
    assert text.count("1234.5") >= 2
    assert "…" not in text


def test_verdict_says_what_the_numbers_say(arms: tuple[Arm, ...]) -> None:
    text = " ".join(verdict(_summary(arms, [True] * 40, [False] * 40)))
    assert "solved 40 of 40, no difference against unpruned (-9 to +9: within noise)" in text
    assert "solved 0 of 40, -100 points against unpruned" in text
    assert re.search(r"\(-100 to -\d+: a loss; exact McNemar p = 1.8e-12\)", text)
    assert "A pruned step is 2.00x as fast, 10.0 ms (11.0 ms saved in prompt" in text
    assert "1.0 ms spent on choosing), for 60 % of the FLOPs" in text
    assert "Choosing which tokens to keep beats dropping at random" in text
    assert "40 episodes an arm cannot show small differences" in text
    assert "75 % of them were pruned" in text
    assert "more than 2.50x as fast" in text
    assert "the prompt in layers 1 to 3: " in text
    last = dataclasses.replace(_summary(arms, [True] * 4, [False] * 4), layer=3)
    assert "the prompt in layer 3: " in " ".join(verdict(last))


def test_verdict_admits_when_pruning_does_not_pay(arms: tuple[Arm, ...]) -> None:
    slower = " ".join(verdict(_summary(arms, [False] * 40, [True] * 40, drop_ms=25.0)))
    assert "It does not pay here: a pruned step is slower, 25.0 ms" in slower
    assert "Dropping at random did better than choosing" in slower
    same = " ".join(verdict(_summary(arms, [True] * 40, [True] * 40, drop_ms=20.0)))
    assert "Its pruned steps are no faster, 20.0 ms" in same
    assert "do not show that choosing tokens beats dropping at random" in same


def test_what_a_compiled_run_says(arms: tuple[Arm, ...]) -> None:
    plain = _summary(arms, [True] * 4, [False] * 4)
    made = Compiling("inductor", False, {"unpruned": 2, "drop": 3}, {"unpruned": 20.2, "drop": 31.1}, (20.5, 20.0))
    summary = dataclasses.replace(plain, compiling=made)
    assert "4 paired episodes an arm, every arm compiled." in headline(summary)
    text = " ".join(verdict(summary))
    assert "10.0 ms (11.0 ms saved in prompt and choosing, 0.0 ms saved in actions, 1.0 ms spent around" in text
    assert "solved 4 of 4, no difference against unpruned" in text
    assert "more than 2.50x as fast" in text
    assert "do not quote" not in text
    table = dict(rows(summary))
    assert table["  choosing, outside"] == dict(rows(plain))["  choosing"]
    assert (table["  prompt"], table["  actions"]) == (["16.0", "5.0", "4.9"], ["1.5"] * 3)
    first, *others = footnotes(summary)
    assert "is compiled with inductor, which took 51 s before the episodes; an unpruned step takes 20.5 ms" in first
    assert others == footnotes(plain)
    whole = dataclasses.replace(plain, compiling=dataclasses.replace(made, one_graph=True, anew=2))
    assert "  prompt, actions" in dict(rows(whole))
    assert "  actions" not in dict(rows(whole))
    text = " ".join(verdict(whole))
    assert "2 graphs had to be compiled while episodes ran" in text
    assert "as fast" in text
    assert "no rule at this layer" not in text


def test_a_busy_machine_has_no_speed_in_its_sentences_and_brackets_in_its_table(arms: tuple[Arm, ...]) -> None:
    idle = _summary(arms, [True] * 40, [False] * 40)
    busy = dataclasses.replace(idle, busy=True)
    assert headline(busy) == (
        "VLA-Pruner 0.25 drop solves 100 % of the episodes, as many as the unpruned policy: these episodes show no "
        "difference in success (-9 to +9 points), 40 paired episodes an arm; other programs kept the machine busy, so "
        "this run says nothing about speed: repeat the demo when the machine is idle."
    )
    told = " ".join(verdict(busy))
    assert "solved 40 of 40, no difference against unpruned (-9 to +9: within noise). A pruned step takes 60 %" in told
    assert "beats dropping at random" in told
    assert not re.search(r"[\d.]x| ms\b", told)
    changed = [pair for pair in zip(rows(idle), rows(busy), strict=True) if pair[0] != pair[1]]
    speeds = ["1.00x", "2.00x", "2.22x"]
    assert changed == [(("  speed", speeds), ("  speed, busy", [f"({one})" for one in speeds]))]
    assert footnotes(busy)[0].endswith("are no findings. Repeat the demo when the machine is idle.")
    assert footnotes(busy)[1:] == footnotes(idle)


def test_verdict_names_an_arm_that_never_pruned(arms: tuple[Arm, ...]) -> None:
    units = [{key: _episode(key, 0, True, 20.0, pruned=False) for key in ("unpruned", "drop", "random")}]
    costs = {key: ArmCost(1000.0, Flops(800.0, 100.0), 16, 16) for key in ("unpruned", "drop", "random")}
    summary = summarize(units, arms, costs, vision_flops=100.0, layers=4)
    assert "pruned no control step at all" in " ".join(verdict(summary))
    assert dict(rows(summary))["ms a pruned step"] == ["20.0", "-", "-"]
    assert (
        headline(summary)
        == "VLA-Pruner 0.25 drop pruned no control step in 1 paired episode an arm, so there is nothing to compare."
    )


def test_headline_is_the_result_in_one_sentence(arms: tuple[Arm, ...]) -> None:
    good = headline(_summary(arms, [True] * 40, [False] * 40))
    assert good == (
        "VLA-Pruner 0.25 drop takes 10.0 ms instead of 20.0 for a pruned control step (2.00x as fast) and solves 100 % "
        "of the episodes, as many as the unpruned policy: these episodes show no difference in success (-9 to +9 "
        "points), 40 paired episodes an arm."
    )
    bad = headline(_summary(arms, [False] * 40, [True] * 40, drop_ms=25.0))
    assert "(0.80x as fast) and solves 0 % of the episodes instead of 100 %: its success is lower (-100 to" in bad
    renamed = [dataclasses.replace(arms[1], key="recommended", title="recommended (x)"), arms[2]]
    summary = _summary(arms, [True], [True])
    named = [dataclasses.replace(one, arm=arm) for one, arm in zip(summary.arms[1:], renamed, strict=True)]
    both = dataclasses.replace(summary, arms=[summary.arms[0], *reversed(named)])
    assert headline(both).startswith("The recommended setting (x) takes")
