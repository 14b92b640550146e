"""README.md: it is short, its Python runs as it stands, its commands exist, its figures are committed ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vla_pruner as vp
from tests.docs.pages import blocks, understood

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
LONGEST = 130


def test_it_is_read_in_a_minute() -> None:
    assert len(README.splitlines()) <= LONGEST


def test_the_snippet_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Random weights instead of a download; the loader has its own tests.
    policy = vp.random_policy("openvla-oft")
    monkeypatch.setattr(vp, "load_policy", lambda _, device: policy, raising=False)
    (snippet,) = blocks(README)
    assert len([line for line in snippet.splitlines() if line]) <= 6
    seen = np.zeros((64, 48, 3), np.uint8)
    names: dict[str, Any] = {"image": seen, "wrist": seen, "state": np.zeros(policy.proprio_size or 0)}
    exec(snippet, names)
    assert names["actions"].shape == (8, 7)
    assert "control step 1" in capsys.readouterr().out
    assert 'vp.random_policy("openvla-oft")' in README


def test_the_commands_are_understood() -> None:
    lines = [line for block in blocks(README, "") for line in block.splitlines() if line.startswith("vla-pruner ")]
    assert [line.split()[1] for line in lines] == ["audit", "bench", "eval", "serve"]
    for line in (*lines, *re.findall(r"or without one: (vla-pruner .*)", README)):
        understood(line)


def test_flops_left_are_the_counted_ones() -> None:
    counted = json.loads((RESULTS / "family_flops.json").read_text(encoding="utf-8"))["families"]
    table = _table(README, "| model |")
    for name in counted:
        if name.endswith("own head"):
            continue  # no policy, but the cost of one that a reader would build
        (row,) = [cells for cells in table if cells[0] == name]
        assert row[2] == " / ".join(_left(name))


def _left(name: str) -> tuple[str, str]:
    """FLOPs left at keep .25, frozen and dropped, as the committed table of docs/models.md has them."""
    table = _table((RESULTS / "family_flops.md").read_text(encoding="utf-8"), "| family |")
    (row,) = [cells for cells in table if cells[0] == name]
    dropped, frozen = (cell.split("/")[1].strip() if "/" in cell else "-" for cell in row[2:4])
    return frozen, dropped


def _table(text: str, head: str) -> list[list[str]]:
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_is_that_of_the_committed_run() -> None:
    run = RESULTS / "demo"
    if not (run / "results.json").is_file():
        pytest.skip("no demo run is committed")
    rows = (run / "table.md").read_text(encoding="utf-8").splitlines()
    head = "\n".join(rows[:6])
    assert "**success**" in head
    assert "speed" in head
    assert head in README
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert not results["interrupted"]
    assert not results["machine_was_busy"]
    conditions = results["conditions"]
    assert conditions["processor"] in README
    assert f"{conditions['parameters'] / 1e6:.1f} M parameters" in README
    assert f"{results['paired_episodes']} paired episodes" in README


def test_the_picture_is_described_by_its_own_figures() -> None:
    shown = json.loads((ROOT / "docs" / "assets" / "step.json").read_text(encoding="utf-8"))["milliseconds"]
    (described,) = re.findall(r"!\[([^\]]*)\]\(docs/assets/step\.webp\)", README)
    assert f"unpruned in {shown['unpruned']} ms" in described
    assert f"in {shown['recommended']} ms" in described


DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md", "docs/demo.md", "docs/faq.md", "docs/lerobot.md", "docs/libero.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
        assert named, name
        assert named <= targets, name
