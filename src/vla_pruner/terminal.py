"""The subcommands' output through rich. Text from outside (names, paths, errors) is never read as rich's markup."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from vla_pruner.wording import readable

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class Brief(Console):
    """A console on which a command shows results and errors, and no progress."""


def output(brief: bool = False, no_color: bool = False, stderr: bool = False) -> Console:
    """Return the console of a subcommand.

    Args:
        brief: whether progress and greetings are left out.
        no_color: whether nothing has a colour; otherwise the variable NO_COLOR decides, and a file or a pipe has none.
        stderr: whether it is standard error, because standard output is for something else.
    """
    kind = Brief if brief else Console
    return kind(highlight=False, no_color=no_color or None, stderr=stderr)


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """Show in a terminal what a command waits for, until it is done; nothing in a file, a pipe or a brief console."""
    if isinstance(console, Brief) or not console.is_interactive:
        yield
        return
    with console.status(literal(what)):
        yield


def remark(console: Console, text: str) -> None:
    """Print a line on the progress of a command, which a brief console leaves out."""
    if not isinstance(console, Brief):
        say(console, text)


class LogLines:
    """Progress if no bar can be drawn (a log file, a pipe): a line now and then, each of its own.

    Args:
        console: of the lines; nothing is written to one that draws bars, nor to a brief one.
        total: the number of things.
        noun: their name, in the plural.
        done: the number finished before.
        every: seconds between two lines.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        noun: str,
        done: int = 0,
        every: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._total, self._noun, self._every, self._clock = console, total, noun, every, clock
        self._first = done
        self._began = self._said = clock()

    def at(self, done: int) -> None:
        """Print the number done and the time that the others take at this pace, if it is time for a line."""
        now = self._clock()
        if self._console.is_interactive or now - self._said < self._every or done <= self._first:
            return
        self._said = now
        passed = now - self._began
        left = passed * (self._total - done) / (done - self._first)
        remark(self._console, f"{done} of {self._total} {self._noun}, {lasting(passed)}; about {lasting(left)} left")


def lasting(seconds: float) -> str:
    """Return a time as people say it: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def literal(text: str, style: str = "") -> Text:
    """Return a text as it is: brackets are brackets, and characters that would steer the terminal are written as
    escapes.
    """
    return Text(readable(text), style)


def say(console: Console, text: str = "", style: str = "", soft_wrap: bool | None = None) -> None:
    """Print a text as it is.

    Args:
        style: of rich, such as "dim".
        soft_wrap: whether the terminal breaks long lines, so that a path can be copied.
    """
    console.print(literal(text, style), soft_wrap=soft_wrap)


def simple_table(title: str | None) -> Table:
    """Return an empty table in the style of all subcommands; its texts go through `add_column` and `add_row`."""
    return Table(
        title=None if title is None else literal(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def add_column(table: Table, head: str, *, right: bool, no_wrap: bool = False, min_width: int | None = None) -> None:
    """Add a column to a table; `right`: its cells end at the same place. A word that is longer than a narrow column
    goes on in the next line.
    """
    justify = "right" if right else "left"
    table.add_column(literal(head), justify=justify, no_wrap=no_wrap, min_width=min_width, overflow="fold")


def add_row(table: Table, cells: Sequence[str], style: str | None = None) -> None:
    """Add a row to a table."""
    table.add_row(*map(literal, cells), style=style)


def progress(console: Console | None, note: bool = False) -> Progress:
    """Return a bar that goes away when it is done; nothing is shown for None, for a brief console, and if no bar can be
    drawn: see `LogLines`.

    Args:
        note: whether its tasks have a field "note", a text behind the bar.
    """
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    if note:
        columns.append(TextColumn("{task.fields[note]}", markup=False))
    disable = console is None or isinstance(console, Brief) or not console.is_interactive
    return Progress(*columns, console=console, transient=True, disable=disable)
