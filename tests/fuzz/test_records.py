"""A short run of the mutants of records, run folders, traces and datasets."""

from __future__ import annotations

import pytest

from tests.fuzz.records import run

pytest.importorskip("pyarrow")
pytest.importorskip("av")


@pytest.mark.fuzz
def test_no_mutant_ends_in_a_raw_exception() -> None:
    assert run(60) == []


@pytest.mark.fuzz
def test_a_number_of_a_seed_is_the_same_mutant(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness sees what it looks for: a reader that raises something else is reported, by the same mutants."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("of the test")

    monkeypatch.setattr("tests.fuzz.records.find_recordings", broken)
    first, second = run(12, seed=1), run(12, seed=1)
    assert first == second
    assert any("ZeroDivisionError: of the test" in one for one in first)
