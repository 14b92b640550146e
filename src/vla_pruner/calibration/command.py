"""`vla-pruner calibrate`: from the settings to the table, the sentences and the file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vla_pruner.bootstrap import FEWEST_CLUSTERS, FEWEST_EPISODES, FEWEST_PAIRS, Estimate
from vla_pruner.calibration.agreement import Agreement, agreement, check_shared, closed_loop_losses
from vla_pruner.calibration.recordings import Recordings, find_recordings
from vla_pruner.calibration.replay import replay
from vla_pruner.calibration.result import ArmCalibration, Calibration, calibration_of
from vla_pruner.calibration.settings import CalibrateSettings
from vla_pruner.conditions import busy_cores, machine_conditions
from vla_pruner.evaluation.arms import Arm
from vla_pruner.evaluation.policies import fingerprint
from vla_pruner.evaluation.table import to_rich
from vla_pruner.method_names import told_of_fates
from vla_pruner.outputs import check_output, left_to, write_output
from vla_pruner.statistics import wilson
from vla_pruner.terminal import progress, say, waiting
from vla_pruner.wording import counted

HEADS = ("arm", "moved", "in units", "pruned", "p50 ms", "closed-loop loss")
NOTES = (
    "moved: mean absolute difference to the unpruned policy's action on the same recorded observation, in standard "
    "deviations of the recorded actions, over pruned control steps (again and blank: all); below it the 95 % bootstrap "
    "interval over episodes. in units: the same without the scale.",
    "ms: of one control step of the policy, pruned or not, on this machine as busy as it was.",
)
_PACKAGES = ("vla-pruner", "torch", "transformers", "numpy", "scipy", "lerobot")
_REPRODUCED = 1e-3


def run_calibrate(settings: CalibrateSettings, console: Console) -> int:
    """Calibrate, or read an earlier calibration, and show the conclusions.

    Returns:
        0.

    Raises:
        VLAPrunerError: it cannot run, or the settings do not fit the policy or the recordings.
    """
    check_output(settings.json)
    wilson(0, 1)  # refused now, and not after minutes, if scipy is missing
    with left_to(settings.json):
        found = Calibration.read(settings.results) if settings.results else _calibrate(settings, console)
    agreed = agreement(found, settings.against) if settings.against else None
    _show(found, agreed, console)
    for sentence in sentences(found, settings.tolerance, agreed):
        say(console, f"- {sentence}")
    if settings.json is not None:
        content = {**found.to_json(), **_extras(found, settings.tolerance, agreed, settings.against)}
        write_output(settings.json, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return 0


def calibrate(policy: Any, arms: Sequence[Arm], recordings: Recordings, console: Console | None = None) -> Calibration:
    """Measure how far each arm moves the action on recorded observations, and how fast it is.

    Args:
        policy: as of `load_policy`.
        arms: of `vla_pruner.evaluation.arms.method_arms` and `all_arms`.
        recordings: of `find_recordings`.
        console: for a bar; None: silent.

    Raises:
        VLAPrunerError: an arm or a recording does not fit the policy.
    """
    conditions = {**machine_conditions(_PACKAGES), "recordings": str(recordings.folder), "kind": recordings.kind}
    pruning = [arm for arm in arms if arm.kind != "baseline"]
    with progress(console) as shown:
        bar = shown.add_task("replayed", total=len(pruning) * len(recordings))
        played = replay(policy, arms, recordings, lambda *_: shown.advance(bar))
    conditions["busy_cores_after"] = busy_cores()
    conditions["recorded_weights"] = recordings.weights
    return calibration_of(played, fingerprint(policy), conditions)


def _calibrate(settings: CalibrateSettings, console: Console) -> Calibration:
    assert settings.policy is not None
    assert settings.source is not None
    arms = settings.arms()
    made = [arm.options for arm in arms if arm.kind == "method" and arm.options is not None]
    fates = told_of_fates((options.method, options.pruned) for options in made)
    if fates:
        say(console, fates)
    if settings.against:
        check_shared(arms, settings.against)
    with waiting(console, f"loading {settings.policy.name}"):
        policy = settings.policy.load(None)
    if settings.against:
        closed_loop_losses(settings.against, fingerprint(policy))  # refused now, and not after the replay
    recordings = find_recordings(
        settings.source,
        policy,
        tasks=settings.tasks,
        episodes=settings.episodes,
        every=settings.every,
        max_steps=settings.max_steps,
        cameras=settings.cameras,
        seed=settings.seed,
    )
    found = calibrate(policy, arms, recordings, console)
    asked = {"policy": settings.policy.name, "device": settings.policy.device, "dtype": settings.policy.dtype}
    asked |= {"every": settings.every, "max_steps": settings.max_steps, "seed": settings.seed}
    return dataclasses.replace(found, conditions={**found.conditions, **asked})


def _show(found: Calibration, agreed: Agreement | None, console: Console) -> None:
    losses = {} if agreed is None else {pair.key: pair.loss for pair in agreed.arms}
    rows = [_row(arm, losses) for arm in found.arms]
    heads = HEADS
    if agreed is None:
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    steps = found.baseline.steps
    say(console)
    title = f"{counted(len(found.episodes), 'recorded episode')}, {counted(steps, 'control step')}"
    console.print(to_rich(title, heads, rows))
    for note in NOTES:
        say(console, note, style="dim")
    say(console)


def _row(arm: ArmCalibration, losses: dict[str, float]) -> tuple[str, ...]:
    moved, units = arm.moved, arm.moved_in_units
    interval = "" if moved is None or moved.low is None else f"\n{moved.low:.3f} to {moved.high:.3f}"
    loss = losses.get(arm.key)
    return (
        arm.title,
        "-" if moved is None or arm.kind == "baseline" else f"{moved.value:.3f}{interval}",
        "-" if units is None or arm.kind == "baseline" else f"{units.value:.4f}",
        f"{100 * arm.pruned_steps / arm.steps:.0f} %",
        f"{arm.p50_ms:.1f}",
        "-" if loss is None else f"{100 * loss:+.1f}",
    )


def sentences(found: Calibration, tolerance: float | None, agreed: Agreement | None) -> list[str]:
    """Return the conclusions from the numbers."""
    said = []
    if tolerance is not None:
        said.append(_choice(found, tolerance))
    if agreed is not None:
        said.append(_agreed(agreed))
    if found.left_out:
        numbers = ", ".join(map(str, found.left_out))
        said.append(f"The recorded actions never change in dimension {numbers}, which is left out.")
    conditions, distance = found.conditions, found.against_recorded
    same = conditions.get("recorded_weights") in (None, found.weights)
    if not same:
        said.append(
            "The episodes were recorded by a policy with other weights, so they are not where this one would go."
        )
    elif distance is not None and distance > _REPRODUCED:
        said.append(
            f"The unpruned policy's actions are up to {distance:.3g} from those that were recorded with the same "
            "weights: another device, precision or version computed them."
        )
    unpruned = [arm.title for arm in found.arms if arm.kind == "method" and not arm.pruned_steps]
    if unpruned:
        said.append(
            f"{', '.join(unpruned)}: no control step was pruned, so nothing moved: the recorded episodes end before "
            "the history is full, or all tokens are kept."
        )
    return said


def _agreed(agreed: Agreement) -> str:
    if agreed.correlation is None:
        return f"There is no rank correlation with the loss in closed loop: {agreed.why}."
    told = (
        "Spearman's rank correlation of how far an arm moves the action with its loss in closed loop is "
        f"{_with_interval(agreed.correlation)} over all {len(agreed.arms)} arms of {agreed.methods} methods, in which "
        "a smaller keep moves and loses more; "
    )
    if agreed.within is None:
        told += f"within one keep and fate it is unknown, as none has {FEWEST_PAIRS} arms that differ. "
    else:
        count = len(agreed.settings)
        told += f"within one keep and fate it is {_with_interval(agreed.within)}, the mean over {count} of these. "
    if agreed.correlation.low is None:
        return told + f"An interval needs {FEWEST_CLUSTERS} methods."
    return told + "Intervals: 95 %, bootstrap over methods."


def _with_interval(value: Estimate) -> str:
    return f"{value.value:.2f}" + ("" if value.low is None else f" ({value.low:.2f} to {value.high:.2f})")


def _choice(found: Calibration, tolerance: float) -> str:
    bounds, own = found.bounds(), found.baseline.p50_ms
    if not bounds:
        needed = f"a choice needs {FEWEST_EPISODES} episodes with pruned steps"
        return f"No setting is chosen: {needed}, and no setting has as many."
    fit = [(arm, bound) for arm, bound in bounds if bound <= tolerance]
    compared = "the one setting" if len(bounds) == 1 else f"{len(bounds)} settings compared"
    if not fit:
        nearest, bound = min(bounds, key=lambda one: one[1])
        told = f"the nearest is {nearest.title}, whose upper bound is {bound:.3f}"
        return f"Of {compared}, none is within {tolerance:g}: {told}."
    best, bound = fit[0]
    within = f"{len(fit)} {'is' if len(fit) == 1 else 'are'} within {tolerance:g}"
    told = f"{best.title} ({best.p50_ms:.1f} ms, unpruned {own:.1f} ms; upper bound {bound:.3f})"
    if best.p50_ms >= own:
        return f"Of {compared}, {within}, but none was faster than unpruned: {told} comes nearest."
    return f"Of {compared}, {within}, and the fastest is {told}. Confirm it on other episodes."


def _extras(
    found: Calibration, tolerance: float | None, agreed: Agreement | None, against: Sequence[Path]
) -> dict[str, Any]:
    fit = [] if tolerance is None else found.within(tolerance)
    return {
        "tolerance": tolerance,
        "within_tolerance": [arm.key for arm in fit],
        "agreement": None if agreed is None else dataclasses.asdict(agreed),
        "against": [str(folder) for folder in against],
        "verdict": sentences(found, tolerance, agreed),
    }
