"""The demo's report: table, verdict, where the time goes, and a player that shows what was pruned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from math import isqrt
from pathlib import Path
from typing import Any

from vla_pruner.demo.arms import BASELINE
from vla_pruner.demo.episodes import Episode
from vla_pruner.demo.summary import Summary
from vla_pruner.demo.table import footnotes, heading, rows
from vla_pruner.report.page import fill, jpeg, script_json, source
from vla_pruner.timing import STAGES
from vla_pruner.wording import counted

MOST_FILMS = 4
"""Tasks shown in the player; more would make the file larger than a mail takes."""


def write_report(
    path: Path,
    summary: Summary,
    finished: Sequence[Mapping[str, Episode]],
    verdict: Sequence[str],
    conditions: Mapping[str, Any],
    notes: Mapping[str, Any],
) -> None:
    """Writes one HTML file that needs nothing else: no requests, no fonts, no scripts from elsewhere."""
    text = fill(
        "demo.html",
        style=source("base.css"),
        subtitle=escape(_subtitle(summary, conditions, notes)),
        verdict="\n".join(f"<li>{escape(sentence)}</li>" for sentence in verdict),
        table=_table(summary),
        footnotes="\n".join(f'<p class="soft">{escape(note)}</p>' for note in footnotes(summary)),
        bars=_bars(summary),
        image_size=conditions.get("image_size", "its own"),
        episodes=_episodes(summary, finished),
        conditions=escape(json.dumps({**conditions, **notes}, indent=2)),
        data=_data(summary, finished),
    )
    path.write_text(text, encoding="utf-8")


def _subtitle(summary: Summary, conditions: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    versions = conditions.get("versions", {})
    parts = [
        f"{counted(summary.units, 'paired episode')} an arm, {counted(len(summary.baseline.by_task), 'task')}",
        f"{conditions.get('processor')}, {counted(conditions.get('threads', 0), 'thread')}",
        f"torch {versions.get('torch')}, transformers {versions.get('transformers')}",
    ]
    if notes.get("interrupted"):
        parts.append("interrupted before the end")
    if notes.get("machine_was_busy"):
        parts.append("other programs kept the machine busy: do not quote these milliseconds")
    return " · ".join(parts)


def _table(summary: Summary) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in ("", *heading(summary)))
    body = []
    for name, cells in rows(summary):
        kind = "sub" if name.startswith("  ") else "main"
        columns = "".join(f"<td>{escape(cell)}</td>" for cell in (name.strip(), *cells))
        body.append(f'<tr class="{kind}">{columns}</tr>')
    return f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>"


def _bars(summary: Summary) -> str:
    shown = [arm for arm in summary.arms if arm.pruned_steps.steps]
    longest = max(sum(arm.pruned_steps.stages.values()) for arm in shown)
    lines = []
    for arm in shown:
        stages = arm.pruned_steps.stages
        pieces = "".join(
            f'<i class="{stage}" style="width:{100 * max(0.0, stages[stage]) / longest:.2f}%" '
            f'title="{stage}: {stages[stage]:.2f} ms"></i>'
            for stage in STAGES
        )
        lines.append(
            f'<span>{escape(arm.arm.title)}</span><div class="bar">{pieces}</div>'
            f"<span>{arm.pruned_steps.p50:.1f} ms</span>"
        )
    return "\n".join(lines)


def _episodes(summary: Summary, finished: Sequence[Mapping[str, Episode]]) -> str:
    tasks = list(summary.baseline.by_task)
    head = "".join(f"<th>{escape(title)}</th>" for title in ("task", *heading(summary)))
    lines = []
    for task in tasks:
        cells = [f"<td>{escape(task)}</td>"]
        for arm in summary.arms:
            marks = [unit[arm.arm.key].success for unit in finished if unit[arm.arm.key].unit.task == task]
            dots = "".join('<span class="yes">●</span>' if mark else '<span class="no">○</span>' for mark in marks)
            cells.append(f'<td class="dots">{dots}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>"


def _data(summary: Summary, finished: Sequence[Mapping[str, Episode]]) -> str:
    """What the player needs, as JSON that is safe inside of a script element."""
    units = []
    frame_size = 1
    for unit in _films(finished):
        first = next(iter(unit.values())).unit
        arms = []
        for column in summary.arms:
            episode = unit[column.arm.key]
            assert episode.trace is not None
            frame_size = episode.trace.frames[0].shape[0]
            arms.append(
                {
                    "title": column.arm.title,
                    "pruned": None if column.arm.method is None else column.arm.method.pruned,
                    "success": episode.success,
                    "frames": [jpeg(frame) for frame in episode.trace.frames],
                    "kept": episode.trace.kept,
                }
            )
        units.append({"task": first.task, "seed": first.seed, "arms": arms})
    data = {"grid": isqrt(summary.baseline.cost.visual), "frame_size": frame_size, "units": units}
    return script_json(data)


def _films(finished: Sequence[Mapping[str, Episode]]) -> list[Mapping[str, Episode]]:
    """Recorded units, those first on which the arms disagree, and of these those that the unpruned policy solved."""
    recorded = [unit for unit in finished if all(episode.trace is not None for episode in unit.values())]

    def dullness(unit: Mapping[str, Episode]) -> tuple[bool, bool]:
        return len({episode.success for episode in unit.values()}) == 1, not unit[BASELINE].success

    return sorted(recorded, key=dullness)[:MOST_FILMS]
