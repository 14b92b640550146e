"""benchmarks/results/README.md is the output of its script, and leads to every result that is committed."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from benchmarks.index import RESULTS, committed, index

needs_git = pytest.mark.skipif(
    shutil.which("git") is None
    or subprocess.run(["git", "rev-parse"], cwd=RESULTS, capture_output=True).returncode != 0,
    reason="this is no checkout of git, which lists the results",
)


@needs_git
def test_the_index_is_current() -> None:
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert text == index(committed()), "run: python -m benchmarks.index"
    assert all(f"]({file})" in text for file in committed() if file != "README.md")
    assert not [file for file in committed() if file.endswith(".html")], "pages are made from the records"


def test_a_result_that_nobody_described_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not say what benchmarks/results/new/x\.json is"):
        index(["new/x.json"])
