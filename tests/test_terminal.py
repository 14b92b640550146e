"""Text from outside is printed as it is. rich would take "[bold]" for markup, and raises on "[/x]"."""

from __future__ import annotations

import ast
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vla_pruner.terminal import add_column, add_row, literal, progress, say, simple_table

SOURCE = Path(__file__).parents[1] / "src" / "vla_pruner"
HOSTILE = "[bold]a[/x] :smile: \x1b[2Jb"
SHOWN = r"[bold]a[/x] :smile: \x1b[2Jb"
PRINTS = {"print", "log", "rule", "status", "print_json", "input"}


def console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=120), out


def test_a_line_is_printed_as_it_is() -> None:
    shown, out = console()
    say(shown, HOSTILE, style="dim", soft_wrap=True)
    say(shown)
    shown.print(literal("lone \ud800 surrogate"))
    assert out.getvalue() == f"{SHOWN}\n\nlone \\ud800 surrogate\n"


def test_a_table_is_printed_as_it_is() -> None:
    shown, out = console()
    table = simple_table(HOSTILE)
    add_column(table, HOSTILE, right=False)
    add_row(table, [HOSTILE], style="bold")
    shown.print(table)
    assert out.getvalue().count(SHOWN) == 3


def test_a_bar_is_printed_as_it_is() -> None:
    shown, _ = console()
    with progress(shown, note=True) as bar:
        bar.add_task("[/x]", total=2, note="[/x]")
        columns: list[Any] = [column for column in bar.columns if hasattr(column, "render")]
        assert sum("[/x]" in str(column.render(bar.tasks[0])) for column in columns) == 2
    with progress(None) as bar:
        assert bar.disable


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_other_module_gives_rich_a_text(path: Path) -> None:
    """Whoever prints goes through `terminal`: elsewhere a console is given what is no text, and tables, columns and
    bars are not made.
    """
    if path.name == "terminal.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rich":
            names = {one.name for one in node.names}
            assert names <= {"Console", "Padding", "Table"}, f"{path.name} imports {names} of rich"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = node.func.value
            on_console = isinstance(of, ast.Name) and of.id == "console"
            if on_console and node.func.attr in PRINTS and node.args:
                constant = isinstance(node.args[0], ast.Constant) and "[" not in str(node.args[0].value)
                made = isinstance(node.args[0], (ast.Call, ast.Name)) or constant
                assert made, f"{path.name}:{node.lineno} prints a text by rich"
            if node.func.attr in ("add_row", "add_column") and node.args:
                first = node.args[0]
                assert isinstance(first, ast.Call), f"{path.name}:{node.lineno} gives a table a text"
