"""The episodes that the report plays: the choice of them, and their images, kept tokens and score maps for the
player.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from vla_pruner.evaluation import EvaluationError, Unit
from vla_pruner.evaluation.traces import Trace, read_trace, trace_path
from vla_pruner.fate import Fate
from vla_pruner.report.overlap import overlap, tokens_of, top_tokens
from vla_pruner.report.page import jpeg
from vla_pruner.report.results import Results

MOST_FILMS = 4
MOST_ARMS = 3
"""The number of pruned arms in each film if they were not named."""
MOST_BYTES = 12_000_000
"""The size of all images and score maps together, as they lie in the page."""

_BYTES_A_TOKEN = 3.2
"""The size of a control step for each token: two maps of a byte and three masks of a bit, in base64."""
_SHARE_UNPRUNED = 0.25
"""The share of tokens that is k for the maps of an arm that keeps all."""
_QUALITIES = ((224, 85), (192, 75), (144, 70))
"""(pixels of the longer side, JPEG quality), tried in turn until all images fit."""


@dataclass(frozen=True)
class Film:
    """One start, by the unpruned policy and some pruned arms."""

    unit: Unit
    arms: tuple[str, ...]


def choose_films(results: Results, traced: Iterable[tuple[Unit, str]], asked: Sequence[str] = ()) -> list[Film]:
    """Choose the traced episodes that are played.

    Args:
        asked: "TASK", "TASK:STATE" or "TASK:STATE:ARM" each, a task by name or number; empty: starts that the unpruned
            policy solved and a pruned arm did not come first, and every task before one comes again.

    Raises:
        EvaluationError: none of the traced episodes was asked for.
    """
    arms_of: dict[Unit, set[str]] = {}
    for unit, arm in traced:
        if arm in results.by_key:
            arms_of.setdefault(unit, set()).add(arm)
    if asked:
        return [film for text in dict.fromkeys(asked) for film in _asked(results, arms_of, text)]
    base = results.summary.baseline.key
    order = [arm.key for group in results.groups.values() for arm in group]

    def solved(unit: Unit, arm: str) -> bool:
        record = results.run.records.get((unit, arm))
        return record is not None and bool(record.success)

    def lost(unit: Unit) -> list[str]:
        return [arm for arm in order if arm in arms_of[unit] and solved(unit, base) and not solved(unit, arm)]

    seen: dict[tuple[str, int], int] = {}
    ranked = []
    for unit in sorted(arms_of, key=lambda unit: (-min(1, len(lost(unit))), unit)):
        turn = seen.setdefault((unit.suite, unit.task_id), 0)
        seen[unit.suite, unit.task_id] += 1
        ranked.append((turn, -min(1, len(lost(unit))), unit))
    films = []
    for _, _, unit in sorted(ranked)[:MOST_FILMS]:
        failed = lost(unit)
        others = [arm for arm in order if arm in arms_of[unit] and arm not in failed]
        head = failed[: MOST_ARMS - 1] if others else failed[:MOST_ARMS]
        films.append(Film(unit, _with_base(base, arms_of[unit], [*head, *others][:MOST_ARMS])))
    return films


def _with_base(base: str, traced: set[str], arms: Sequence[str]) -> tuple[str, ...]:
    return ((base,) if base in traced else ()) + tuple(arm for arm in arms if arm != base)


def _asked(results: Results, arms_of: Mapping[Unit, set[str]], text: str) -> list[Film]:
    task, _, rest = text.partition(":")
    state, _, arm = rest.partition(":")
    units = [
        unit
        for unit in sorted(arms_of)
        if task in (unit.task, str(unit.task_id)) and (not state or state == str(unit.initial_state))
    ]
    wanted = [key for key, one in results.by_key.items() if arm in (key, one.title)] if arm else list(results.by_key)
    base = results.summary.baseline.key
    found = []
    for unit in units:
        arms = [key for key in wanted if key in arms_of[unit]]
        if arms:
            methods = [key for key in arms if arm or key in results.settings]
            found.append(Film(unit, _with_base(base, arms_of[unit], methods if arm else methods[: 2 * MOST_ARMS])))
    if not found:
        there = ", ".join(f"{unit.task_id}:{unit.initial_state}" for unit in sorted(arms_of)[:12])
        raise EvaluationError(
            f"--episodes names {text!r}, and no such episode was traced; give TASK, TASK:STATE or TASK:STATE:ARM of "
            f"those that were, such as {there}."
        )
    return found


@dataclass(frozen=True)
class Films:
    """The player's data.

    Attributes:
        data: plain JSON values.
        note: how images were made smaller, if they were.
    """

    data: list[dict[str, Any]]
    note: str


def read_films(
    results: Results, paths: Mapping[tuple[Unit, str], Path], films: Sequence[Film], damaged: list[str]
) -> Films:
    """Read the traces of films.

    Args:
        damaged: takes a sentence on each trace that cannot be read; it is left out.

    Raises:
        ImagesUnavailable: Pillow is not installed.
    """
    traces: dict[tuple[Unit, str], Trace] = {}
    run = results.run.manifest.run
    for film in films:
        for arm in film.arms:
            try:
                traces[film.unit, arm] = read_trace(paths[film.unit, arm], (film.unit, arm), run)
            except EvaluationError as error:
                damaged.append(str(error))
    (largest, quality), stride = _fitting(list(traces.values()))
    data = []
    for film in films:
        there = [traces[film.unit, arm] for arm in film.arms if (film.unit, arm) in traces]
        if not there:
            continue
        first = there[0]
        data.append(
            {
                "title": f"{film.unit.task}, initial state {film.unit.initial_state}",
                "instruction": first.instructions[0] if first.instructions else "",
                "arms": [_arm(results, trace, largest, quality, stride) for trace in there],
            }
        )
    note = f"Images are shown with at most {largest} pixels a side"
    note += f", and one in {stride} control steps, so that the page stays small." if stride > 1 else "."
    return Films(data, note)


def _fitting(traces: Sequence[Trace]) -> tuple[tuple[int, int], int]:
    """Return size and quality of the images, and the interval of the control steps shown, so that all fit."""
    stacks = [stack for trace in traces for stack in trace.images.values() if len(stack)]
    samples = [stack[len(stack) // 2] for stack in stacks[:: max(1, len(stacks) // 8)]]

    def taken(image: float, stride: int) -> float:
        of_steps = ((len(t), len(t.images) * image + _BYTES_A_TOKEN * sum(t.camera_tokens.values())) for t in traces)
        return sum(ceil(steps / stride) * size for steps, size in of_steps)

    image = 0.0
    for setting in _QUALITIES:
        image = sum(len(jpeg(sample, *setting)) for sample in samples) / max(1, len(samples))
        if taken(image, 1) <= MOST_BYTES:
            return setting, 1
    longest = max(len(trace) for trace in traces)
    return _QUALITIES[-1], next((stride for stride in range(2, longest) if taken(image, stride) <= MOST_BYTES), longest)


def _arm(results: Results, trace: Trace, largest: int, quality: int, stride: int) -> dict[str, Any]:
    arm = results.by_key[trace.arm]
    record = results.run.records.get(trace.key)
    steps = range(0, len(trace), stride)
    total = sum(trace.camera_tokens.values())
    fate = results.options[arm.key].pruned if arm.key in results.options else ""
    content: dict[str, Any] = {
        "title": arm.title,
        "fate": fate,
        "success": trace.success,
        "actions": None if record is None else record.steps,
        "steps": list(steps),
        "total": total,
        "cameras": [
            {
                "name": name,
                "grid": _grid(trace, name),
                "frames": [jpeg(images[step], largest, quality) for step in steps],
            }
            for name, images in trace.images.items()
        ],
        "kept": None if trace.kept is None else [_bits(trace.kept[step]) for step in steps],
        "pruned": [bool(trace.pruned[step]) for step in steps],
        "maps": None,
    }
    if trace.scores and total:
        content["maps"] = _maps(trace, _fewest_kept(trace, total), fate, steps)
    return content


def _maps(trace: Trace, k: int, fate: str, steps: range) -> dict[str, Any]:
    """Return the score maps, and the places of their k highest tokens.

    No action token reads a dropped token, so in an arm that drops, the action map's highest are among the kept tokens.
    """
    semantic, action = trace.scores.get("semantic"), trace.scores.get("action")
    nothing: list[Any] = [None] * len(steps)
    found: dict[str, Any] = {
        "k": k,
        "agree": nothing,
        "before": nothing,
        "chance": k / sum(trace.camera_tokens.values()),
    }
    for name, scores in (("semantic", semantic), ("action", action)):
        found[name] = nothing if scores is None else [_bytes(scores[step]) for step in steps]
        found[f"top_{name}"] = nothing
    if semantic is not None:
        found["top_semantic"] = [_top(semantic[step], k) for step in steps]
    if action is not None:
        whole = action
        if trace.kept is not None and fate == Fate.DROP:
            whole = np.where(trace.pruned[:, None] & ~trace.kept & ~np.isnan(action), -1.0, action)
        found["top_action"] = [_top(whole[step], k) for step in steps]
        if semantic is not None:
            of = overlap(semantic, whole, k)
            found["agree"] = [_known(of.maps[step]) for step in steps]
            found["before"] = [_known(of.before[step]) for step in steps]
    return found


def _fewest_kept(trace: Trace, total: int) -> int:
    """Return the number of tokens kept in the step that prunes most; if no step prunes, as many as `_SHARE_UNPRUNED`
    says.
    """
    if trace.kept is None or not trace.pruned.any():
        return tokens_of(_SHARE_UNPRUNED, total)
    return max(1, int(trace.kept[trace.pruned].sum(1).min()))


def _grid(trace: Trace, camera: str) -> list[int] | None:
    grid = trace.grids.get(camera)
    return None if grid is None else [grid.first, grid.rows, grid.columns]


def _known(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


def _bits(mask: np.ndarray) -> str:
    """Return (M,) bool as base64, eight ids a byte, the smallest id in the lowest bit."""
    return base64.b64encode(np.packbits(mask, bitorder="little").tobytes()).decode("ascii")


def _bytes(scores: np.ndarray) -> str | None:
    """Return (M,) scores as base64 of bytes: the square root of the share of the highest one; None if there are
    none.
    """
    if np.isnan(scores).any():
        return None
    shares = np.sqrt(np.clip(scores, 0, None) / max(float(scores.max()), 1e-30))
    return base64.b64encode(np.round(255 * shares).astype(np.uint8).tobytes()).decode("ascii")


def _top(scores: np.ndarray, k: int) -> str | None:
    if np.isnan(scores).any():
        return None
    return _bits(top_tokens(scores[None], k)[0])


def find_traces(results: Results) -> dict[tuple[Unit, str], Path]:
    """Return the traces of the records that count, in the order of their keys; no file is opened."""
    found = {}
    for key, record in sorted(results.run.records.items(), key=lambda item: item[0]):
        path = trace_path(results.folder, *key)
        if not record.crashed and path.exists():
            found[key] = path
    return found
