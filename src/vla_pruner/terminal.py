"""What the subcommands print through rich. Text from outside (names, paths, errors) is never read as rich's markup."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vla_pruner.wording import readable


def literal(text: str, style: str = "") -> Text:
    """A text as it is: brackets are brackets, and what would steer the terminal is written as an escape."""
    return Text(readable(text), style)


def say(console: Console, text: str = "", style: str = "", soft_wrap: bool | None = None) -> None:
    """Prints a text as it is.

    Args:
        style: of rich, such as "dim".
        soft_wrap: whether the terminal breaks long lines, so that a path can be copied.
    """
    console.print(literal(text, style), soft_wrap=soft_wrap)


def simple_table(title: str | None, padding: tuple[int, int, int, int] = (0, 1, 0, 0)) -> Table:
    """An empty table in the style of all subcommands; its texts go through `add_column` and `add_row`."""
    return Table(
        title=None if title is None else literal(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=padding,
        pad_edge=False,
    )


def add_column(table: Table, head: str, *, right: bool, no_wrap: bool = False, min_width: int | None = None) -> None:
    """A column of a table; `right`: its cells end at the same place."""
    table.add_column(literal(head), justify="right" if right else "left", no_wrap=no_wrap, min_width=min_width)


def add_row(table: Table, cells: Sequence[str], style: str | None = None) -> None:
    """A row of a table."""
    table.add_row(*map(literal, cells), style=style)


def progress(console: Console | None, note: bool = False) -> Progress:
    """A bar that goes away when it is done; None: nothing is shown.

    Args:
        note: whether its tasks have a field "note", a text behind the bar.
    """
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    if note:
        columns.append(TextColumn("{task.fields[note]}", markup=False))
    return Progress(*columns, console=console, transient=True, disable=console is None)
