"""The reasons why a saved token is a saved millisecond, or is not: sentences made from the figures."""

from __future__ import annotations

from dataclasses import dataclass

from vla_pruner.benching.roofline import Peaks, Work

NOTICEABLE = 0.25
"""The part of an unpruned step from which on a stage is named; also the part of the saving from which on a cost is."""

SLACK = 1.15
"""The pruned prompt is slower than its FLOPs say if it takes this much longer."""

OVERHEAD = 3.0
"""The multiple of its roofline's time from which on the stage after the prompt is mostly overhead."""

_CHOOSING = "Choosing, gathering and freezing cost"


@dataclass(frozen=True)
class Timed:
    """One arm as the sentences need it.

    Attributes:
        total: median milliseconds of the whole step; of a pruned arm, the baseline's divided by its speed.
        stages: median milliseconds by stage.
        work: the least that it must do.
    """

    total: float
    stages: dict[str, float]
    work: Work


def why(
    base: Timed,
    arm: Timed,
    peaks: Peaks,
    acting: str,
    passes: int,
    compiled: bool = False,
    one_graph: bool = False,
    encodes: bool = True,
) -> str:
    """Compare the saving with that of the prompt's FLOPs, and say what limits it.

    Args:
        base: the untouched model.
        arm: the pruned one.
        peaks: of the device.
        acting: "decode", "denoise" or "".
        passes: passes after the prompt.
        compiled: whether the prompt is one graph, choosing, gathering and freezing in it.
        one_graph: whether decoding is part of that graph, and of the stage "prefill".
        encodes: whether the vision encoder encodes all patches.
    """
    share = _flops(arm, one_graph) / _flops(base, one_graph)
    promised = base.stages["prefill"] * (1 - share)
    saved = base.total - arm.total
    outcome = f"{saved:.2f} ms are saved" if saved >= 0 else f"the step takes {-saved:.2f} ms more"
    what = "FLOPs of prompt and decoding" if one_graph else "prompt's FLOPs"
    first = (
        f"The {what} fall to {100 * share:.0f} %, which would save {promised:.2f} ms of {base.total:.2f}; {outcome}."
    )
    reasons = [
        *_choosing(arm, promised, compiled),
        *(_one_graph(base, arm, share) if one_graph else _prompt(base, arm, peaks, compiled)),
        *_acting(base, peaks, acting, passes),
        *(_vision(base) if encodes else ()),
        *_other(base),
    ]
    if not encodes:
        first += f" The vision encoder takes {arm.stages['vision']:.2f} ms instead of {base.stages['vision']:.2f}."
    if not reasons:
        reasons = ["Here a saved token is a saved millisecond."] if saved >= promised / SLACK else []
    return " ".join([first, *reasons])


def _choosing(arm: Timed, promised: float, compiled: bool) -> list[str]:
    cost = arm.stages["pruning"]
    what = "Remembering scores and opening steps, outside of the graphs, cost" if compiled else _CHOOSING
    if cost > promised:
        return [f"{what} {cost:.2f} ms, more than these FLOPs would save."]
    if cost > NOTICEABLE * promised:
        return [f"{what} {cost:.2f} ms of that."]
    return []


def _flops(timed: Timed, decoding: bool) -> float:
    flops = timed.work.flops
    return flops["prefill"] + flops["pruning"] + (flops["decode"] if decoding else 0.0)


def _one_graph(base: Timed, arm: Timed, share: float) -> list[str]:
    taken, expected = arm.stages["prefill"], base.stages["prefill"] * share
    if taken <= SLACK * expected:
        return []
    return [
        f"Prompt and decoding, one graph, take {taken:.2f} ms where their FLOPs say {expected:.2f}: choosing and "
        "gathering are part of it, smaller products use less of the device, and decoding takes hardly less where "
        "tokens are gone."
    ]


def _prompt(base: Timed, arm: Timed, peaks: Peaks, compiled: bool) -> list[str]:
    # Freezing is timed where it runs: in the graph, or apart from the prompt.
    flops = arm.work.flops["prefill"] + (arm.work.flops["pruning"] if compiled else 0.0)
    share = flops / base.work.flops["prefill"]
    taken, expected = arm.stages["prefill"], base.stages["prefill"] * share
    if arm.work.bound_by_reading("prefill", peaks):
        return ["The pruned prompt is so short that reading the weights bounds it, and these are read all the same."]
    if taken > SLACK * expected and compiled:
        return [
            f"The pruned prompt takes {taken:.2f} ms where its FLOPs say {expected:.2f}: choosing and gathering are "
            "part of its graph, and smaller products use less of the device."
        ]
    if taken > SLACK * expected:
        return [
            f"The pruned prompt takes {taken:.2f} ms where its FLOPs say {expected:.2f}: smaller products use less of "
            "the device, and launching them costs the same."
        ]
    return []


def _acting(base: Timed, peaks: Peaks, acting: str, passes: int) -> list[str]:
    taken = base.stages["decode"]
    if not acting or taken < NOTICEABLE * base.total:
        return []
    name = "Decoding" if acting == "decode" else "Denoising"
    bound, least = "", base.work.milliseconds(peaks)["decode"]
    if taken > OVERHEAD * least:
        bound = f": computing and reading take {least:.2f} ms of it, the rest is the overhead of many small calls"
    elif base.work.bound_by_reading("decode", peaks):
        gigabytes = base.work.bytes["decode"] / 1e9
        bound = f", bound by memory: its {passes} passes read {gigabytes:.2f} GB"
    return [f"{name} takes {taken:.2f} ms, and hardly less where tokens are gone{bound}."]


def _vision(base: Timed) -> list[str]:
    taken = base.stages["vision"]
    if taken < NOTICEABLE * base.total:
        return []
    return [f"The vision encoder takes {taken:.2f} ms, and it is behind it that tokens are pruned."]


def _other(base: Timed) -> list[str]:
    taken = base.stages["other"]
    if taken < NOTICEABLE * base.total:
        return []
    return [f"{taken:.2f} ms are spent outside of encoder, decoder and expert (moving inputs, embedding, sampling)."]
