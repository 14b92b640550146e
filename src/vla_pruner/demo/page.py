"""The demo's report: one sentence, one moving picture and one short table, then every detail."""

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
from vla_pruner.demo.table import HEAD, Row, actions, footnotes, heading, labels_of, rows, stages_of
from vla_pruner.demo.verdict import headline
from vla_pruner.outputs import replace_file
from vla_pruner.report.page import fill, jpeg, script_json, source
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
    """Write one self-contained HTML file: no requests, no fonts, no scripts from elsewhere."""
    text = fill(
        "demo.html",
        style=source("base.css"),
        script=source("demo.js"),
        sentence=escape(headline(summary)),
        cameras=escape(_cameras(conditions)),
        film_width=12.5 * len(conditions.get("cameras") or (1,)),
        head=_short_table(summary),
        actions=escape(actions(summary)),
        subtitle=escape(_subtitle(summary, conditions, notes)),
        verdict="\n".join(f"<li>{escape(sentence)}</li>" for sentence in verdict if sentence != headline(summary)),
        table=_table(summary, rows(summary), "medians of milliseconds; stages of a pruned step"),
        footnotes="\n".join(f'<p class="soft">{escape(note)}</p>' for note in footnotes(summary)),
        bars=_bars(summary),
        key=_key(summary),
        image_size=conditions.get("image_size", "its own"),
        episodes=_episodes(summary, finished),
        conditions=escape(json.dumps({**conditions, **notes}, indent=2)),
        data=_data(summary, finished, max(1, len(conditions.get("cameras") or ()))),
    )
    replace_file(path, text.encode())


def _subtitle(summary: Summary, conditions: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    versions = conditions.get("versions", {})
    parts = [
        f"{counted(summary.units, 'paired episode')} an arm, {counted(len(summary.baseline.by_task), 'task')}",
        f"{conditions.get('processor')}, {counted(conditions.get('threads', 0), 'thread')}",
        f"torch {versions.get('torch')}, transformers {versions.get('transformers')}",
    ]
    if summary.compiling is not None:
        parts.append(f"every arm compiled ({summary.compiling.backend})")
    if notes.get("interrupted"):
        parts.append("interrupted before the end")
    if notes.get("machine_was_busy"):
        parts.append("other programs kept the machine busy: do not quote these milliseconds")
    return " · ".join(parts)


def _cameras(conditions: Mapping[str, Any]) -> str:
    cameras = conditions.get("cameras") or ()
    return f"Cameras, from the left: {', '.join(cameras)}." if len(cameras) > 1 else ""


def _head(summary: Summary, first: str) -> str:
    """Return the head of a table with one column an arm."""
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in heading(summary))
    return f'<thead><tr><th scope="col">{first}</th>{titles}</tr></thead>'


def _short_table(summary: Summary) -> str:
    """Return success and speed with one row an arm, so that it fits a telephone."""
    (_, success), (_, interval), (_, pace), (factor, speed) = rows(summary)[:HEAD]
    titles = ("arm", "success (95 % interval)", "ms a pruned step", factor.strip())
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    lines = [
        f'<tr><th scope="row">{escape(title)}</th><td>{escape(rate)} <span class="soft">({escape(between)})</span></td>'
        f"<td>{escape(milliseconds)}</td><td>{escape(times)}</td></tr>"
        for title, rate, between, milliseconds, times in zip(
            heading(summary), success, interval, pace, speed, strict=True
        )
    ]
    caption = f"<caption>{counted(summary.units, 'paired episode')} an arm</caption>"
    return f"{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>"


def _table(summary: Summary, shown: Sequence[Row], caption: str) -> str:
    body = []
    for name, cells in shown:
        kind = "sub" if name.startswith("  ") else "main"
        columns = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body.append(f'<tr class="{kind}"><th scope="row">{escape(name.strip())}</th>{columns}</tr>')
    head = _head(summary, '<span class="soft">arm</span>')
    return f"<caption>{escape(caption)}</caption>{head}\n<tbody>\n" + "\n".join(body) + "\n</tbody>"


def _bars(summary: Summary) -> str:
    words, used = labels_of(summary), stages_of(summary)
    shown = [arm for arm in summary.arms if arm.pruned_steps.steps]
    longest = max(sum(arm.pruned_steps.stages.values()) for arm in shown)
    lines = []
    for arm in shown:
        stages = arm.pruned_steps.stages
        pieces = "".join(
            f'<i class="{stage}" style="width:{100 * max(0.0, stages[stage]) / longest:.2f}%" '
            f'title="{words[stage]}: {stages[stage]:.2f} ms"></i>'
            for stage in used
        )
        told = ", ".join(f"{words[stage]} {stages[stage]:.1f} ms" for stage in used)
        lines.append(
            f"<span>{escape(arm.arm.title)}</span>"
            f'<div class="bar" role="img" aria-label="{escape(f"{arm.arm.title}: {told}")}">{pieces}</div>'
            f"<span>{arm.pruned_steps.p50:.1f} ms</span>"
        )
    return "\n".join(lines)


def _key(summary: Summary) -> str:
    words = labels_of(summary)
    return "".join(f'<span><b class="{stage}"></b>{escape(words[stage])}</span>' for stage in stages_of(summary))


def _episodes(summary: Summary, finished: Sequence[Mapping[str, Episode]]) -> str:
    tasks = list(summary.baseline.by_task)
    lines = []
    for task in tasks:
        cells = [f'<th scope="row">{escape(task)}</th>']
        for arm in summary.arms:
            marks = [unit[arm.arm.key].success for unit in finished if unit[arm.arm.key].unit.task == task]
            dots = "".join('<span class="yes">●</span>' if mark else '<span class="no">○</span>' for mark in marks)
            told = f"{sum(marks)} of {len(marks)} solved"
            cells.append(f'<td class="dots"><span role="img" aria-label="{told}">{dots}</span></td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return _head(summary, "task") + "\n<tbody>\n" + "\n".join(lines) + "\n</tbody>"


def _data(summary: Summary, finished: Sequence[Mapping[str, Episode]], cameras: int) -> str:
    """Return the player's data as JSON that is safe inside of a script element."""
    units = []
    frame_size = 1
    recommended = summary.recommended
    hero = 0 if recommended is None else summary.arms.index(recommended)
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
    grid = isqrt(summary.baseline.cost.visual // cameras)
    data = {"grid": grid, "cameras": cameras, "frame_size": frame_size, "hero": hero, "units": units}
    return script_json(data)


def _films(finished: Sequence[Mapping[str, Episode]]) -> list[Mapping[str, Episode]]:
    """Return the recorded units, those first on which the arms disagree, and of these those that the unpruned policy
    solved.
    """
    recorded = [unit for unit in finished if all(episode.trace is not None for episode in unit.values())]

    def dullness(unit: Mapping[str, Episode]) -> tuple[bool, bool]:
        return len({episode.success for episode in unit.values()}) == 1, not unit[BASELINE].success

    return sorted(recorded, key=dullness)[:MOST_FILMS]
