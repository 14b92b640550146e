"""docs/records.md: SciPy, fieldtrial and robostats read an evaluation's records, and their numbers equal ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import blocks, page
from tests.evaluation.test_summary import made, usual
from vla_pruner.evaluation import summarize
from vla_pruner.evaluation.eval_info import ARMS, EVAL_INFO, eval_info, of_arms
from vla_pruner.evaluation.verdict import sentences
from vla_pruner.statistics import Pairs, mcnemar_p, wilson

READING, SCIPY, FIELDTRIAL, ROBOSTATS = blocks(page("records.md"))
TABLES = [(36, 12, 2, 0), (176, 17, 7, 0), (1, 1, 7, 12), (50, 0, 0, 0), (0, 5, 0, 1), (3, 0, 9, 2)]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's first block defines, run on an evaluation's folder."""
    run = made(tmp_path, usual)
    summary = summarize(run)
    info = eval_info(run, summary, sentences(summary))
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / EVAL_INFO).write_text(json.dumps(info))
    for key, content in of_arms(info).items():
        (folder / ARMS / key).mkdir(parents=True)
        (folder / ARMS / key / EVAL_INFO).write_text(json.dumps(content))
    (folder / "episodes.jsonl").write_bytes(b"".join(record.to_line() for record in run.records.values()))
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(READING, found)
    assert found["difference"]["pairs"] == 120
    return found


def test_an_arm_alone_is_read_as_lerobot_would_have_written_it(
    names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    exec(READING, names)
    success = names["pruned"]["success"]
    assert capsys.readouterr().out == f"{100 * success['value']} % of 120 episodes\n"
    assert set(names["alone"]) == {"per_task", "per_group", "overall", "arm"}


def test_scipy(names: dict[str, Any]) -> None:
    exec(SCIPY, names)
    success = names["pruned"]["success"]
    assert tuple(names["wilson"]) == pytest.approx((success["low"], success["high"]))
    assert names["mcnemar"] == names["difference"]["p_value"]


def test_fieldtrial(names: dict[str, Any]) -> None:
    stats: Any = pytest.importorskip("fieldtrial.stats", reason="make test-peers installs fieldtrial")
    exec(SCIPY, names)
    exec(FIELDTRIAL, names)
    paired, rate, success = names["paired"], names["rate"], names["pruned"]["success"]
    assert paired.test.pvalue == pytest.approx(names["difference"]["p_value"])
    assert (paired.interval.low, paired.interval.high) == pytest.approx(names["pruned"]["tango"])
    assert (rate.interval.low, rate.interval.high) == pytest.approx((success["low"], success["high"]))
    for both, gained, lost, neither in TABLES:
        pairs = Pairs(((both, gained, lost, neither),))
        n = sum(pairs.total)
        assert pairs.tango() == pytest.approx(stats.tango_interval(gained, lost, n), abs=1e-9)
        assert pairs.tango(0.9) == pytest.approx(stats.tango_interval(gained, lost, n, level=0.9), abs=1e-9)
        assert mcnemar_p(gained, lost) == pytest.approx(stats.mcnemar_exact(gained, lost).pvalue)


def test_robostats(names: dict[str, Any]) -> None:
    robostats: Any = pytest.importorskip("robostats", reason="make test-peers installs robostats")
    exec(ROBOSTATS, names)
    result, difference = names["result"], names["difference"]
    assert result.delta == pytest.approx(difference["value"])
    assert result.n_pairs == difference["pairs"]
    assert result.p_value == pytest.approx(difference["p_value"])
    assert (result.interval.lower, result.interval.upper) == pytest.approx(names["pruned"]["tango"], abs=1e-6)
    for successes, total in ((104, 120), (0, 20), (29, 29), (1, 3)):
        theirs, ours = robostats.wilson(successes, total), wilson(successes, total)
        assert (theirs.lower, theirs.upper) == pytest.approx((ours.low, ours.high))
