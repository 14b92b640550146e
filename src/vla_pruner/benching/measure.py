"""Everything that is measured: milliseconds, stages, memory, FLOPs, and the share that pruning can reach."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from vla_pruner.benching.arms import Arm, Turns, turn
from vla_pruner.benching.subject import Subject
from vla_pruner.cost import flop_reading
from vla_pruner.errors import SessionError
from vla_pruner.timing import STAGES, Span, StageMeter, StageTimer, now

STEPS_A_TURN = 2
"""Control steps that are timed each time an arm has its turn."""

WARM_UP_ROUNDS = 2
"""Rounds that do not count."""

LEAST_ROUNDS = 6
"""The fewest rounds that give an interval."""


@dataclass
class Timings:
    """The results of the rounds.

    Attributes:
        steps: milliseconds of every timed step, by arm.
        fresh: milliseconds of the steps that a method with `refresh_every` leaves unpruned, one a round, by arm.
        rounds: median of each round, by arm, in the order of the rounds.
        order: the arms of each round, in the order of their turns.
    """

    steps: dict[str, list[float]] = field(default_factory=dict)
    rounds: dict[str, list[float]] = field(default_factory=dict)
    order: list[list[str]] = field(default_factory=list)
    fresh: dict[str, list[float]] = field(default_factory=dict)


def time_steps(turns: Turns, rounds: int, progress: Callable[[], None] | None = None) -> Timings:
    """Time whole control steps, arms taking turns in another order each round; the first rounds are thrown away."""
    timings = Timings({arm.name: [] for arm in turns.arms}, {arm.name: [] for arm in turns.arms})
    for number in range(WARM_UP_ROUNDS + rounds):
        order = turn(turns.arms, number)
        for arm in order:
            subject = turns.subject_of(arm)
            with turns.open(arm) as session:
                taken = []
                for _ in range(STEPS_A_TURN):
                    turns.ready(arm, session)
                    taken.append(step_milliseconds(subject.step, subject.device))
                    turns.check(arm, session)
                fresh = _fresh_step(turns, arm, session)
            if number >= WARM_UP_ROUNDS:
                if fresh is not None:
                    timings.fresh.setdefault(arm.name, []).append(fresh)
                timings.steps[arm.name] += taken
                timings.rounds[arm.name].append(statistics.median(taken))
        if number >= WARM_UP_ROUNDS:
            timings.order.append([arm.name for arm in order])
        if progress is not None:
            progress()
    return timings


def _fresh_step(turns: Turns, arm: Arm, session: Any) -> float | None:
    if arm.refresh_every is None:
        return None
    turns.make_fresh(arm, session)
    taken = step_milliseconds(turns.subject_of(arm).step, turns.subject.device)
    if session.kept is not None:
        raise SessionError(f"A step of {arm.name} that should see every token was pruned.")
    return taken


def step_milliseconds(step: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds of one control step; on a GPU by its own clock, from an empty queue to an empty queue."""
    if device.type != "cuda":
        start = now(device)
        step()
        return 1e3 * (now(device) - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def time_stages(turns: Turns, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each stage, and of the whole step as it is while stages are timed ("total"), by arm.

    This is apart from `time_steps`, since stages can only be separated by waiting for the device at each of them.
    """
    found: dict[str, list[Any]] = {arm.name: [] for arm in turns.arms}
    for number in range(1 + rounds):
        for arm in turn(turns.arms, number):
            subject = turns.subject_of(arm)
            with turns.open(arm) as session, StageTimer(subject.policy, subject.watched()) as timer:
                for _ in range(STEPS_A_TURN):
                    if session is not None:
                        session.clock = None
                        turns.ready(arm, session)
                        session.clock = timer.stage
                    with timer.step():
                        subject.step()
            if number:
                found[arm.name] += timer.steps
    return {
        name: {stage: statistics.median(getattr(step, stage) for step in steps) for stage in (*STAGES, "total")}
        for name, steps in found.items()
    }


def count_stages(turns: Turns, arm: Arm) -> dict[str, float]:
    """FLOPs of each stage of one control step, as torch's dispatcher counts them; of arms that are not compiled."""
    with flop_reading() as read:
        meter = StageMeter(turns.subject.watched(), read)
        with turns.open(arm) as session, meter:
            turns.ready(arm, session)
            if session is not None:
                session.clock = meter.stage
            with meter.step():
                turns.subject.step()
    return {stage: meter.last.get(stage, 0.0) for stage in STAGES}


def peak_memory(turns: Turns, arm: Arm) -> dict[str, Any]:
    """Bytes at the peak of one control step; on the CPU only the process as a whole can be asked, after it."""
    subject = turns.subject_of(arm)
    device = subject.device
    with turns.open(arm) as session:
        turns.ready(arm, session)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        subject.step()
        if device.type == "cuda":
            return {"kind": "peak allocated by torch", "bytes": torch.cuda.max_memory_allocated(device)}
        return {"kind": "resident size of the process, everything in it", "bytes": resident_bytes()}


def resident_bytes() -> int | None:
    """Return the bytes of this process; None if the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    import resource

    return pages * resource.getpagesize()


def reachable_share(turns: Turns, layer: int, repeats: int = 5) -> float | None:
    """Return the share of an unpruned control step that its prompt spends in the layers from `layer` on; None if that
    is not known.
    """
    subject, shares = turns.subject, []
    for repeat in range(1 + repeats):
        with Span(subject.family.decoder, layer, subject.device) as probe:
            start = now(subject.device)
            subject.step()
            total = now(subject.device) - start
        if repeat:
            shares.append(probe.seconds / total)
    share = statistics.median(shares)
    return share if 0 < share < 1 else None


def reachable_share_by_flops(
    subject: Subject, layer: int, stages: dict[str, float], least: dict[str, float] | None = None
) -> float | None:
    """Return `reachable_share` of a prompt that is one graph, in which no layer can be timed: the layers' part of its
    FLOPs stands for their part of its time.

    Args:
        subject: the one that runs.
        layer: the first one.
        stages: milliseconds of the untouched model by stage, and "total".
        least: if decoding is in the prompt's graph, and "prefill" both: the roofline's milliseconds by stage, which
            stand for the prompt's part of it.
    """
    parts = subject.control_step.flops(None, layer)
    before, after = parts["prompt, layers before"], parts["prompt, layers pruned"]
    prompt = 1.0 if least is None else least["prefill"] / (least["prefill"] + least["decode"])
    share = prompt * stages["prefill"] / stages["total"] * after / (before + after)
    return share if 0 < share < 1 else None


def preparation(turns: Turns, repeats: int = 5) -> float | None:
    """Return the median milliseconds from images and words to the inputs of a control step, on the host."""
    prepare = turns.subject.feed.prepare
    if prepare is None:
        return None
    taken = []
    for repeat in range(1 + repeats):
        start = perf_counter()
        prepare()
        if repeat:
            taken.append(1e3 * (perf_counter() - start))
    return statistics.median(taken)
