"""Takes a run of the demo as the published one.

    vla-pruner demo --out DIR
    python -m benchmarks.publish_demo DIR

Copies its results to benchmarks/results/demo, puts its tables into README.md and docs/demo.md, and draws the picture
anew from its report. What these pages say around the tables (the machine, the sentences below) stays to be written;
tests/test_readme.py and tests/docs name what no longer fits.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

from benchmarks import picture

ROOT = Path(__file__).parents[1]
RUN = ROOT / "benchmarks" / "results" / "demo"
HEAD = 6
"""Lines of the table that README.md has: success and speed."""

_TABLE = re.compile(r"^\| \| unpruned \|.*\n(?:\|.*\n?)+", re.MULTILINE)


def with_table(page: str, table: str, lines: int | None = None) -> str:
    """A page with its one table of arms replaced.

    Args:
        table: Markdown, as `vla-pruner demo` writes it.
        lines: of it, from the first; None: all.

    Raises:
        ValueError: the page has none, or several.
    """
    shown = "\n".join(table.splitlines()[:lines]) + "\n"
    made, found = _TABLE.subn(lambda _: shown, page)
    if found != 1:
        raise ValueError(f"the page has {found} tables of arms, not one")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `vla-pruner demo --out` wrote")
    parser.add_argument("--task", default="push", help="the task of the picture (default: %(default)s)")
    parser.add_argument("--step", type=int, default=6, help="its control step (default: %(default)s)")
    asked = parser.parse_args()
    run = json.loads((asked.folder / "results.json").read_text(encoding="utf-8"))
    if run["interrupted"] or run["machine_was_busy"]:
        raise SystemExit(f"{asked.folder} was interrupted, or other programs kept the machine busy: run it again.")
    table = (asked.folder / "table.md").read_text(encoding="utf-8")
    for name, lines in (("README.md", HEAD), ("docs/demo.md", None)):
        page = ROOT / name
        page.write_text(with_table(page.read_text(encoding="utf-8"), table, lines), encoding="utf-8")
    for name in ("results.json", "table.md"):
        shutil.copyfile(asked.folder / name, RUN / name)
    picture.write_picture(asked.folder / "report.html", RUN / "results.json", picture.OUT, asked.task, asked.step)


if __name__ == "__main__":
    main()
