"""The tables of docs/gpu.md: the plan, and the figures of the committed runs.

python -m benchmarks.gpu.table      # writes them into docs/gpu.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import PLAN, Item
from vla_pruner import markdown

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "gpu"
"""One folder per machine, each with the gpu.json of its run."""
DOCUMENT = ROOT / "docs" / "gpu.md"
NONE = "not measured"
MET = {True: "met", False: "not met", None: NONE}

FIGURES = (
    "item", "arm", "tokens", "ms p50", "p90", "p99", "speed (95 %)", "at most",
    "vision / prefill / pruning / acting / other, ms", "roofline ms", "reached", "GB at the peak",
)  # fmt: skip


def plan_table() -> str:
    """Return the table of the items, in the plan's order."""
    rows = []
    for item in PLAN:
        where = f", where {item.needs} is installed" if item.needs else ""
        rows.append((item.name, f"{item.says}{where}", f"{item.limit}"))
    return markdown.table(("item", "what", "limit, s"), rows) + "\n"


def bars_table(run: dict[str, Any] | None) -> str:
    """Return the table of the bars, each with the measured figure."""
    found = {bar["says"]: bar for item in _items(run).values() for bar in item["bars"]}
    rows = []
    for bar in (bar for item in PLAN for bar in item.bars):
        one = found.get(bar.says, {"found": None, "met": None})
        figure = "-"
        if one["found"] is not None:
            figure = f"{one['found']:.2f}" + ("x" if bar.figure == "speed" else " ms")
        rows.append((bar.says, figure, MET[one["met"]]))
    return markdown.table(("bar", "found", ""), rows) + "\n"


def figures_table(run: dict[str, Any] | None) -> str:
    """Return the table of every arm of every benchmark; an item without results gives the reason."""
    items, rows = _items(run), []
    for item in PLAN:
        if item.jobs:
            rows += list(_rows(item, items.get(item.name))) or [(item.name, _why(items.get(item.name)))]
    return markdown.table(FIGURES, rows) + "\n"


def tests_line(run: dict[str, Any] | None) -> str:
    """Return the line with the outcomes of the tests marked `gpu`."""
    item = _items(run).get("correctness")
    if item is None or not item.get("tests"):
        return f"Tests marked `gpu`: {NONE}.\n"
    outcomes = [test["outcome"] for test in item["tests"]]
    told = ", ".join(f"{outcomes.count(name)} {name}" for name in dict.fromkeys(outcomes))
    return f"Tests marked `gpu`: {told}" + ("" if item["status"] == "done" else f"; {item['status']}") + ".\n"


def section(run: dict[str, Any] | None) -> str:
    """Return the whole section of a run."""
    title = "No GPU has run this yet.\n"
    if run is not None:
        made = run["conditions"]
        versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("torch", "transformers"))
        title = f"{made['device_name']}, {versions}, bfloat16, commit {made['git']}.\n"
    return "\n".join((title, tests_line(run), bars_table(run), figures_table(run)))


def _items(run: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    return {} if run is None else {item["item"]: item for item in run["items"]}


def _why(item: dict[str, Any] | None) -> str:
    if item is None:
        return NONE
    return item["status"] + (f": {item['reason']}" if item.get("reason") else "")


def _rows(item: Item, found: dict[str, Any] | None) -> Iterator[tuple[str, ...]]:
    for job in () if found is None else found.get("jobs", ()):
        for arm in job["report"]["arms"]:
            speed = arm["speed"]
            told = "-" if speed is None else f"{speed['value']:.2f}x"
            if speed is not None and speed["low"] is not None:
                told += f" ({speed['low']:.2f} to {speed['high']:.2f})"
            stages = arm["stages"]
            memory = arm["memory"]["bytes"]
            yield (
                f"{item.name}, {job['name']}",
                arm["name"],
                f"{arm['kept']}",
                *(f"{arm['milliseconds'][name]:.2f}" for name in ("p50", "p90", "p99")),
                told,
                "-" if arm["ceiling"] is None else f"{arm['ceiling']:.2f}x",
                " / ".join(f"{stages[name]:.2f}" for name in ("vision", "prefill", "pruning", "decode", "other")),
                f"{arm['roofline']['total']:.2f}",
                f"{100 * arm['reached']:.0f} %",
                "-" if memory is None else f"{memory / 1e9:.1f}",
            )


def runs() -> list[dict[str, Any]]:
    """Return every committed run."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(COMMITTED.glob("*/gpu.json"))]


def rewritten(text: str) -> str:
    """Return the document with new tables."""
    measured = "\n".join(section(run) for run in runs() or [None])
    for name, content in (("plan", plan_table()), ("measured", measured)):
        begin, end = f"<!-- {name}: python -m benchmarks.gpu.table -->\n", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{DOCUMENT} has no place for {name}")
        text = f"{before}{begin}\n{content}\n{end}{after}"
    return text


def main() -> None:
    """Write the tables into the document."""
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
