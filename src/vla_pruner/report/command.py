"""`vla-pruner report`: from an evaluation's folder to one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vla_pruner.json_file import check_file, replace_file, unwritable
from vla_pruner.report.evaluation import render
from vla_pruner.report.results import read_results
from vla_pruner.report.traced import look
from vla_pruner.report.verdicts import headline
from vla_pruner.statistics import NEWCOMBE
from vla_pruner.terminal import say
from vla_pruner.wording import counted

REPORT = "report.html"

_NAMED = 3
"""Damaged traces that the terminal names; the report names all."""


def run_report(
    folder: Path, out: Path | None, episodes: Sequence[str], console: Console, interval: str = NEWCOMBE
) -> int:
    """Write the report of an evaluation.

    Args:
        folder: the --out of `vla-pruner eval`: finished, unfinished or merged. Nothing in it changes but the report.
        out: the file; None: report.html in the folder.
        episodes: those that the player shows; empty: a few telling ones.
        interval: of differences, one of `statistics.INTERVALS`.

    Returns:
        0.

    Raises:
        EvaluationError: the folder holds no evaluation.
        OptionError: the file cannot be written.
        ImagesUnavailable: there are traces, and Pillow is not installed.
    """
    target = folder / REPORT if out is None else out
    if out is not None:
        check_file(str(out), "--out")
    results = read_results(folder, interval)
    traced = look(results, episodes)
    page = render(results, traced).encode(errors="backslashreplace")
    try:
        replace_file(target, page)
    except OSError as error:
        raise unwritable(str(target), error, "--out") from error
    say(console, headline(results))
    for sentence in traced.damaged[:_NAMED]:
        say(console, f"Left out: {sentence}", soft_wrap=True)
    if len(traced.damaged) > _NAMED:
        say(console, f"Left out: {len(traced.damaged) - _NAMED} more damaged traces, which the report names.")
    arms = counted(len(results.summary.arms), "arm")
    say(
        console,
        f"Report: {target.resolve()} ({arms}, {_size(len(page))}, nothing is loaded from elsewhere)",
        soft_wrap=True,
    )
    return 0


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
