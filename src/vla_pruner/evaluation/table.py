"""The table of an evaluation, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

from rich.table import Table

from vla_pruner import markdown
from vla_pruner.evaluation.summary import ArmSummary, Summary
from vla_pruner.evaluation.verdict import points
from vla_pruner.statistics import NEWCOMBE, TANGO
from vla_pruner.terminal import add_column, add_row, simple_table

OUTCOMES = ("arm", "solved", "% (95 %)", "difference", "+/-", "p", "verdict")
COSTS = ("arm", "steps", "difference", "p50 ms", "p99 ms", "tokens", "pruned", "crashed")

_INTERVALS = {
    NEWCOMBE: "Newcombe's interval for pairs, tasks as strata",
    TANGO: "Tango's score interval for pairs, all tasks as one (verdicts go by Newcombe's, tasks as strata)",
}


def notes(summary: Summary) -> tuple[str, ...]:
    """Return what a reader of the tables must know."""
    return (
        "%: rate of success with Wilson's interval. difference: percentage points to unpruned on the same episodes, "
        f"with {_INTERVALS[summary.interval]}. +/-: episodes that only this arm / only the unpruned policy "
        "solved. p: exact McNemar test, by Holm over the methods (controls: as it is).",
        "steps: actions within which half of the episodes were solved; difference: of the mean, a failure counting as "
        "the longest episode. ms: of one control step of the policy, simulation excluded, on this machine as busy as "
        "it was. pruned: share of the control steps.",
    )


def outcome_rows(summary: Summary) -> list[tuple[str, ...]]:
    """One row an arm, of `OUTCOMES`."""
    return [_outcome(arm) for arm in summary.arms]


def cost_rows(summary: Summary) -> list[tuple[str, ...]]:
    """One row an arm, of `COSTS`."""
    return [_cost(arm) for arm in summary.arms]


def suite_table(summary: Summary) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return heads and rows: each arm's success by suite; no rows if there is but one."""
    suites = tuple(dict.fromkeys(name.partition("/")[0] for arm in summary.arms for name in arm.by_task))
    if len(suites) < 2:
        return ("arm", *suites), []
    rows = []
    for arm in summary.arms:
        cells = []
        for suite in suites:
            counts = [count for name, count in arm.by_task.items() if name.partition("/")[0] == suite]
            solved, total = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
            cells.append(f"{solved}/{total}, {_percent(solved / total)} %" if total else "-")
        rows.append((arm.title, *cells))
    return ("arm", *suites), rows


def _outcome(arm: ArmSummary) -> tuple[str, ...]:
    rate, difference = arm.success, arm.difference
    solved = f"{rate.successes}/{rate.total}"
    interval = f"{_percent(rate.value)}\n{_percent(rate.low)} to {_percent(rate.high)}" if rate.total else "-"
    if difference is None or not difference.pairs:
        return arm.title, solved, interval, "-", "-", "-", ""
    p = difference.p_value if arm.p_adjusted is None else arm.p_adjusted
    return (
        arm.title,
        solved,
        interval,
        f"{points(difference.value)}\n{points(difference.low)} to {points(difference.high)}",
        f"{difference.gained}/{difference.lost}",
        "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0"),
        arm.verdict.word if arm.verdict else "",
    )


def _cost(arm: ArmSummary) -> tuple[str, ...]:
    slower = arm.slower
    kept = "-".join(map(str, dict.fromkeys(arm.kept)))
    tokens, pruned = (
        f"{kept or 'all'}/{arm.visual_tokens}" if arm.visual_tokens else "all",
        f"{_percent(arm.pruned_share)} %",
    )
    if not arm.success.total:  # what it keeps is known from the episodes that ended
        tokens = pruned = "-"
    return (
        arm.title,
        "-" if arm.median_steps is None else f"{arm.median_steps:.0f}",
        "-" if slower is None else f"{slower.value:+.1f}\n{slower.low:+.1f} to {slower.high:+.1f}",
        _milliseconds(arm.latency_p50_ms),
        _milliseconds(arm.latency_p99_ms),
        tokens,
        pruned,
        str(arm.crashed),
    )


def to_rich(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table, an interval under its value; if the terminal is narrow, the arms' titles break."""
    table = simple_table(title)
    for index, head in enumerate(heads):
        add_column(table, head, right=bool(index), no_wrap=bool(index), min_width=0 if index else 12)
    for row in rows:
        add_row(table, row)
    return table


def to_markdown(summary: Summary, sentences: Sequence[str]) -> str:
    """Return the tables, the notes and the sentences."""
    parts = [_markdown(OUTCOMES, outcome_rows(summary)), _markdown(COSTS, cost_rows(summary)), *notes(summary)]
    heads, rows = suite_table(summary)
    if rows:
        parts.insert(1, _markdown(heads, rows))
    return "\n\n".join([*parts, "\n".join(f"- {sentence}" for sentence in sentences)]) + "\n"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown.table(heads, [[cell.replace("\n", ", ") for cell in row] for row in rows], numbers=True)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}".removesuffix(".0")


def _milliseconds(value: float) -> str:
    return "-" if isnan(value) else f"{value:.1f}"
