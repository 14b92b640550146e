"""The one table, as rows of text; the terminal, the report and the Markdown file all show these rows."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan

from rich.table import Table

from vla_pruner import markdown
from vla_pruner.demo.summary import ArmSummary, Summary
from vla_pruner.terminal import add_column, add_row, simple_table
from vla_pruner.timing import STAGES
from vla_pruner.wording import counted

Row = tuple[str, list[str]]

HEAD = 4
"""The number of rows with the whole result: success, and milliseconds with speed."""


def labels(compiled: bool = False, one_graph: bool = False) -> dict[str, str]:
    """Return the readers' words for the stages of a control step.

    Args:
        compiled: whether the arms are compiled: choosing is then part of the prompt's graph, but for what the session
            does around it.
        one_graph: whether the actions are decoded in that graph, too.
    """
    return {
        "vision": "vision",
        "prefill": "prompt, actions" if one_graph else "prompt",
        "pruning": "choosing, outside" if compiled else "choosing",
        "decode": "actions",
        "other": "other",
    }


def labels_of(summary: Summary) -> dict[str, str]:
    """Return the words for the stages of this table."""
    compiling = summary.compiling
    return labels(compiling is not None, compiling is not None and compiling.one_graph)


def stages_of(summary: Summary) -> tuple[str, ...]:
    """Return the stages that were timed apart."""
    compiling = summary.compiling
    return tuple(stage for stage in STAGES if stage != "decode" or compiling is None or not compiling.one_graph)


def heading(summary: Summary) -> list[str]:
    """Return the titles of the columns after the first."""
    return [arm.arm.title for arm in summary.arms]


def rows(summary: Summary) -> list[Row]:
    """Return (label, one cell an arm) from top to bottom; a row that belongs to the one above is indented."""
    base, words = summary.baseline, labels_of(summary)

    def row(name: str, cell: Callable[[ArmSummary], str], baseline: str | None = None) -> Row:
        return name, [baseline if baseline and arm.is_baseline else cell(arm) for arm in summary.arms]

    def stage(name: str) -> Row:
        return row(f"  {words[name]}", lambda a: _ms(a.pruned_steps.stages[name]))

    return [
        row("success", lambda a: _percent(a.success.value)),
        row("  95 % interval", lambda a: f"{100 * a.success.low:.0f} to {100 * a.success.high:.0f}"),
        row("ms a pruned step", lambda a: _ms(a.pruned_steps.p50)),
        row("  speed, busy" if summary.busy else "  speed", lambda a: _speed(summary, a)),
        row("episodes solved", lambda a: f"{a.success.successes}/{a.success.total}"),
        row("difference", lambda a: _points(a.difference.value) if a.difference else "", "-"),
        row("  95 % interval", _difference_interval, "-"),
        row("  won / lost", lambda a: f"{a.difference.gained} / {a.difference.lost}" if a.difference else "", "-"),
        row("steps an episode", lambda a: f"{a.mean_steps:.1f}"),
        row("  of these pruned", lambda a: _percent(a.pruned_share), "-"),
        row("ms a step, all", lambda a: _ms(a.all_steps.p50)),
        row("  p99", lambda a: _ms(a.all_steps.p99)),
        row("p99, pruned", lambda a: _ms(a.pruned_steps.p99), "-"),
        *[stage(name) for name in stages_of(summary)],
        row("visual tokens", lambda a: f"{a.cost.kept}/{a.cost.visual}"),
        row("MFLOPs, pruned", lambda a: f"{a.cost.counted / 1e6:.0f}"),
        row("  of unpruned", lambda a: _percent(a.cost.counted / base.cost.counted)),
        row("  least possible", lambda a: _percent(floor_share(summary, a))),
    ]


def floor_share(summary: Summary, arm: ArmSummary) -> float:
    """Return a pruned step's FLOPs over those of an unpruned one by formula, vision included: the least the rule
    costs.
    """
    vision = summary.vision_flops
    return (vision + arm.cost.floor.total) / (vision + summary.baseline.cost.floor.total)


def footnotes(summary: Summary) -> list[str]:
    """Return the facts that a reader of the table must know."""
    return [
        *_busy(summary),
        *_compiled(summary),
        "Every arm ran the same episodes from the same initial states. Success: Wilson interval. Difference to "
        "unpruned, in percentage points: Newcombe's interval for paired proportions. Won / lost: episodes that only "
        "this arm / only the unpruned policy solved.",
        "Milliseconds are medians (p50) of act; simulation and drawing are outside of it. Those of a pruned step and "
        "of its stages are over pruned steps, and over all steps of the unpruned policy."
        + f" {actions(summary)}".rstrip(),
        "FLOPs are those of a whole step, vision included: counted while it ran; the least possible is by formula, "
        f"without choosing (vision: {summary.vision_flops / 1e6:.0f} MFLOPs, which pruning cannot touch).",
    ]


def to_rich(summary: Summary) -> Table:
    title = f"{counted(summary.units, 'paired episode')} an arm" + (", compiled" if summary.compiling else "")
    table = simple_table(title)
    add_column(table, "", right=False, no_wrap=True)
    for arm in summary.arms:
        add_column(table, arm.arm.short, right=True, no_wrap=True, min_width=11)
    for name, cells in rows(summary):
        add_row(table, (name, *cells), style="dim" if name.startswith("  ") else "bold")
    return table


def actions(summary: Summary) -> str:
    """Return why the actions take no time of their own; empty if they do."""
    if summary.baseline.all_steps.stages["decode"]:
        return ""
    if summary.compiling is not None and summary.compiling.one_graph:
        return "Prompt and actions are one graph."
    return "The action rows are part of the prompt's one pass."


def _busy(summary: Summary) -> list[str]:
    if not summary.busy:
        return []
    return [
        "Other programs kept the machine busy: milliseconds, and the speeds in brackets, are no findings. Repeat the "
        "demo when the machine is idle."
    ]


def _compiled(summary: Summary) -> list[str]:
    """Return what was compiled, and what the stages then mean."""
    compiling, words = summary.compiling, labels_of(summary)
    if compiling is None:
        return []
    before, after = compiling.unpruned_ms
    return [
        f"Every arm, the unpruned one too, is compiled with {compiling.backend}, which took "
        f"{compiling.total_seconds:.0f} s before the episodes; an unpruned step takes {before:.1f} ms uncompiled and "
        f"{after:.1f} ms compiled. What pruning does inside of a graph cannot be timed apart: it is part of "
        f'"{words["prefill"]}"; "{words["pruning"]}" is what a session does around the graphs. FLOPs were counted on '
        "the same arms without compiling."
    ]


def to_markdown(summary: Summary) -> str:
    labels = (
        (f"&nbsp;&nbsp;{name.strip()}" if name.startswith("  ") else f"**{name}**", *cells)
        for name, cells in rows(summary)
    )
    return markdown.table((None, *heading(summary)), labels, numbers=True) + "\n"


def _speed(summary: Summary, arm: ArmSummary) -> str:
    if isnan(arm.pruned_steps.p50):
        return "-"
    factor = f"{summary.baseline.all_steps.p50 / arm.pruned_steps.p50:.2f}x"
    return f"({factor})" if summary.busy else factor


def _percent(value: float) -> str:
    return "-" if isnan(value) else f"{100 * value:.0f} %"


def _points(value: float) -> str:
    return f"{round(100 * value):+d}" if round(100 * value) else "0"


def _difference_interval(arm: ArmSummary) -> str:
    return f"{_points(arm.difference.low)} to {_points(arm.difference.high)}" if arm.difference else ""


def _ms(value: float) -> str:
    return "-" if isnan(value) else f"{value:.1f}"
