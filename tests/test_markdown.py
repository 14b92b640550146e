"""Tables as Markdown: every cell is in its column, whatever its text is, and one module writes them all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vla_pruner.markdown import head, row, table

ROOT = Path(__file__).parents[1]


def test_a_table_has_its_head_its_alignment_and_its_rows() -> None:
    rows = [("fast", "1.0"), ("slow", "")]
    assert table(("arm", "ms"), rows) == "| arm | ms |\n|---|---|\n| fast | 1.0 |\n| slow |  |"
    assert table((None, "ms"), rows[:1], numbers=True) == "| | ms |\n|---|---:|\n| fast | 1.0 |"
    assert table(("arm", "ms"), ()) == head(("arm", "ms"))


def test_a_row_that_is_told_of_in_one_cell_is_filled_up() -> None:
    lines = table(("arm", "ms", "GB"), [("fast", "not measured")]).splitlines()
    assert lines[2] == "| fast | not measured | |"
    assert {line.count("|") for line in lines} == {4}


def test_text_ends_neither_its_cell_nor_its_line() -> None:
    assert row(("a|b", "first\nsecond\r\nthird")) == r"| a\|b | first second third |"


def test_cells_without_a_column_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a row of 3 cells does not fit into 2 columns: \['a', 'b', 'c'\]"):
        table(("arm", "ms"), [("a", "b", "c")])


def test_no_other_module_writes_tables() -> None:
    written = re.compile(r"""["']\|?( \| |\| | \||---)|\|---""")
    files = [path for folder in ("src", "benchmarks", "reference") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    found = {path.relative_to(ROOT).as_posix() for path in files if written.search(path.read_text(encoding="utf-8"))}
    assert found == {"src/vla_pruner/markdown.py"}


def test_the_committed_tables_of_the_study_and_the_server_are_what_is_written_today() -> None:
    from benchmarks.serving import Row, to_markdown
    from benchmarks.study_contrasts import table as contrasts

    results = ROOT / "benchmarks" / "results"
    made = json.loads((results / "study" / "grid" / "contrasts.json").read_text(encoding="utf-8"))["contrasts"]
    assert contrasts(made) == (results / "study" / "grid" / "contrasts.md").read_text(encoding="utf-8")
    folder = results / "serving" / "reference-cpu-1-thread"
    rows = [Row(**one) for one in json.loads((folder / "serving.json").read_text(encoding="utf-8"))["rows"]]
    assert to_markdown(rows) == (folder / "serving.md").read_text(encoding="utf-8")
