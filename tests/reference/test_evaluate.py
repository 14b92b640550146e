"""Reports of closed-loop success: what they hold adds up, and what finished is kept."""

from __future__ import annotations

import argparse
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from reference.evaluate import finished, main, publish, resumed
from vla_pruner.models.reference.loading import SHIPPED_WEIGHTS

ENTRY = {
    "task": "reach",
    "arm": "policy",
    "episodes": 2,
    "successes": 1,
    "success_rate": 0.5,
    "wilson_95": [0.1, 0.9],
    "mean_control_steps": 10.0,
    "success_by_seed": {"0": True, "1": False},
}
SAME = {"weights_sha256": "a", "first_seed": 0}


def test_a_report_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "new" / "figures.json"
    parser = argparse.ArgumentParser()
    report = resumed(out, SAME, {}, parser)
    assert (report["results"], report["first_seed"]) == ([], 0)
    report["results"].append(ENTRY)
    publish(ENTRY, 50.0, report, out)
    assert resumed(out, SAME, {}, parser) == report
    assert resumed(out, {**SAME, "suite": "metaworld"}, {"suite": "metaworld"}, parser)["suite"] == "metaworld"
    assert [path.name for path in out.parent.iterdir()] == ["figures.json"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"results": [{"task": "rea', "holds no figures of this program"),
        ("", "holds no figures of this program"),
        ("[1]", "not an object"),
        ("{}", "results is missing"),
        ('{"results": [{"task": "reach"}]}', "arm is missing"),
        (json.dumps({"results": [{**ENTRY, "success_rate": None}]}), "success_rate is None"),
        (json.dumps({**SAME, "weights_sha256": "b", "results": [ENTRY]}), "figures with another weights_sha256"),
        (json.dumps({"results": [ENTRY]}), "another weights_sha256 and first_seed"),
    ],
)
def test_a_file_of_anything_else_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, says: str
) -> None:
    out = tmp_path / "figures.json"
    out.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        resumed(out, SAME, {}, argparse.ArgumentParser())
    assert says in capsys.readouterr().err
    assert out.read_text() == content


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--first-seed", "7", "--episodes", "2"], "figures with another first_seed"),
        (["--episodes", "3"], "figures of 2 episodes"),
        (["--weights", "nowhere"], "has no model.safetensors"),
        (["--episodes", "0"], "'0' is no number of 1 or more"),
        (["--tasks", "peg"], "invalid choice: 'peg'"),
    ],
)
def test_the_first_policys_evaluation_adds_only_to_figures_of_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], says: str
) -> None:
    out = tmp_path / "figures.json"
    sha256 = hashlib.sha256((SHIPPED_WEIGHTS / "model.safetensors").read_bytes()).hexdigest()
    out.write_text(json.dumps({"weights_sha256": sha256, "first_seed": 0, "results": [ENTRY]}))
    before = out.read_text()
    words = ["evaluate", "--tasks", "reach", "--first-seed", "0", "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*words, *given])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert says in capsys.readouterr().err
    assert out.read_text() == before


def test_a_job_that_fails_takes_no_other_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    def run(number: int) -> dict[str, Any]:
        if number in (0, 2):
            raise RuntimeError(f"simulator {number} fell over")
        return {"number": number}

    found = []
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="fell over"):
        for entry in finished(pool, run, [(number,) for number in range(4)]):
            found.append(entry["number"])
    assert sorted(found) == [1, 3]
    assert capsys.readouterr().err.count("fell over") == 2
