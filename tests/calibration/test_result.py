"""Estimates, the choice within a tolerance, files, and the rank correlation with closed-loop loss."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_pruner.bootstrap import Estimate, mean_estimate, mean_upper_bound, rank_correlation
from vla_pruner.calibration import ArmCalibration, Calibration, CalibrationError, agreement
from vla_pruner.calibration.agreement import arms_of, closed_loop_losses
from vla_pruner.calibration.command import sentences
from vla_pruner.evaluation.arms import all_arms, method_arms

# Standard error 1 of nine values: four at -SPREAD, one at 0, four at SPREAD.
SPREAD = 3.0
T_OF_NINE = 2.3060


def arm(
    key: str, moved: float | None, high: float | None = None, ms: float = 10.0, kind: str = "method"
) -> ArmCalibration:
    estimate = None if moved is None else Estimate(moved, None if high is None else 2 * moved - high, high)
    # Nine episodes, whose spread makes the bound of a single setting `high`.
    values: list[float | None] = [moved]
    if moved is not None and high is not None:
        step = (high - moved) / T_OF_NINE
        values = [moved + step * place for place in (*[-SPREAD] * 4, 0.0, *[SPREAD] * 4)]
    return ArmCalibration(key, key, kind, "", estimate, estimate, [], values, 100, 50, ms)


def calibration(*arms: ArmCalibration, **changes: Any) -> Calibration:
    baseline = arm("unpruned", 0.0, 0.0, 20.0, "baseline")
    return Calibration([baseline, *arms], ["a", "b"], [1.0], [], "abc", **changes)


def test_an_interval_over_episodes_holds_the_mean_and_narrows_with_more() -> None:
    generator = np.random.default_rng(0)
    values = generator.gamma(2.0, size=40).tolist()
    few, many = mean_estimate(values[:10]), mean_estimate(values)
    assert few.low is not None
    assert few.high is not None
    assert many.low is not None
    assert many.high is not None
    assert few.low < few.value < few.high
    assert many.high - many.low < few.high - few.low
    assert mean_estimate(values) == many, "drawn by a fixed seed"
    assert mean_estimate([3.0]) == Estimate(3.0, None, None)
    assert mean_estimate([3.0, 3.0]) == Estimate(3.0, 3.0, 3.0)
    assert mean_estimate([0.1 + 0.2, 0.3]).high == pytest.approx(0.3)


def test_most_intervals_cover_the_truth() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        found = mean_estimate(generator.normal(5.0, 1.0, 20).tolist())
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 5.0 <= found.high
    assert 50 <= covered <= 60


def test_a_rank_correlation_is_of_ranks() -> None:
    one = np.linspace(0, 1, 12)
    perfect = rank_correlation(one.tolist(), np.exp(9 * one).tolist())
    assert perfect.value == pytest.approx(1.0)
    assert perfect.low == pytest.approx(1.0)
    assert rank_correlation(one.tolist(), (-one).tolist()).value == pytest.approx(-1.0)
    noisy = rank_correlation(one.tolist(), (one + np.random.default_rng(0).normal(0, 0.4, 12)).tolist())
    assert noisy.low is not None
    assert noisy.high is not None
    assert -1 < noisy.low < noisy.value < noisy.high <= 1
    with pytest.raises(ValueError, match="no 4 pairs"):
        rank_correlation([1, 2, 3], [1, 2, 3])
    with pytest.raises(ValueError, match="have no ranks"):
        rank_correlation([1, 2, 3, 4], [2, 2, 2, 2])
    ties = rank_correlation(list(range(8)), [0] * 7 + [1])
    assert ties.low is not None
    assert np.isfinite(ties.low)


def test_few_pairs_in_the_same_order_have_no_interval() -> None:
    few = rank_correlation([1, 2, 3, 4], [1, 2, 3, 4])
    assert (few.value, few.low, few.high) == (pytest.approx(1.0), None, None)
    assert rank_correlation(list(range(7)), list(range(7))).low is None
    assert rank_correlation(list(range(8)), list(range(8))).low is not None
    moved, lost = np.random.default_rng(0).normal(size=(2, 42)).tolist()
    assert rank_correlation(moved, lost, [place // 6 for place in range(42)]).low is None, (
        "7 methods, however many arms"
    )


def test_arms_of_one_method_are_no_independent_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No relation at all, 12 methods, 6 arms of each that are alike."""
    monkeypatch.setattr("vla_pruner.bootstrap.RESAMPLES", 1000)
    generator, methods = np.random.default_rng(1), np.repeat(np.arange(12), 6).tolist()
    missed = {"arms": 0, "methods": 0}
    for _ in range(20):
        one, other = (np.repeat(generator.normal(size=12), 6) + generator.normal(0, 0.3, 72) for _ in range(2))
        for name, clusters in (("arms", None), ("methods", methods)):
            found = rank_correlation(one.tolist(), other.tolist(), clusters)
            assert found.low is not None
            assert found.high is not None
            missed[name] += not found.low <= 0.0 <= found.high
    assert missed["methods"] <= 3, "5 % are meant"
    assert missed["arms"] >= 8


def test_within_a_keep_unrelated_methods_are_unrelated() -> None:
    """A smaller keep moves and loses more, and methods differ without any relation."""
    generator = np.random.default_rng(1)
    offline, closed = generator.normal(size=(2, 12))
    keeps = np.tile([0.0, 1.5, 3.0], 12)
    one = np.repeat(offline, 3) + keeps + generator.normal(0, 0.2, 36)
    other = np.repeat(closed, 3) + keeps + generator.normal(0, 0.2, 36)
    methods = np.repeat(np.arange(12), 3).tolist()
    pooled = rank_correlation(one.tolist(), other.tolist(), methods)
    within = rank_correlation(one.tolist(), other.tolist(), methods, keeps.tolist())
    each = [rank_correlation(one[keeps == keep].tolist(), other[keeps == keep].tolist()).value for keep in (0, 1.5, 3)]
    assert within.value == pytest.approx(np.mean(each))
    assert within.low is not None
    assert within.high is not None
    assert pooled.low is not None
    assert pooled.low > 0.0
    assert within.low <= 0.0 <= within.high


def test_the_fastest_setting_within_the_tolerance_is_chosen_by_its_upper_bound() -> None:
    one = calibration(arm("slow", 0.01, 0.02, 18.0))
    assert sentences(one, 0.1, None) == [
        "Of the one setting, 1 is within 0.1, and the fastest is slow (18.0 ms, unpruned 20.0 ms; upper bound 0.020). "
        "Confirm it on other episodes."
    ]
    found = calibration(
        arm("slow", 0.01, 0.02, 18.0),
        arm("fast", 0.05, 0.08, 12.0),
        arm("uncertain", 0.05, 0.09, 8.0),
        arm("random", 0.01, 0.02, 1.0, "random"),
        arm("never", None),
    )
    assert [one.key for one in found.within(0.1)] == ["fast", "slow"], "uncertain would do alone, not among three"
    assert [one.key for one in found.within(0.2)] == ["uncertain", "fast", "slow"]
    (told,) = sentences(found, 0.1, None)
    assert told.startswith("Of 3 settings compared, 2 are within 0.1, and the fastest is fast (12.0 ms")
    (told,) = sentences(found, 0.001, None)
    assert told.startswith(
        "Of 3 settings compared, none is within 0.001: the nearest is slow, whose upper bound is 0.0"
    )
    slower = calibration(arm("slow", 0.01, 0.02, 30.0))
    assert "none was faster than unpruned: slow (30.0 ms" in sentences(slower, 0.1, None)[0]
    assert sentences(calibration(arm("x", 0.01)), 0.1, None)[0].startswith(
        "No setting is chosen: a choice needs 8 episodes"
    )


def test_a_bound_holds_for_all_that_are_compared() -> None:
    generator = np.random.default_rng(0)
    for settings in (1, 20):
        missed = 0
        for _ in range(200):
            bounds = [mean_upper_bound(generator.normal(1.0, 0.5, 12).tolist(), settings) for _ in range(settings)]
            missed += min(bound for bound in bounds if bound is not None) < 1.0
        assert missed <= 12, settings
    assert mean_upper_bound([1.0] * 7, 1) is None
    assert mean_upper_bound([1.0] * 8, 5) == 1.0


def test_other_weights_and_other_results_are_said() -> None:
    assert sentences(calibration(arm("a", 0.1, 0.2)), None, None) == []
    other = calibration(arm("a", 0.1, 0.2), conditions={"recorded_weights": "xyz"}, against_recorded=1.0)
    assert "recorded by a policy with other weights" in sentences(other, None, None)[0]
    same = calibration(arm("a", 0.1, 0.2), conditions={"recorded_weights": "abc"}, against_recorded=0.01)
    assert "up to 0.01 from those that were recorded with the same weights" in sentences(same, None, None)[0]
    still = dataclasses.replace(same, left_out=[3, 4], against_recorded=0.0)
    assert sentences(still, None, None) == ["The recorded actions never change in dimension 3, 4, which is left out."]
    short = calibration(dataclasses.replace(arm("a", None), pruned_steps=0), arm("b", 0.1, 0.2))
    (told,) = sentences(short, None, None)
    assert told.startswith("a: no control step was pruned, so nothing moved")


def test_a_file_reads_as_it_was_written(tmp_path: Path) -> None:
    found = calibration(arm("a", 0.1, 0.2), arm("b", None), against_recorded=0.5, conditions={"x": 1})
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**found.to_json(), "tolerance": 1}))
    assert Calibration.read(path) == found
    with pytest.raises(CalibrationError, match=r"cannot be read \(No such file"):
        Calibration.read(tmp_path / "none.json")
    for content in ("{", "[]", "{}", '{"format": "vla-pruner calibrate 9"}', '{"format": "vla-pruner calibrate 1"}'):
        path.write_text(content)
        with pytest.raises(CalibrationError, match="is no file of vla-pruner calibrate --json, or is damaged"):
            Calibration.read(path)


def evaluation(
    folder: Path,
    losses: dict[str, tuple[float, int]],
    weights: str = "abc",
    name: str = "eval_info.json",
    seed: int = 0,
    first: int = 0,
) -> Path:
    folder.mkdir()
    arms = [{"key": "unpruned", "kind": "baseline", "difference": None}]
    arms += [
        {"key": key, "kind": "random" if "random" in key else "method", "difference": {"value": -loss, "pairs": pairs}}
        for key, (loss, pairs) in losses.items()
    ]
    arms.append({"key": "blank-image", "kind": "blank", "difference": {"value": -0.9, "pairs": 50}})
    # Without options, as before arms carried them.
    titles = [one["key"] if " " in one["key"] else f"{one['key']} 0.5 drop K=3" for one in arms]
    identity = {"weights": weights, "arms": [{**one, "title": title} for one, title in zip(arms, titles, strict=True)]}
    plan = {"tasks": [{"suite": "s", "name": "t"}], "first": first, "episodes": 10, "policy_seed": seed}
    content = {"run": {"identity": identity, "plan": plan}, "summary": {"arms": arms}}
    (folder / name).write_text(json.dumps(content))
    return folder


def test_the_correlation_is_over_the_pruning_arms_that_both_have(tmp_path: Path) -> None:
    losses = {"a": (0.0, 10), "b": (0.1, 10), "c": (0.2, 10), "random-d": (0.5, 10), "elsewhere": (0.9, 10)}
    folder = evaluation(tmp_path / "e", losses)
    moved = {"a": 0.1, "b": 0.2, "c": 0.15, "random-d": 0.7}
    found = calibration(
        *(arm(key, value, value, kind="random" if "random" in key else "method") for key, value in moved.items()),
        arm("blank-image", 9.0, 9.0, kind="blank"),
        arm("mine-alone", 0.3, 0.3),
    )
    got = agreement(found, [folder])
    assert [(pair.key, pair.moved, pair.loss) for pair in got.arms] == [
        (key, moved[key], losses[key][0]) for key in moved
    ]
    assert got.correlation is not None
    assert got.correlation.value == pytest.approx(0.8), "one swap among four"
    assert sentences(found, None, got) == [
        "Spearman's rank correlation of how far an arm moves the action with its loss in closed loop is 0.80 over all "
        "4 arms of 4 methods, in which a smaller keep moves and loses more; within one keep and fate it is 0.80, "
        "the mean over 1 of these. An interval needs 8 methods."
    ]
    with pytest.raises(CalibrationError, match=r"with other weights \(xyz\) than were calibrated \(abc\)"):
        agreement(found, [evaluation(tmp_path / "other", losses, "xyz")])


def test_without_an_order_there_is_no_correlation_and_it_says_why(tmp_path: Path) -> None:
    losses = {"a": (0.0, 10), "b": (0.1, 10), "c": (0.2, 10), "d": (0.5, 10)}
    folder = evaluation(tmp_path / "e", losses)
    level = evaluation(tmp_path / "level", dict.fromkeys(losses, (0.2, 10)), seed=1)
    none = "There is no rank correlation with the loss in closed loop: "
    few, moves_alike, loses_alike, nothing = (
        (calibration(arm("a", 0.1, 0.1), arm("b", None), arm("z", 0.1, 0.1)), folder),
        (calibration(*(arm(key, 0.5, 0.5) for key in losses)), folder),
        (calibration(*(arm(key, place, place) for place, key in enumerate(losses))), level),
        (calibration(arm("a", None)), folder),
    )
    for (found, against), said in (
        (few, "it needs 4 arms that prune and that both ran, and there are 1."),
        (moves_alike, "all 4 arms that both ran move the action the same, so they have no order."),
        (loses_alike, "all 4 arms that both ran lose the same, so they have no order."),
        (nothing, "it needs 4 arms that prune and that both ran, and there are 0."),
    ):
        got = agreement(found, [against])
        assert (got.correlation, got.within, got.settings) == (None, None, [])
        assert sentences(found, None, got) == [none + said]
    assert [pair.key for pair in agreement(few[0], [folder]).arms] == ["a"], "its loss is shown all the same"
    with pytest.raises(CalibrationError, match="shares no pruning arm with"):
        agreement(calibration(arm("z", 0.1, 0.1)), [folder])


def test_the_correlation_is_told_within_each_keep_too(tmp_path: Path) -> None:
    """Eight methods, of which the one that moves most loses least; a smaller keep moves and loses more."""
    titles = {(place, keep): f"m{place} {keep} drop K=3" for place in range(8) for keep in (0.5, 0.25)}
    losses = {title: ((0.5 - keep) * 3 - place / 100, 10) for (place, keep), title in titles.items()}
    moved = {title: (0.5 - keep) * 3 + place / 100 for (place, keep), title in titles.items()}
    found = calibration(*(arm(title, value, value) for title, value in moved.items()))
    got = agreement(found, [evaluation(tmp_path / "e", losses)])
    assert got.methods == 8
    assert got.settings == ["0.5 drop", "0.25 drop"]
    assert got.within is not None
    assert (got.within.value, got.within.low, got.within.high) == (pytest.approx(-1.0, abs=0.01),) * 3
    assert got.correlation is not None
    assert got.correlation.value > 0.4
    (told,) = sentences(found, None, got)
    assert "over all 16 arms of 8 methods" in told
    assert "within one keep and fate it is -1.00 (-1.00 to " in told
    assert told.endswith(", the mean over 2 of these. Intervals: 95 %, bootstrap over methods.")


def test_an_arm_of_two_evaluations_has_the_mean_of_its_pairs(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "1", {"a": (0.0, 30), "b": (0.2, 10)})
    two = evaluation(tmp_path / "2", {"a": (0.4, 10)}, name="summary.json", seed=1)
    assert closed_loop_losses([one, two]) == {"a": (pytest.approx(0.1), 40), "b": (pytest.approx(0.2), 10)}
    assert closed_loop_losses([two / "summary.json"]) == {"a": (pytest.approx(0.4), 10)}


def test_no_episode_counts_twice_and_no_two_plans_are_pooled(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "1", {"a": (0.1, 10)})
    copy = evaluation(tmp_path / "2", {"a": (0.1, 10)})
    harder = evaluation(tmp_path / "3", {"b": (0.5, 10)}, first=10)
    with pytest.raises(CalibrationError, match="names a folder twice"):
        closed_loop_losses([one, tmp_path / "2" / ".." / "1"])
    with pytest.raises(CalibrationError, match=r"ran the arm 'a 0\.5 drop K=3' in the same episodes"):
        closed_loop_losses([one, copy])
    drawn = [evaluation(tmp_path / name, {"random-x": (0.1, 10)}) for name in ("4", "5")]
    assert closed_loop_losses(drawn) == {"random-x": (pytest.approx(0.1), 10)}, "a control of both counts once"
    with pytest.raises(CalibrationError, match="ran other tasks, initial states or step limits"):
        closed_loop_losses([one, harder])


def test_evaluations_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"eval_info.json cannot be read .*--against names folders"):
        closed_loop_losses([tmp_path])
    for content in ("{", "[]", '{"overall": {}}'):
        (tmp_path / "eval_info.json").write_text(content)
        with pytest.raises(CalibrationError, match=r"is damaged, or not of vla-pruner eval"):
            closed_loop_losses([tmp_path])


def test_an_arm_of_the_summary_that_did_not_run_is_damage(tmp_path: Path) -> None:
    file = evaluation(tmp_path / "run", {"a": (0.1, 10)}) / "eval_info.json"
    content = json.loads(file.read_text())
    content["run"]["identity"]["arms"][1]["kind"] = "blank"
    file.write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match="its summary has the arm 'a' of kind 'method', which did not run"):
        closed_loop_losses([file.parent])


def test_the_arms_of_an_evaluation_are_made_anew(tmp_path: Path) -> None:
    names = ("vla-pruner:unseen=carry:window=5", "fastv", "max-min-diversity:metric=euclidean:warmup_steps=3", "random")
    methods = method_arms(names, (0.5, 64), (3, 2), ("drop", "freeze"), (1.0, 0.5))
    methods += method_arms(("fastv:warmup_steps=2",), (0.5,), (3,), ("drop",), (9,), 4)
    arms = all_arms(methods, ("again", "random", "blank"))
    identity = {"weights": "abc", "arms": [one.to_json() for one in arms]}
    path = tmp_path / "eval_info.json"
    path.write_text(json.dumps({"run": {"identity": identity}, "summary": {"arms": []}}))
    made = {one.key: one for one in arms_of([tmp_path, tmp_path])}
    assert set(made) == {one.key for one in arms[1:]}
    for one in arms[1:]:
        assert (made[one.key].method, made[one.key].kind) == (one.method, one.kind)
        assert made[one.key].encoder == one.encoder
    for one in identity["arms"]:
        one.pop("options", None)  # as before arms carried them
    path.write_text(json.dumps({"run": {"identity": identity}, "summary": {"arms": []}}))
    assert {one.key: one for one in arms_of([tmp_path])} == made
    identity["arms"][1]["title"] = "magic 0.5 drop K=3"
    path.write_text(json.dumps({"run": {"identity": identity}, "summary": {"arms": []}}))
    with pytest.raises(CalibrationError, match=r"has the arm 'magic 0.5 drop K=3', which this version cannot make"):
        arms_of([tmp_path])
