"""The audit as a checklist in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from vla_pruner.auditing.report import AuditReport, Check
from vla_pruner.terminal import literal

_MARKS = {True: ("ok", "green"), False: ("FAIL", "bold red"), None: ("skip", "yellow")}
_NAME_WIDTH = 18


def print_check(console: Console, check: Check, details: bool) -> None:
    """Print one check; its detail too if it failed or was skipped, or if `details`."""
    mark, style = _MARKS[check.passed]
    row = Table.grid(padding=(0, 1))
    row.add_column(width=4)
    row.add_column(width=_NAME_WIDTH)
    row.add_column()
    explain = details or check.passed is not True
    lines = [line for line in (check.figure, check.detail if explain else "") if line]
    row.add_row(literal(mark, style), literal(check.name), literal(lines[0] if lines else ""))
    console.print(row)
    for line in lines[1:]:
        console.print(Padding(literal(line, "dim" if check.passed else ""), (0, 0, 0, _NAME_WIDTH + 6)))


def summary(report: AuditReport) -> str:
    """Return the audit in one line."""
    seconds = f"{report.settings['seconds']:g} s"
    skipped = sum(check.passed is None for check in report.checks)
    asked = len(report.checks) - skipped
    apart = f", {skipped} skipped" if skipped else ""
    if report.passed:
        return f"All {asked} checks passed{apart}, in {seconds}: {report.policy} with {report.method}."
    names = ", ".join(check.name for check in report.failures)
    return f"{len(report.failures)} of {asked} checks failed{apart}, in {seconds}: {names}."
