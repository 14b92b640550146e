"""The conclusions in plain sentences. Every sentence is computed from the numbers; none is written in advance."""

from __future__ import annotations

from math import isnan

from vla_pruner.demo.arms import RECOMMENDED_ARM
from vla_pruner.demo.summary import ArmSummary, Summary
from vla_pruner.demo.table import labels_of
from vla_pruner.fate import Fate
from vla_pruner.wording import counted, span

_FEW = 100
"""The number of pairs below which a difference of several points cannot be told from noise."""


def headline(summary: Summary) -> str:
    """Return the whole result in one sentence: the recommended setting, or the arm in its place, against unpruned. It
    names no speed if the machine was busy.
    """
    arm, base = summary.recommended, summary.baseline
    units = f"{counted(summary.units, 'paired episode')} an arm" + (", every arm compiled" if summary.compiling else "")
    if arm is None or arm.difference is None:
        return f"Unpruned, the policy solved {_rate(base)} of the episodes ({units})."
    if not arm.pruned_steps.steps:
        return f"{_title(arm)} pruned no control step in {units}, so there is nothing to compare."
    difference = arm.difference
    interval = f"{100 * difference.low:+.0f} to {100 * difference.high:+.0f} points"
    if difference.within_noise:
        success = f"these episodes show no difference in success ({interval})"
    else:
        success = f"its success is {'higher' if difference.value > 0 else 'lower'} ({interval})"
    same = arm.success.successes == base.success.successes
    unpruned = ", as many as the unpruned policy" if same else f" instead of {_rate(base)}"
    result = f"solves {_rate(arm)} of the episodes{unpruned}: {success}, {units}"
    if summary.busy:
        return (
            f"{_title(arm)} {result}; other programs kept the machine busy, so this run says nothing about speed: "
            "repeat the demo when the machine is idle."
        )
    speed = base.all_steps.p50 / arm.pruned_steps.p50
    pace = (
        f"takes {arm.pruned_steps.p50:.1f} ms instead of {base.all_steps.p50:.1f} for a pruned control step "
        f"({speed:.2f}x as fast)"
    )
    return f"{_title(arm)} {pace} and {result}."


def _title(arm: ArmSummary) -> str:
    title = arm.arm.title
    name, bracket, rest = title.partition(" (")
    return f"The {name} setting{bracket}{rest}" if arm.arm.key == RECOMMENDED_ARM else _capital(title)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _rate(arm: ArmSummary) -> str:
    return f"{100 * arm.success.value:.0f} %"


def verdict(summary: Summary) -> list[str]:
    """Return sentences for the terminal and the report: each arm's result, then the limits of all of them."""
    base = summary.baseline
    pace = "" if summary.busy else f" at {base.all_steps.p50:.1f} ms a control step"
    return [
        f"Unpruned, the policy solved {base.success.successes} of {base.success.total} episodes{pace}.",
        *[
            f"{_capital(arm.arm.title)}: {_success(arm)}. {_time(arm, summary)}"
            for arm in summary.arms
            if not arm.is_baseline
        ],
        *_noise(summary),
        *_choice(summary),
        *_ceiling(summary),
        *_warm_up(summary),
        *_compiled_anew(summary),
    ]


def _success(arm: ArmSummary) -> str:
    difference = arm.difference
    assert difference is not None
    solved = f"solved {arm.success.successes} of {arm.success.total}, {_points(difference.value)} against unpruned"
    interval = f"{100 * difference.low:+.0f} to {100 * difference.high:+.0f}"
    if difference.within_noise:
        return f"{solved} ({interval}: within noise)"
    word = "gain" if difference.value > 0 else "loss"
    return f"{solved} ({interval}: a {word}; exact McNemar p = {difference.p_value:.2g})"


def _time(arm: ArmSummary, summary: Summary) -> str:
    base, pruned, words = summary.baseline.all_steps, arm.pruned_steps, labels_of(summary)
    if not pruned.steps:
        return "It pruned no control step at all: its numbers are those of an unpruned policy."
    flops = f"{100 * arm.cost.counted / summary.baseline.cost.counted:.0f} % of the FLOPs"
    if summary.busy:
        return f"A pruned step takes {flops}."
    change = base.p50 / pruned.p50
    touched = [stage for stage in ("prefill", "decode") if base.stages[stage]]
    choosing = "spent on choosing"
    if summary.compiling is not None:
        words["prefill"] += " and choosing"
        choosing = "spent around the graphs"
    saved = [_saved(base.stages[stage] - pruned.stages[stage], words[stage]) for stage in touched]
    if change >= 1.02:
        head = f"A pruned step is {change:.2f}x as fast, {pruned.p50:.1f} ms"
    elif change > 0.98:
        head = f"Its pruned steps are no faster, {pruned.p50:.1f} ms"
    else:
        head = f"It does not pay here: a pruned step is slower, {pruned.p50:.1f} ms"
    detail = f"{', '.join(saved)}, {pruned.stages['pruning']:.1f} ms {choosing}"
    return f"{head} ({detail}), for {flops}."


def _saved(milliseconds: float, stage: str) -> str:
    return f"{abs(milliseconds):.1f} ms {'saved' if milliseconds >= 0 else 'lost'} in {stage}"


def _points(value: float) -> str:
    points = round(100 * value)
    return f"{points:+d} point{'' if abs(points) == 1 else 's'}" if points else "no difference"


def _noise(summary: Summary) -> list[str]:
    if summary.units >= _FEW:
        return []
    episodes = counted(summary.units, "episode")
    return [f"{episodes} an arm cannot show small differences: 'within noise' does not mean 'equal'."]


def _ceiling(summary: Summary) -> list[str]:
    if summary.busy:
        return []
    if isnan(summary.ceiling):
        return [
            "Prompt and actions are one graph, so what pruning can touch of an unpruned step was not timed apart: "
            "--no-compile says it."
        ]
    latency, words = summary.baseline.all_steps, labels_of(summary)
    shares = {stage: value / latency.p50 for stage, value in latency.stages.items()}
    stay = [stage for stage in ("vision", "decode", "other") if shares[stage]]
    rest = ", ".join(f"{words[stage]} {100 * shares[stage]:.0f} %" for stage in stay)
    caches = "; shorter caches help decoding a little" if shares["decode"] else ""
    return [
        f"Pruning can touch little more than the prompt in "
        f"{span('layer', summary.layer, summary.layers - summary.layer)}: "
        f"{100 * summary.touchable_share:.0f} % of an unpruned step here. "
        f"So no rule at this layer, however good, could make a step more than {summary.ceiling:.2f}x as fast "
        f"({rest} stay{caches})."
    ]


def _compiled_anew(summary: Summary) -> list[str]:
    anew = 0 if summary.compiling is None else summary.compiling.anew
    if not anew:
        return []
    return [
        f"{counted(anew, 'graph')} had to be compiled while episodes ran, which the milliseconds of some steps have in "
        "them: do not quote these."
    ]


def _warm_up(summary: Summary) -> list[str]:
    arms = [arm for arm in summary.arms if not arm.is_baseline and 0 < arm.pruned_share < 1]
    if not arms:
        return []
    low, high = (100 * pick(arm.pruned_share for arm in arms) for pick in (min, max))
    share = f"{low:.0f} %" if round(low) == round(high) else f"{low:.0f} to {high:.0f} %"
    steps = sum(arm.mean_steps for arm in arms) / len(arms)
    return [
        f"A method with a history prunes nothing while that fills at the start of an episode. These episodes have only "
        f"{steps:.0f} control steps, so {share} of them were pruned: that dilutes both what pruning saves and what it "
        "costs. Longer episodes gain and risk more."
    ]


def _choice(summary: Summary) -> list[str]:
    """Return whether choosing mattered: the same number of tokens, dropped at random in the same episodes."""
    chosen = None if summary.chosen is None else summary.get(summary.chosen)
    random, difference = summary.get("random"), summary.chosen_against_random
    if chosen is None or random is None or difference is None:
        return []
    method = chosen.arm.method
    fate = (Fate.DROP if method is None else method.fate).gerund
    interval = f"{100 * difference.value:+.0f} points, {100 * difference.low:+.0f} to {100 * difference.high:+.0f}"
    if difference.within_noise:
        head = f"These episodes do not show that choosing tokens beats {fate} at random ({interval})"
    elif difference.value > 0:
        head = f"Choosing which tokens to keep beats {fate} at random ({interval})"
    else:
        head = f"{fate.capitalize()} at random did better than choosing ({interval})"
    if random.pruned_share > chosen.pruned_share + 0.005:
        head += (
            f"; the random arm has no warm-up, so it prunes {100 * random.pruned_share:.0f} % of its steps against "
            f"{100 * chosen.pruned_share:.0f} %"
        )
    return [head + "."]
