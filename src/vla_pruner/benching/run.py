"""A benchmark from its settings to its report."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vla_pruner.benching.arms import Arm, Turns, arms_of
from vla_pruner.benching.compiling import CompiledTurns
from vla_pruner.benching.environment import conditions_of
from vla_pruner.benching.feeds import feed, feed_of
from vla_pruner.benching.measure import (
    LEAST_ROUNDS,
    STEPS_A_TURN,
    WARM_UP_ROUNDS,
    Timings,
    count_stages,
    peak_memory,
    preparation,
    reachable_share,
    reachable_share_by_flops,
    time_stages,
    time_steps,
)
from vla_pruner.benching.policies import build
from vla_pruner.benching.report import ArmResult, BenchReport, Compiling, FlopCount, Refresh, Speed
from vla_pruner.benching.roofline import Peaks, Work, least_work, measure_peaks
from vla_pruner.benching.settings import NAMED, BenchSettings, flag
from vla_pruner.benching.subject import Subject
from vla_pruner.benching.verdict import Timed, why
from vla_pruner.conditions import busy_cores, load_average
from vla_pruner.errors import OptionError, SessionError, UnsupportedModelError
from vla_pruner.method_names import told_of_fates
from vla_pruner.policies.options import usable_device
from vla_pruner.statistics import median_interval, percentile
from vla_pruner.wording import a_type

_BUSY_CORES = 0.25

Progress = Callable[[str, int, int], None]
"""A function that is called with the work in progress, and the number of finished rounds and of all."""


def bench(model: Any, *, progress: Progress | None = None, **options: Any) -> BenchReport:
    """Time a policy unpruned and pruned, and say what pruning saves and why not more.

    Args:
        model: a name, "llama:HIDDEN,LAYERS" or a checkpoint's folder (see `BenchSettings`); or a policy that is loaded,
            with no session attached, which is timed where it is and left as it was.
        progress: called with the work in progress.
        **options: fields of `BenchSettings`: keep, methods (names or methods), pruned, layer, batch, dtype, device,
            iters, ...

    Raises:
        OptionError: an option is unknown or out of its range, or does not apply to this model, or torch cannot use the
            device.
        UnsupportedModelError: no such model, or it cannot be compiled.
        CheckpointError: the checkpoint cannot be read.
        SessionError: a session is attached to the policy.
    """
    known = [field.name for field in dataclasses.fields(BenchSettings) if field.name not in ("model", "loaded")]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise OptionError(f"bench was given {', '.join(unknown)}; it takes {', '.join(known)}.")
    if not isinstance(model, (str, Path)):
        return _bench_loaded(model, progress, options)
    settings = BenchSettings(model=str(model), **options)
    device = usable_device(settings.device, "--device")
    with _threads(settings.threads):
        policy = build(settings, device, getattr(torch, settings.dtype))
        return bench_subject(Subject(policy, feed(policy, settings, device), settings, device), progress)


def _bench_loaded(policy: Any, progress: Progress | None, options: dict[str, Any]) -> BenchReport:
    module = policy if isinstance(policy, nn.Module) else getattr(policy, "module", None)
    if not isinstance(module, nn.Module):
        given = f"the class {policy.__name__}" if isinstance(policy, type) else a_type(policy)
        is_model = isinstance(policy, type) and issubclass(policy, nn.Module)
        raise UnsupportedModelError(
            f"model is {given}; it is {', '.join(NAMED)}, llama:HIDDEN,LAYERS, the folder of a checkpoint, or a policy "
            "as load_policy, random_policy or reference_policy gives it."
            + (" Give a model of this class that is loaded, and not the class." if is_model else "")
        )
    for name in ("device", "dtype"):
        if name in options:
            raise OptionError(f"{flag(name)} does not apply to a policy that is loaded; move it, and leave this out.")
    feed_of(policy)  # refused here if no inputs are known for it
    weight = next(weight for weight in module.parameters() if weight.is_floating_point())
    dtype, device = str(weight.dtype).removeprefix("torch."), weight.device
    settings = BenchSettings(type(policy).__name__, loaded=True, dtype=dtype, device=str(device), **options)
    with _threads(settings.threads):
        return bench_subject(Subject(policy, feed(policy, settings, device), settings, device), progress)


def bench_subject(subject: Subject, progress: Progress | None = None, whole_episodes: bool = True) -> BenchReport:
    """Benchmark a policy that exists already; it is left as it was.

    Args:
        subject: the policy and its inputs.
        progress: as of `bench`.
        whole_episodes: whether compiled arms begin with an episode of their own. If not, they begin with the memory of
            the uncompiled arms: nothing is compiled for the unpruned steps before, and "compiling" does not count them.
    """
    settings, tell = subject.settings, progress or (lambda *_: None)
    conditions = conditions_of(subject)
    tell("probing the device", 0, 1)
    peaks = measure_peaks(subject.device, getattr(torch, settings.dtype))
    plain = Turns(subject, arms_of(settings))
    rounds = max(1, -(-settings.iters // STEPS_A_TURN))
    done = iter(range(1, WARM_UP_ROUNDS + rounds + 1))
    with turns_of(plain, tell, whole_episodes) as turns:
        timings = time_steps(turns, rounds, lambda: tell("timing steps", next(done), WARM_UP_ROUNDS + rounds))
        tell("timing stages", 0, 1)
        stages = time_stages(turns, max(2, rounds // 4))
        memory = {arm.name: peak_memory(turns, arm) for arm in turns.arms}
        compiling = turns.compiling if isinstance(turns, CompiledTurns) else {}
    shares = _shares(plain, stages[plain.arms[0].name], peaks)
    prepare_ms = preparation(plain)
    tell("counting", 0, 1)
    conditions |= {"busy_cores_after": busy_cores(), "load_average_after": load_average()}
    results = _results(plain, Measured(timings, stages, shares, memory, compiling), peaks)
    return BenchReport(
        settings=settings.to_json(),
        conditions=conditions,
        shape=_shape(subject),
        peaks=peaks,
        arms=results,
        order=timings.order,
        shares=shares,
        prepare_ms=prepare_ms,
        acting=subject.acting,
        backend=settings.backend,
        one_graph=subject.one_graph,
        warnings=tuple(_warnings(conditions, results, rounds)),
    )


@contextmanager
def turns_of(plain: Turns, tell: Progress, whole_episodes: bool = True) -> Iterator[Turns]:
    """Yield the turns that are timed: the arms as they are, or compiled; arguments as of `bench_subject`."""
    backend = plain.subject.settings.backend
    if backend is None:
        yield plain
        return
    count = iter(range(1, len(plain.arms) + 1))

    def told(arm: Arm) -> None:
        tell(f"compiling {arm.name}", next(count), len(plain.arms))

    memories = None if whole_episodes else plain.memories
    with CompiledTurns(plain.subject, plain.arms, backend, told, memories) as turns:
        if turns.kept != plain.kept:
            raise SessionError(f"Compiled arms keep {turns.kept} visual tokens, and uncompiled ones {plain.kept}.")
        yield turns


def _shares(plain: Turns, base: dict[str, float], peaks: Peaks) -> dict[int, float | None]:
    subject = plain.subject
    layers = sorted({arm.layer for arm in plain.arms if arm.method is not None})
    if subject.settings.backend is not None:
        least = least_work(subject, None, 0, "drop").milliseconds(peaks) if subject.one_graph else None
        return {layer: reachable_share_by_flops(subject, layer, base, least) for layer in layers}
    return {layer: reachable_share(plain, layer) for layer in layers}


@dataclass(frozen=True)
class Measured:
    """All timings by arm; `shares` by pruning layer. `compiling` is empty if nothing is compiled."""

    timings: Timings
    stages: dict[str, dict[str, float]]
    shares: dict[int, float | None]
    memory: dict[str, dict[str, Any]]
    compiling: dict[str, Compiling]


def _results(turns: Turns, measured: Measured, peaks: Peaks) -> tuple[ArmResult, ...]:
    """`turns`: of arms that are not compiled, so that their FLOPs can be counted."""
    subject, base_name = turns.subject, turns.arms[0].name
    timings, stages, compiled = measured.timings, measured.stages, bool(measured.compiling)
    counted = {arm.name: count_stages(turns, arm) for arm in turns.arms}

    def work_of(arm: Arm) -> Work:
        seeing = arm.name if arm.encoder is not None else base_name
        return least_work(subject, turns.kept[arm.name], arm.layer, arm.pruned, counted[seeing]["vision"], arm.encoder)

    work = {arm.name: work_of(arm) for arm in turns.arms}

    base_p50 = percentile(timings.steps[base_name], 50)

    def saved_by_encoder(arm: Arm) -> float:
        """Return the part of an unpruned step that reusing patches can save: the counted FLOPs' part of the encoder."""
        seen, taken = counted[base_name]["vision"], stages[base_name]
        return taken["vision"] / taken["total"] * (1 - counted[arm.name]["vision"] / seen) if arm.encoder else 0.0

    def timed(name: str) -> Timed:
        # The speed gives the saving, since it compares steps of the same round; two medians may disagree.
        return Timed(base_p50 / _speed(timings.rounds[base_name], timings.rounds[name]).value, stages[name], work[name])

    def result(arm: Arm) -> ArmResult:
        name, kept = arm.name, turns.kept[arm.name]
        is_base = arm.method is None
        roofline = work[name].milliseconds(peaks)
        p50 = percentile(timings.steps[name], 50)
        passes = subject.feed.decoded or (subject.feed.denoised or (0, 0))[1]
        return ArmResult(
            name=name,
            kind=arm.kind,
            method=None if is_base else repr(arm.method),
            layer=None if is_base else arm.layer,
            pruned=None if is_base else arm.pruned,
            kept=subject.feed.visual if kept is None else kept,
            milliseconds=_milliseconds(timings.steps[name]),
            robots_per_second=1e3 * subject.rows / p50,
            stages=stages[name],
            speed=None if is_base else _speed(timings.rounds[base_name], timings.rounds[name]),
            flops=FlopCount(counted[name], work[name].flops, subject.vision_by_formula),
            bytes_moved=work[name].bytes,
            roofline=roofline,
            reached=sum(roofline.values()) / p50,
            ceiling=None if is_base else _ceiling(subject, kept, measured.shares[arm.layer], saved_by_encoder(arm)),
            memory=measured.memory[name],
            refresh=_refresh(arm, timings, base_name),
            compiling=measured.compiling.get(name),
            encoder=None if arm.encoder is None else repr(arm.encoder),
            why=""
            if is_base
            else why(
                timed(base_name),
                timed(name),
                peaks,
                subject.acting,
                passes,
                compiled,
                subject.one_graph,
                encodes=arm.encoder is None,
            ),
        )

    return tuple(result(arm) for arm in turns.arms)


def _milliseconds(samples: list[float]) -> dict[str, Any]:
    figures: dict[str, Any] = {f"p{q}": percentile(samples, q) for q in (50, 90, 99)}
    return {**figures, "mean": statistics.fmean(samples), "samples": samples}


def _speed(base: list[float], arm: list[float]) -> Speed:
    speeds = [before / after for before, after in zip(base, arm, strict=True)]
    low, high = median_interval(speeds) or (None, None)
    return Speed(statistics.median(speeds), low, high, len(speeds))


def _refresh(arm: Arm, timings: Timings, base_name: str) -> Refresh | None:
    every = arm.refresh_every
    if every is None:
        return None
    base, pruned = (statistics.fmean(timings.steps[name]) for name in (base_name, arm.name))
    fresh = statistics.fmean(timings.fresh[arm.name])
    amortised = ((every - 1) * pruned + fresh) / every
    return Refresh(every, fresh, amortised, base / amortised)


def _ceiling(subject: Subject, kept: int | None, share: float | None, in_encoder: float) -> float | None:
    if kept is None and in_encoder:
        return 1 / (1 - in_encoder)
    if share is None or kept is None:
        return None
    gone = (subject.feed.visual - kept) / (subject.feed.visual + subject.feed.other)
    return 1 / (1 - share * gone - in_encoder)


def _shape(subject: Subject) -> dict[str, Any]:
    feed = subject.feed
    rows, steps = feed.denoised or (None, None)
    return {
        "policy": type(subject.policy).__name__,
        "batch": subject.rows,
        "cameras": subject.control_step.cameras,
        "visual_tokens": feed.visual,
        "other_tokens": feed.other,
        "layers": subject.family.depth,
        "passes_decoded": feed.decoded,
        "expert_rows": rows,
        "denoise_steps": steps,
        "parameters": sum(parameter.numel() for parameter in subject.module.parameters()),
    }


def _warnings(conditions: dict[str, Any], results: tuple[ArmResult, ...], rounds: int) -> Iterator[str]:
    for when in ("before", "after"):
        busy = conditions[f"busy_cores_{when}"]
        if busy is not None and busy > _BUSY_CORES:
            yield f"The machine was busy: other programs used {busy:g} cores {when} the benchmark. Repeat it when idle."
    if rounds < LEAST_ROUNDS:
        yield f"{rounds} rounds are too few for an interval; give --iters {LEAST_ROUNDS * STEPS_A_TURN} or more."
    fates = told_of_fates((arm.kind, arm.pruned) for arm in results if arm.pruned is not None)
    if fates:
        yield fates
    for arm in results:
        if not arm.flops.agree:
            part = arm.flops.difference["decoder"]
            yield f"{arm.name}: {100 * part:+.1f} % FLOPs of the decoder were counted against the formula's."


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
