"""The figures as text: one table for the terminal, one row an arm for Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from vla_pruner import markdown
from vla_pruner.benching.report import ArmResult, BenchReport
from vla_pruner.terminal import add_column, add_row, simple_table
from vla_pruner.wording import counted, ordinal

_NONE = "-"
_GAP = 2
"""Characters between two columns in the terminal."""


def rows(report: BenchReport) -> list[tuple[str, list[str]]]:
    """Return (label, one cell an arm) from top to bottom; a row that belongs to the one above is indented."""
    base = report.baseline
    arms = report.arms

    def stage(title: str, name: str) -> tuple[str, list[str]]:
        return f"  {title}", [f"{arm.stages[name]:.2f}" for arm in arms]

    after = [stage(report.acting, "decode")] if report.acting and not report.one_graph else []
    cycles = []
    if any(arm.refresh for arm in arms):
        cycles = [
            ("ms over a cycle", [f"{arm.refresh.amortised:.2f}" if arm.refresh else _NONE for arm in arms]),
            ("  speed", [f"{arm.refresh.speed:.2f}x" if arm.refresh else _NONE for arm in arms]),
        ]
    compiling = []
    if report.backend is not None:
        compiling = [
            ("graphs", [f"{arm.compiling.graphs}" if arm.compiling else _NONE for arm in arms]),
            ("  s to compile", [f"{arm.compiling.seconds:.1f}" if arm.compiling else _NONE for arm in arms]),
        ]
    return [
        ("visual tokens", [f"{arm.kept}" for arm in arms]),
        ("ms a step, p50", [f"{arm.milliseconds['p50']:.2f}" for arm in arms]),
        ("  p90", [f"{arm.milliseconds['p90']:.2f}" for arm in arms]),
        ("  p99", [f"{arm.milliseconds['p99']:.2f}" for arm in arms]),
        ("robots/s", [f"{arm.robots_per_second:.4g}" for arm in arms]),
        ("speed", [_speed(arm) for arm in arms]),
        ("  95 % interval", [_interval(arm) for arm in arms]),
        ("  at most (Amdahl)", [_NONE if arm.ceiling is None else f"{arm.ceiling:.2f}x" for arm in arms]),
        *cycles,
        ("ms by stage", ["" for _ in arms]),
        stage("vision", "vision"),
        stage(_prefill(report), "prefill"),
        stage("pruning" if report.backend is None else "pruning, outside of graphs", "pruning"),
        *after,
        stage("other", "other"),
        ("GFLOPs counted", [f"{sum(arm.flops.counted.values()) / 1e9:.4g}" for arm in arms]),
        ("  of unpruned", [f"{100 * _flops(arm) / _flops(base):.0f} %" for arm in arms]),
        ("  by formula", [f"{sum(arm.flops.formula.values()) / 1e9:.4g}" for arm in arms]),
        ("GB moved", [f"{sum(arm.bytes_moved.values()) / 1e9:.3g}" for arm in arms]),
        ("roofline ms", [f"{sum(arm.roofline.values()):.2f}" for arm in arms]),
        ("  reached", [f"{100 * arm.reached:.0f} %" for arm in arms]),
        ("memory, GB", [_memory(arm) for arm in arms]),
        *compiling,
    ]


def to_rich(report: BenchReport, width: int) -> list[Table]:
    """For a terminal of `width` columns: one column an arm, in as many tables as it takes without breaking a word."""
    lines = rows(report)
    columns = zip(*(cells for _, cells in lines), strict=True)
    words = [[*arm.name.split(), *" ".join(cells).split()] for arm, cells in zip(report.arms, columns, strict=True)]
    widths = [max(map(len, each)) for each in words]
    titles = max(len(title) for title, _ in lines)
    tables = []
    for part in _parts(widths, width - titles - _GAP):
        table = simple_table(None)
        add_column(table, "", right=False, no_wrap=True)
        for i in part:
            add_column(table, report.arms[i].name.replace(" ", "\n", 1), right=True, min_width=widths[i])
        for title, cells in lines:
            add_row(table, (title, *(cells[i] for i in part)))
        tables.append(table)
    return tables


def _parts(widths: list[int], width: int) -> list[range]:
    """Return which columns stand in one table, so that none is wider than `width`; one column at least is in each."""
    parts, first = [], 0
    for end in range(1, len(widths) + 1):
        if end == len(widths) or sum(widths[first : end + 1]) + _GAP * (end + 1 - first) > width:
            parts.append(range(first, end))
            first = end
    return parts


def to_markdown(report: BenchReport) -> str:
    """One row an arm, with a head."""
    titles = (
        "model", "arm", "tokens", "ms p50", "p90", "p99", "speed (95 %)", "at most",
        " / ".join(("vision", _prefill(report), "pruning", *_after(report), "other")) + ", ms",
        "GFLOPs", "GB moved", "roofline ms", "reached",
    )  # fmt: skip
    lines = []
    for arm in report.arms:
        figures = arm.milliseconds
        speed = _speed(arm) + ("" if arm.speed is None or arm.speed.low is None else f" ({_interval(arm)})")
        speed += f", {arm.refresh.speed:.2f}x over a cycle" if arm.refresh else ""
        shown = ("vision", "prefill", "pruning", *(("decode",) if _after(report) else ()), "other")
        stages = " / ".join(f"{arm.stages[name]:.2f}" for name in shown)
        cells = (
            report.settings["model"],
            arm.name,
            f"{arm.kept}",
            f"{figures['p50']:.2f}",
            f"{figures['p90']:.2f}",
            f"{figures['p99']:.2f}",
            speed,
            _NONE if arm.ceiling is None else f"{arm.ceiling:.2f}x",
            stages,
            f"{_flops(arm) / 1e9:.4g}",
            f"{sum(arm.bytes_moved.values()) / 1e9:.3g}",
            f"{sum(arm.roofline.values()):.2f}",
            f"{100 * arm.reached:.0f} %",
        )
        lines.append(cells)
    return markdown.table(titles, lines) + "\n"


def notes(report: BenchReport) -> Iterator[str]:
    """Yield the notes below the table."""
    found, peaks = report.conditions, report.peaks
    threads = (
        f", {counted(found['threads'], 'thread')}" if found["device"] == "cpu" else f", driver {found.get('driver')}"
    )
    rounds = counted(len(report.order), "round")
    yield (
        f"{found['device_name']}{threads}, {found['dtype']}, {found['attention']}, torch "
        f"{found['versions']['torch']}: {peaks.flops / 1e12:.3g} TFLOP/s and {peaks.bandwidth / 1e9:.3g} GB/s "
        f"measured. {rounds} of {len(report.arms)} arms, {found['steps_a_turn']} steps each."
    )
    if report.backend is not None:
        inside = [f'"{stage}"' for stage in (_prefill(report), *_after(report) * bool(report.acting))]
        yield (
            f"Every arm is compiled with {report.backend}. What pruning does inside of a graph cannot be timed apart: "
            f'it is part of {" and ".join(inside)}; "pruning" is what a session does around the graphs. FLOPs are '
            "counted on the same arms without compiling, and how much of a step pruning can reach at most is taken "
            "from FLOPs."
        )
    if report.prepare_ms is not None:
        yield f"Images and words to inputs: {report.prepare_ms:.2f} ms on the host, the same in every arm and in none."
    for arm in report.arms:
        if arm.refresh:
            yield (
                f"{arm.name} runs every {ordinal(arm.refresh.every)} step unpruned "
                f"({arm.refresh.milliseconds:.2f} ms): {arm.refresh.amortised:.2f} ms a step over the whole cycle, "
                f"{arm.refresh.speed:.2f}x."
            )
        if arm.encoder is not None:
            yield (
                f"{arm.name}: every step that is timed reuses patches in the vision encoder. A step that encodes all "
                "patches, as the first of an episode and, by default, every 8th do, takes as long there as the "
                "unpruned one."
            )
        if arm.why:
            yield f"{arm.name}: {arm.why}"


def _prefill(report: BenchReport) -> str:
    return f"prefill and {report.acting}" if report.one_graph else "prefill"


def _after(report: BenchReport) -> tuple[str, ...]:
    """Return the stages after the prompt's, by their titles."""
    return () if report.one_graph else (report.acting or "decode",)


def _flops(arm: ArmResult) -> float:
    return sum(arm.flops.counted.values())


def _speed(arm: ArmResult) -> str:
    return _NONE if arm.speed is None else f"{arm.speed.value:.2f}x"


def _interval(arm: ArmResult) -> str:
    if arm.speed is None or arm.speed.low is None or arm.speed.high is None:
        return _NONE
    return f"{arm.speed.low:.2f} to {arm.speed.high:.2f}"


def _memory(arm: ArmResult) -> str:
    size = arm.memory["bytes"]
    return _NONE if size is None else f"{size / 1e9:.2f}"
