"""The numbers, the table, the sentences and `eval_info.json`, from records made by hand."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.evaluation.fakes import FakeSuite, settings
from vla_pruner.evaluation import Record, Summary, summarize
from vla_pruner.evaluation.eval_info import eval_info, of_arms
from vla_pruner.evaluation.manifest import Manifest, Plan, identity
from vla_pruner.evaluation.records import latest, read_lines
from vla_pruner.evaluation.run import Run
from vla_pruner.evaluation.table import COSTS, OUTCOMES, cost_rows, outcome_rows, suite_table, to_markdown, to_rich
from vla_pruner.evaluation.units import Unit
from vla_pruner.evaluation.verdict import sentences
from vla_pruner.statistics import NEWCOMBE, TANGO, Pairs, holm, paired_difference

Outcome = Callable[[str, Unit], bool | None]
EPISODES = 60
PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "results"
PRUNED, RANDOM = "vla-pruner-0.25-drop-K3-presetpaper", "random-0.25-drop-K3-after-3"


def made(tmp_path: Path, outcome: Outcome, episodes: int = EPISODES, **changes: Any) -> Run:
    """Make a run whose episodes end as `outcome` says; None crashes."""
    asked = settings(tmp_path, methods=("vla-pruner:preset=paper",), controls=("again", "random", "blank"), **changes)
    plan = Plan(FakeSuite().tasks, 0, episodes, 0)
    manifest = Manifest(identity(asked, {"weights": "w"}), plan, for_claims=episodes >= 50)
    records = {}
    for unit in plan.units():
        for arm in asked.arms():
            success = outcome(arm.key, unit)
            steps = 3 if success else 6
            record = Record(
                run=manifest.run,
                arm=arm.key,
                unit=unit,
                success=success,
                termination="error" if success is None else "success" if success else "max_steps",
                steps=steps,
                control_steps=2,
                sum_reward=float(bool(success)),
                max_reward=float(bool(success)),
                latency_ms=[10.0, 20.0] if arm.method is None else [10.0, 12.0],
                latency_p50_ms=15.0,
                latency_p99_ms=19.9,
                visual_tokens=None if arm.method is None else 196,
                kept_tokens=[] if arm.method is None else [49, 49],
                pruned_steps=0 if arm.method is None else 1,
                error={"type": "OSError", "message": "gone", "where": "x.py:1 f"} if success is None else None,
                seconds=1.0,
            )
            records[record.key] = record
    return Run(manifest, records)


def usual(arm: str, unit: Unit) -> bool:
    """The unpruned policy fails every tenth, its second run another one; pruned loses 4 more; black images lose all."""
    if arm == "blank-image":
        return False
    if arm == PRUNED and unit.task_id == 1 and unit.initial_state in (2, 3, 4, 5):
        return False
    if arm == RANDOM and unit.initial_state % 3 == 1:
        return False
    if arm == "unpruned-again":
        return unit.initial_state != 7
    return unit.initial_state % 10 != 0


def test_every_number_is_that_of_the_pairs(tmp_path: Path) -> None:
    summary = summarize(made(tmp_path, usual))
    rows = {arm.key: arm for arm in summary.arms}
    assert list(rows) == ["unpruned", PRUNED, "unpruned-again", RANDOM, "blank-image"]
    base, pruned = rows["unpruned"], rows[PRUNED]
    assert (base.success.successes, base.success.total) == (108, 120)
    assert base.difference is None
    difference = pruned.difference
    assert difference is not None
    assert (difference.gained, difference.lost, difference.pairs) == (0, 4, 120)
    counts = ((54, 0, 0, 6), (50, 0, 4, 6))
    assert (difference.low, difference.high) == pytest.approx(Pairs(counts).limits())
    assert pruned.difference_by_task["fake/push"].lost == 4
    assert pruned.difference_by_task["fake/reach"].lost == 0
    assert pruned.by_task == {"fake/push": (50, 60), "fake/reach": (54, 60)}
    assert pruned.verdict is not None
    assert pruned.verdict.p_not_worse == pytest.approx(Pairs(counts).p_not_worse(0.02))
    assert pruned.verdict.word == "inconclusive"
    assert pruned.verdict.more is not None
    assert pruned.p_adjusted == difference.p_value == 0.125
    against = pruned.against_random
    assert against is not None
    assert (against.gained, against.lost) == (35, 3)
    assert pruned.median_steps == 3
    assert pruned.slower is not None
    assert pruned.slower.value == pytest.approx(4 * 3 / 120), "a failure counts as the longest episode"
    assert (base.latency_p50_ms, pruned.latency_p50_ms) == (15.0, 11.0)
    assert (pruned.kept, pruned.visual_tokens, pruned.pruned_share) == ([49, 49], 196, 0.5)
    assert summary.complete


@pytest.mark.parametrize(
    ("lost", "margin", "word"), [(0, 0.1, "not worse"), (0, 0.001, "inconclusive"), (40, 0.02, "worse")]
)
def test_verdicts(tmp_path: Path, lost: int, margin: float, word: str) -> None:
    def outcome(arm: str, unit: Unit) -> bool:
        return not (arm == PRUNED and unit.initial_state < lost) and arm != "blank-image"

    summary = summarize(made(tmp_path, outcome, margin=margin))
    verdict = summary.of("method")[0].verdict
    assert verdict is not None
    assert verdict.word == word
    assert (verdict.more is None) == (word != "inconclusive")
    said = sentences(summary)[0]
    assert said.startswith(f"vla-pruner 0.25 drop K=3 preset=paper: {word}, ")
    assert ("is ruled out" in said) == (word == "not worse")
    assert ("a loss of more than 2 points is shown" in said) == (word == "worse")
    assert ("neither a loss of 0.1 points nor its absence" in said) == (word == "inconclusive")


def test_holm_is_over_the_methods_and_no_controls(tmp_path: Path) -> None:
    def outcome(arm: str, unit: Unit) -> bool:
        lost = {PRUNED: 6, "vla-pruner-0.5-drop-K3-presetpaper": 7}.get(arm, 0)
        return not unit.initial_state < lost or unit.task_id == 0

    summary = summarize(made(tmp_path, outcome, keep=(0.25, 0.5)))
    arms = summary.of("method")
    plain = [paired_difference([True] * 120, [True] * (120 - lost) + [False] * lost).p_value for lost in (6, 7)]
    assert [arm.p_adjusted for arm in arms] == pytest.approx(holm(plain))
    assert arms[0].p_adjusted == pytest.approx(plain[0]), "the larger one stays"
    assert arms[1].p_adjusted == pytest.approx(2 * plain[1])
    assert all(arm.p_adjusted is None for arm in summary.arms if arm.kind != "method")


def test_holm_is_in_the_verdicts_too(tmp_path: Path) -> None:
    def outcome(arm: str, unit: Unit) -> bool:
        return not (arm.startswith("vla-pruner") and unit.initial_state in (3, 30))

    counts = ((58, 0, 2, 0),) * 2
    margin = 0.085
    p = Pairs(counts).p_not_worse(margin)
    assert 0.0125 < p < 0.025
    alone = summarize(made(tmp_path, outcome, margin=margin)).of("method")[0].verdict
    assert alone is not None
    assert (alone.word, alone.p_not_worse) == ("not worse", pytest.approx(p))
    for arm in summarize(made(tmp_path, outcome, margin=margin, keep=(0.25, 0.5))).of("method"):
        assert arm.verdict is not None
        assert (arm.verdict.word, arm.verdict.p_not_worse) == ("inconclusive", pytest.approx(2 * p))
        assert arm.verdict.p_worse == 1.0


def test_a_crash_counts_nowhere(tmp_path: Path) -> None:
    def outcome(arm: str, unit: Unit) -> bool | None:
        return None if (arm, unit.initial_state, unit.task_id) == (PRUNED, 5, 1) else usual(arm, unit)

    run = made(tmp_path, outcome)
    summary = summarize(run)
    pruned = summary.of("method")[0]
    assert (pruned.success.successes, pruned.success.total, pruned.crashed) == (104, 119, 1)
    assert pruned.difference is not None
    assert (pruned.difference.lost, pruned.difference.pairs) == (3, 119)
    assert summary.baseline.success.total == 120
    assert not summary.complete
    said = sentences(summary)
    assert any(one.startswith("1 episode crashed. They count neither") for one in said)
    info = eval_info(run, summary, said)
    assert info["arms"][PRUNED]["overall"]["n_episodes"] == 119
    assert info["errors"] == [
        {
            "arm": PRUNED,
            "task_group": "fake",
            "task_id": 1,
            "init_state_id": 5,
            "attempt": 1,
            "type": "OSError",
            "message": "gone",
            "where": "x.py:1 f",
        }
    ]


def test_the_controls_speak(tmp_path: Path) -> None:
    said = sentences(summarize(made(tmp_path, usual)))
    assert "Choosing beats drawing at random: +26.7 points" in said[0]
    assert any(one.startswith("Noise floor: two runs of the unpruned policy disagree on 14 of 120") for one in said)
    assert any(
        "With black images the policy solves 0 of 120, against 108 of 120: it needs to see" in one for one in said
    )
    blind = sentences(summarize(made(tmp_path, lambda arm, unit: True)))
    assert any("it is not shown that it needs to see" in one for one in blind)
    assert any(
        "agree in 120 of 120 episodes; that they disagree on more than 2.5 % is ruled out" in one for one in blind
    )
    assert not any("Not for claims" in one for one in said)
    few = sentences(summarize(made(tmp_path, usual, episodes=10)))
    assert any("Not for claims" in one for one in few)
    nothing = summarize(made(tmp_path, lambda arm, unit: False, margin=0.05))
    (judged,) = [arm.verdict for arm in nothing.of("method")]
    assert judged is not None
    assert (judged.word, judged.more, judged.at_stake) == ("inconclusive", None, False)
    assert judged.p_not_worse < 0.025
    never = sentences(nothing)
    assert (
        "inconclusive, 0 points (-3.1 to +3.1) against unpruned on 120 pairs, of which the unpruned policy" in never[0]
    )
    assert never[0].endswith("solved none: there is nothing that pruning could lose.")
    assert any("The unpruned policy solved nothing" in one for one in never)


@pytest.mark.parametrize(
    ("solved", "said"), [(60, ""), (30, ""), (29, "4 % of what"), (6, "20 % of what"), (2, "60 % of what"), (1, "more")]
)
def test_a_policy_that_mostly_fails_has_little_to_lose(tmp_path: Path, solved: int, said: str) -> None:
    found = sentences(summarize(made(tmp_path, lambda arm, unit: unit.initial_state < solved, margin=0.02)))
    told = " ".join(one for one in found if "The unpruned policy solved only" in one)
    assert bool(told) == bool(said)
    if told:
        assert f"solved only {2 * solved} of 120" in told
        assert f"a loss of 2 points would be {said}" in told


def test_eval_info_has_lerobots_keys(tmp_path: Path) -> None:
    run = made(tmp_path, usual)
    summary = summarize(run)
    info = eval_info(run, summary, sentences(summary))
    json.dumps(info, allow_nan=False)
    first = info["per_task"][0]
    assert set(first) == {"task_group", "task_id", "metrics"}
    assert (first["task_group"], first["task_id"]) == ("fake", 0)
    lists = {name: values for name, values in first["metrics"].items() if "video" not in name}
    assert {"sum_rewards", "max_rewards", "successes"} < set(first["metrics"])
    assert {"video_paths", "predicted_video_paths"} < set(first["metrics"])
    assert {len(values) for values in lists.values()} == {60}
    assert lists["init_state_ids"] == list(range(60))
    keys = {"avg_sum_reward", "avg_max_reward", "pc_success", "n_episodes", "video_paths", "predicted_video_paths"}
    assert set(info["per_group"]["fake"]) == keys
    assert set(info["overall"]) == {*keys, "eval_s", "eval_ep_s"}
    assert info["overall"]["pc_success"] == pytest.approx(90.0)
    assert info["overall"] == info["arms"]["unpruned"]["overall"]
    assert info["arms"][PRUNED]["overall"]["pc_success"] == pytest.approx(100 * 104 / 120)
    assert info["summary"]["margin"] == 0.02
    assert info["run"]["run"] == run.manifest.run
    alone = of_arms(info)
    assert list(alone) == list(info["arms"])
    for key, content in alone.items():
        assert content["arm"]["key"] == key
        assert {name: content[name] for name in ("per_task", "per_group", "overall")} == info["arms"][key]


def test_an_arm_whose_key_is_no_file_name_has_a_folder_of_its_own(tmp_path: Path) -> None:
    run = made(tmp_path, usual)
    summary = summarize(run)
    info = eval_info(run, summary, sentences(summary))
    key = "my/method:" + 200 * "x"
    info["arms"] = {key: info["arms"][PRUNED], f"{key}y": info["arms"][PRUNED]}
    info["run"]["identity"]["arms"] = [{"key": key}, {"key": f"{key}y"}]
    folders = list(of_arms(info))
    assert len(set(folders)) == 2
    for folder in folders:
        assert folder.startswith("my_method_xxx")
        assert len(folder) < 200


def test_tangos_interval_is_beside_newcombes(tmp_path: Path) -> None:
    summary = summarize(made(tmp_path, usual))
    assert summary.baseline.tango is None
    row = summary.of("method")[0]
    assert row.difference is not None
    assert row.tango == Pairs(((104, 0, 4, 12),)).tango()
    assert summary.to_json()["arms"][1]["tango"] == list(row.tango)


def test_tangos_interval_is_shown_where_it_is_asked_for(tmp_path: Path) -> None:
    run = made(tmp_path, usual)
    usually, asked = summarize(run), summarize(run, TANGO)
    assert (usually.interval, asked.interval) == (NEWCOMBE, asked.to_json()["interval"]) == (NEWCOMBE, TANGO)
    for before, after in zip(usually.arms[1:], asked.arms[1:], strict=True):
        assert after.difference is not None
        assert before.difference is not None
        assert (after.difference.low, after.difference.high) == after.tango == before.tango
        limits = {"low": before.difference.low, "high": before.difference.high}
        assert dataclasses.replace(after.difference, **limits) == before.difference
        assert (after.verdict, after.p_adjusted) == (before.verdict, before.p_adjusted)
    lost = asked.arms[1].difference_by_task["fake/push"]
    assert (lost.low, lost.high) == Pairs(((50, 0, 4, 6),)).tango()
    drawn = [summary.arms[1].against_random for summary in (usually, asked)]
    assert drawn[0] is not None
    assert drawn[1] is not None
    assert drawn[0].value == drawn[1].value
    assert drawn[0].low != drawn[1].low
    assert "with Tango's score interval for pairs" in to_markdown(asked, [])
    assert "with Newcombe's interval for pairs, tasks as strata" in to_markdown(usually, [])


def test_the_tables_fit_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = summarize(made(tmp_path, usual))
    console = Console(width=80, highlight=False)
    console.print(to_rich("outcomes", OUTCOMES, outcome_rows(summary)))
    console.print(to_rich("costs", COSTS, cost_rows(summary)))
    text = capsys.readouterr().out
    assert "…" not in text
    for cell in (*outcome_rows(summary)[1][1:], *cost_rows(summary)[1][1:]):
        assert all(line in text for line in cell.split("\n")), cell
    assert outcome_rows(summary)[1] == (
        "vla-pruner 0.25 drop K=3 preset=paper",
        "104/120",
        "86.7\n79.4 to 91.6",
        "-3.3\n-7.9 to +0.6",
        "0/4",
        ".125",
        "inconclusive",
    )
    markdown = to_markdown(summary, sentences(summary))
    assert "| vla-pruner 0.25 drop K=3 preset=paper | 104/120 |" in markdown


def test_suites_have_a_table_of_their_own(tmp_path: Path) -> None:
    summary = summarize(made(tmp_path, usual))
    assert suite_table(summary) == (("arm", "fake"), [])
    for arm in summary.arms:
        arm.by_task["other/fly"] = (1, 4)
    heads, rows = suite_table(summary)
    assert heads == ("arm", "fake", "other")
    assert rows[1] == ("vla-pruner 0.25 drop K=3 preset=paper", "104/120, 86.7 %", "1/4, 25 %")
    assert "| arm | fake | other |" in to_markdown(summary, [])


def test_a_method_that_pruned_nothing_is_no_result(tmp_path: Path) -> None:
    run = made(tmp_path, usual)
    run.records = {key: dataclasses.replace(one, pruned_steps=0, kept_tokens=[]) for key, one in run.records.items()}
    assert "it pruned no control step, so it is the unpruned policy" in sentences(summarize(run))[0]


def test_a_run_without_pairs_has_a_table(tmp_path: Path) -> None:
    run = made(tmp_path, usual)
    run.records = {key: record for key, record in run.records.items() if record.arm == PRUNED}
    summary = summarize(run)
    assert summary.baseline.success.total == 0
    assert math.isnan(summary.baseline.latency_p50_ms)
    assert outcome_rows(summary)[0] == ("unpruned", "0/0", "-", "-", "-", "-", "")
    assert cost_rows(summary)[0] == ("unpruned", "-", "-", "-", "-", "-", "-", "0")
    assert sentences(summary)[0].endswith("no episode was finished by it and by the unpruned policy.")
    json.dumps(summary.to_json(), allow_nan=False)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return the values of nested JSON by their paths."""
    if not isinstance(value, (dict, list)):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {where: one for name, part in items for where, one in flat(part, f"{path}/{name}").items()}


@pytest.mark.parametrize("file", sorted(PUBLISHED.rglob("episodes.jsonl.gz")), ids=lambda file: file.parent.name)
def test_published_figures_are_those_of_their_records(file: Path) -> None:
    manifest = Manifest.read(file.parent)
    records = latest(read_lines(file, gzip.decompress(file.read_bytes())), str(file))
    published = json.loads((file.parent / "summary.json").read_text())["summary"]
    found = json.loads(json.dumps(summarize(Run(manifest, records)).to_json()))
    rounded = {
        where: pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
        for where, value in flat(published).items()
    }
    # Older files lack later fields.
    assert {where: value for where, value in flat(found).items() if where in rounded} == rounded


def test_a_summary_is_a_value(tmp_path: Path) -> None:
    summary = summarize(made(tmp_path, usual))
    assert isinstance(summary, Summary)
    assert dataclasses.replace(summary) == summary


def frozen_saves(arm: str, unit: Unit) -> bool:
    """Return an outcome in which dropping fails every other episode; freezing and unpruned fail every tenth."""
    return unit.initial_state % 10 != 0 and ("drop" not in arm or unit.initial_state % 2 == 1)


def test_freezing_is_compared_with_the_same_dropped(tmp_path: Path) -> None:
    run = made(tmp_path, frozen_saves, pruned=("drop", "freeze"), keep=(0.25, 0.5))
    summary = summarize(run)
    rows = {arm.title: arm.against_drop for arm in summary.arms}
    assert rows["vla-pruner 0.25 drop K=3 preset=paper"] is None
    assert rows["unpruned"] is None
    for keep in ("0.25", "0.5"):
        found = rows[f"vla-pruner {keep} freeze K=3 preset=paper"]
        assert found is not None
        assert (found.gained, found.lost) == (2 * EPISODES * 4 // 10, 0)
    said = [sentence for sentence in sentences(summary) if "the same dropped" in sentence]
    assert len(said) == 2
    assert all(sentence.endswith("freezing solves more.") for sentence in said)
    assert said[0].startswith("vla-pruner 0.25 freeze K=3 preset=paper against the same dropped: +40 points")
    overall = "in 2 settings: freezing solves more in {}, dropping in {}, and no difference is shown in {}."
    assert overall.format(2, 0, 0) in " ".join(sentences(summary))

    def mixed(arm: str, unit: Unit) -> bool:
        worse = "0.5-freeze" in arm or "0.25-drop" in arm
        return not (worse and unit.initial_state % 2) or "0.125" in arm

    three = made(tmp_path, mixed, pruned=("drop", "freeze"), keep=(0.25, 0.5, 0.125))
    assert overall.replace("2 settings", "3 settings").format(1, 1, 1) in " ".join(sentences(summarize(three)))
    alone = summarize(made(tmp_path, frozen_saves, pruned=("drop", "freeze")))
    assert "Freezing or dropping" not in " ".join(sentences(alone)), "one comparison speaks for itself"


def test_freezing_is_compared_with_the_same_reuse_in_the_vision_encoder(tmp_path: Path) -> None:
    """Of two pairs that differ in the encoder alone, each is compared within itself."""

    def outcome(arm: str, unit: Unit) -> bool:
        return unit.initial_state % 2 == 1 if "drop" in arm and "encoder" not in arm else True

    run = made(tmp_path, outcome, pruned=("drop", "freeze"), encoder_keep=(1.0, 0.5))
    rows = {arm.title: arm.against_drop for arm in summarize(run).arms}
    within = {title: found.gained for title, found in rows.items() if found is not None}
    assert within == {
        "vla-pruner 0.25 freeze K=3 preset=paper": EPISODES,
        "vla-pruner 0.25 freeze K=3 preset=paper encoder=0.5": 0,
    }
    alone = made(tmp_path, outcome, pruned=("freeze",), encoder_keep=(0.5,))
    (arm,) = summarize(alone).of("method")
    assert arm.against_drop is None


def test_episodes_that_no_task_has_are_not_asked_for(tmp_path: Path) -> None:
    """A suite's task has 100 initial states here; LIBERO's have 50, and a verdict may ask for hundreds."""
    summary = summarize(made(tmp_path, usual))
    (arm,) = summary.of("method")
    assert arm.verdict is not None
    assert arm.verdict.more is not None
    assert (summary.left, arm.verdict.more > 40) == (40, True)
    assert any(one.startswith("A task has 40 initial states left, fewer than some") for one in sentences(summary))
    for left in (arm.verdict.more, None):
        enough = dataclasses.replace(summary, left=left)
        assert "initial states left" not in " ".join(sentences(enough))


@pytest.mark.parametrize("key", ["", ".", "..", "a/../b", "/etc", "..\\x", "é" * 300])
def test_an_arm_of_any_name_has_a_folder_of_its_own(key):
    """The arms of a merged run may have any names."""
    info = {"run": {"identity": {"arms": [{"key": key}, {"key": "unpruned"}]}}, "arms": {key: {}, "unpruned": {}}}
    first, second = of_arms(info)
    assert second == "unpruned"
    assert len(first) < 200
    assert (Path("run") / first).resolve().parent == Path("run").resolve()
