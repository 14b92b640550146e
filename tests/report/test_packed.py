"""Records that are packed, as this project publishes them, are read as they are."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from vla_pruner.cli import main
from vla_pruner.evaluation import EvaluationError, read_records
from vla_pruner.evaluation.records import EPISODES, packed
from vla_pruner.evaluation.run import open_records

STUDY = Path(__file__).parents[2] / "benchmarks" / "results" / "study"


@pytest.mark.parametrize(("name", "episodes"), [("confirm", 3000), ("options", 1800)])
def test_what_the_study_published_is_rendered(
    name: str, episodes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (STUDY / name).is_dir():
        pytest.skip("the study's records are not in this tree")
    assert len(read_records(STUDY / name / EPISODES)) == episodes
    page = tmp_path / "report.html"
    assert main(["report", str(STUDY / name), "--out", str(page)]) == 0
    assert "Report: " in capsys.readouterr().out
    assert "action-only" in page.read_text(encoding="utf-8") or name == "options"


def test_what_the_documents_say_of_milliseconds() -> None:
    if not STUDY.is_dir():
        pytest.skip("the study's records are not in this tree")
    records = read_records(STUDY / "grid" / EPISODES)
    timed = sum(record.latency_p50_ms is not None for record in records)
    said = " ".join((Path(__file__).parents[2] / "docs" / "study.md").read_text(encoding="utf-8").split())
    assert f"{timed:,} of the {len(records):,} episodes of `grid` ran one at a time and have them" in said
    for name in ("options", "confirm"):
        assert all(record.latency_p50_ms is None for record in read_records(STUDY / name / EPISODES))


# A packed file holds the second at which it was packed, so as an id it would differ between test workers.
@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"{}\n" * 50, mtime=0)[:-9], b"\x1f\x8b\x08\x00" + b"\xff" * 40],
    ids=["no gzip", "cut short", "header only"],
)
def test_damaged_packing_is_a_sentence(content: bytes, tmp_path: Path) -> None:
    packed(tmp_path / EPISODES).write_bytes(content)
    with pytest.raises(EvaluationError, match=r"episodes\.jsonl\.gz cannot be read"):
        read_records(tmp_path / EPISODES)


def test_a_run_does_not_begin_anew_beside_its_packed_records(tmp_path: Path) -> None:
    packed(tmp_path / EPISODES).write_bytes(gzip.compress(b""))
    with pytest.raises(EvaluationError, match=r"holds this run's episodes, packed.*gunzip"):
        open_records(tmp_path)
    assert not (tmp_path / EPISODES).exists()
    (tmp_path / EPISODES).write_bytes(b"")
    open_records(tmp_path).close()  # an unpacked run goes on
