"""`python -m benchmarks.batch`: throughput against the batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.batch import main

SMALL = ["--model", "llama:32,2,4,48,100", "--layer", "1", "--decode-tokens", "2", "--iters", "2"]


@pytest.mark.usefixtures("quick")
def test_a_row_for_each_batch_and_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--batch", "3,1", "--out", str(tmp_path / "b")]) == 0
    reports = json.loads((tmp_path / "b" / "batch.json").read_text())
    assert [report["settings"]["batch"] for report in reports] == [1, 3]
    text = (tmp_path / "b" / "batch.md").read_text()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    assert {len(row) for row in cells} == {len(cells[0])}
    names = ["unpruned", "vla-pruner 0.25 freeze K=1 semantic_queries=last"]
    assert [(row[1], row[2]) for row in cells[2:]] == [(name, size) for name in names for size in ("1", "3")]
    for report, row in zip(reports, cells[2:4], strict=True):
        arm = report["arms"][0]
        robots = report["settings"]["batch"]
        assert arm["robots_per_second"] == pytest.approx(1e3 * robots / arm["milliseconds"]["p50"])
        assert row[4] == f"{arm['robots_per_second']:.4g}"
    assert cells[2][5] == "1.00x"
    assert float(cells[3][5][:-1]) == pytest.approx(float(cells[3][4]) / float(cells[2][4]), abs=0.02)
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch", "0"], "is no list of whole numbers"),
        (["--batch", "1,x"], "is no list of whole numbers"),
        (["--keep", "1.5"], "keep=1.5 was given"),
        (["--out", __file__], "which is a file"),
    ],
)
def test_flags_that_make_no_sense(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags if "--out" in flags else [*flags, "--out", str(tmp_path)]
    try:
        code = main([*SMALL, *given])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "batch.json").exists()
