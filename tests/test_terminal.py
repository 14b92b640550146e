"""Text from outside is printed as it is. rich would take "[bold]" for markup, and raises on "[/x]"."""

from __future__ import annotations

import ast
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vla_pruner import cli
from vla_pruner.evaluation.table import COSTS, OUTCOMES, to_rich
from vla_pruner.terminal import (
    Brief,
    LogLines,
    add_column,
    add_row,
    lasting,
    literal,
    output,
    progress,
    remark,
    say,
    simple_table,
    waiting,
)

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


def test_a_bar_is_drawn_on_terminals_alone() -> None:
    for kind, terminal, drawn in ((Console, True, True), (Console, False, False), (Brief, True, False)):
        shown = kind(file=io.StringIO(), force_terminal=terminal, force_interactive=terminal)
        with progress(shown) as bar:
            assert bar.disable is not drawn


def test_what_is_waited_for_is_shown_on_terminals_alone() -> None:
    for kind, terminal, shown in ((Console, True, True), (Console, False, False), (Brief, True, False)):
        out = io.StringIO()
        with waiting(kind(file=out, force_terminal=terminal, force_interactive=terminal), "loading [x]"):
            pass
        assert ("loading [x]" in out.getvalue()) is shown


def test_a_brief_console_leaves_progress_out() -> None:
    out = io.StringIO()
    brief = Brief(file=out, width=80)
    remark(brief, "how far")
    LogLines(brief, 10, "episodes", every=0.0, clock=iter((0.0, 60.0)).__next__).at(5)
    say(brief, "what came out")
    assert out.getvalue() == "what came out\n"


def test_a_log_file_gets_whole_lines_now_and_then() -> None:
    shown, out = console()
    lines = LogLines(shown, 110, "episodes", done=10, every=30.0, clock=iter((0.0, 10.0, 40.0, 60.0, 3600.0)).__next__)
    for done in (20, 30, 40, 60):
        lines.at(done)
    assert (
        out.getvalue()
        == "30 of 110 episodes, 40 s; about 3 min left\n60 of 110 episodes, 1 h 0 min; about 1 h 0 min left\n"
    )
    assert "\x1b" not in out.getvalue()
    assert [lasting(seconds) for seconds in (0.4, 59, 90, 3599, 12000)] == [
        "0 s",
        "59 s",
        "2 min",
        "1 h 0 min",
        "3 h 20 min",
    ]
    live, out = Console(file=io.StringIO(), force_terminal=True, force_interactive=True), io.StringIO()
    LogLines(live, 10, "episodes", every=0.0, clock=iter((0.0, 60.0)).__next__).at(5)
    assert live.file.getvalue() == ""  # pyright: ignore[reportAttributeAccessIssue]


def test_colours_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert output(no_color=True).no_color
    assert not output().no_color
    monkeypatch.setenv("NO_COLOR", "1")
    assert output().no_color
    assert isinstance(output(brief=True), Brief)
    assert not isinstance(output(), Brief)


@pytest.mark.parametrize("command", ["eval --policy reference --suite metaworld:mt4 --out", "demo --out"])
def test_flags_reach_the_console(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Console] = []
    monkeypatch.setattr("vla_pruner.evaluation.command.run_eval", lambda _, console: seen.append(console) or 0)
    monkeypatch.setattr("vla_pruner.demo.run_demo", lambda _, console: seen.append(console) or 0)
    monkeypatch.delenv("NO_COLOR", raising=False)
    words = [*command.split(), str(tmp_path / "run")]
    assert cli.main(words) == cli.main([*words, "--quiet", "--no-color"]) == 0
    assert [(isinstance(one, Brief), one.no_color) for one in seen] == [(False, False), (True, True)]


def test_tables_fit_80_columns() -> None:
    titles = [
        "unpruned",
        "vla-pruner 0.125 freeze K=3 warmup_steps=3",
        "max-min-diversity 0.25 drop K=3 metric=euclidean",
    ]
    cells = ("188/200", "94\n89.8 to 96.5", "-11.5\n-17 to -6.3", "12/35", "<.001", "inconclusive")
    costs = ("120", "+10.5\n-3.1 to +20.6", "1047.5", "2693.1", "128-512/512", "83.5 %", "0")
    out = io.StringIO()
    narrow = Console(file=out, width=80)
    narrow.print(to_rich("200 episodes an arm, 4 tasks", OUTCOMES, [(title, *cells) for title in titles]))
    narrow.print(to_rich("What it took", COSTS, [(title, *costs) for title in titles]))
    shown = out.getvalue()
    assert "…" not in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
    for cell in (*cells, *costs):
        for part in cell.split("\n"):
            assert shown.count(part) >= len(titles), part
    for word in {word for title in titles for word in title.split()}:
        assert word[:12] in shown, word


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_other_module_gives_rich_a_text(path: Path) -> None:
    """All output goes through `terminal`: elsewhere a console gets no text, and tables, columns and bars are not
    made.
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
