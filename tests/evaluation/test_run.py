"""Runs with a fake simulator: paired, in turns, the same noise, crashes, going on, and refusals."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.evaluation.fakes import FakeEnvironment, FakeSource, FakeSuite, ToyFlow, find_fake, settings, tiny_policy
from vla_pruner.attach.session import Session
from vla_pruner.errors import ObservationError, OptionError, VLAPrunerError
from vla_pruner.evaluation import EvaluationError, Record, Unit, read_records
from vla_pruner.evaluation.arms import Arm
from vla_pruner.evaluation.command import run_eval, run_merge
from vla_pruner.evaluation.episode import run_episode
from vla_pruner.evaluation.lockstep import run_together
from vla_pruner.evaluation.policies import check_fits
from vla_pruner.evaluation.records import EPISODES, TIMES
from vla_pruner.evaluation.settings import EvalSettings
from vla_pruner.evaluation.units import plan, shard
from vla_pruner.simulators.base import Convention, SuiteError, Task
from vla_pruner.statistics import PackageMissing

UNIT = Unit("fake", 0, "reach", 2, 0)


def run(asked: EvalSettings) -> tuple[int, str]:
    said = io.StringIO()
    return run_eval(asked, Console(file=said, width=200, highlight=False), find_fake), said.getvalue()


def facts(folder: Path) -> list[dict[str, Any]]:
    """The records without times."""
    found = [dataclasses.asdict(record) for record in read_records(folder / EPISODES)]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in found]


def test_every_arm_runs_the_same_units_in_turns(tmp_path: Path) -> None:
    code, said = run(settings(tmp_path))
    assert code == 0
    records = read_records(tmp_path / EPISODES)
    arms = ["unpruned", "unpruned-again", "blank-image"]
    turns = [[record.arm for record in records[place : place + 3]] for place in range(0, 18, 3)]
    assert turns == [arms[turn % 3 :] + arms[: turn % 3] for turn in range(6)]
    units = [record.unit for record in records[::3]]
    assert [(unit.task, unit.initial_state) for unit in units] == [
        (task, state) for state in range(3) for task in ("reach", "push")
    ]
    assert all(record.unit == units[place // 3] for place, record in enumerate(records))
    assert "6 episodes an arm, 2 tasks" in said
    assert records[0].versions["fake-simulator"] == "1"
    assert {record.attempt for record in records} == {1}


def test_an_episode_carries_out_what_the_convention_says() -> None:
    policy, environment = ToyFlow(0.01), FakeSuite().make(0)
    convention = FakeSuite().convention(policy)
    record = run_episode(policy, environment, convention, Arm("unpruned", "unpruned", "baseline"), UNIT, run="x")
    assert isinstance(environment, FakeEnvironment)
    assert environment.resets == [2]
    assert policy.resets == 1
    assert (record.success, record.termination) == (False, "max_steps")
    assert (record.steps, record.control_steps) == (6, 3), "two actions of each chunk"
    assert len(record.latency_ms) == 3
    assert record.latency_p50_ms == pytest.approx(np.median(record.latency_ms), abs=2e-3)
    shorter = run_episode(
        policy, environment, convention, Arm("unpruned", "unpruned", "baseline"), UNIT, run="x", max_steps=3
    )
    assert (shorter.steps, shorter.control_steps) == (3, 2)


def test_the_noise_is_the_units_and_the_steps_alone() -> None:
    environment, torch_before = FakeSuite().make(0), torch.random.get_rng_state()

    def drawn(kind: str, unit: Unit) -> list[float]:
        policy = ToyFlow(0.01)
        run_episode(policy, environment, FakeSuite().convention(policy), Arm(kind, kind, kind), unit, run="x")
        return policy.drawn

    first = drawn("baseline", UNIT)
    assert len(set(first)) == 3
    torch.rand(5)
    assert drawn("blank", UNIT) == first == drawn("method", UNIT)
    assert drawn("again", UNIT) != first
    for other in (
        dataclasses.replace(UNIT, initial_state=3),
        dataclasses.replace(UNIT, policy_seed=1),
        dataclasses.replace(UNIT, task_id=1),
        dataclasses.replace(UNIT, suite="other"),
    ):
        assert not set(drawn("baseline", other)) & set(first)
    torch.random.set_rng_state(torch_before)
    run_episode(ToyFlow(), environment, FakeSuite().convention(ToyFlow()), Arm("a", "a", "baseline"), UNIT, run="x")
    assert torch.equal(torch.random.get_rng_state(), torch_before)


class Wavering(FakeEnvironment):
    """Solved in the second and third step, and from the fifth on if the start is 1; its task goes on."""

    def __init__(self, ends_at_success: bool) -> None:
        task = dataclasses.replace(FakeSuite().tasks[0], ends_at_success=ends_at_success)
        super().__init__(task, 0.0, None)

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        seen, *_ = super().step(action)
        steps = len(self._actions)
        success = steps in (2, 3) or (steps >= 5 and self.resets[-1] == 1)
        over = steps == self.task.max_steps
        return seen, float(success), success and over, over and not success, {"success": success}


@pytest.mark.parametrize("together", [False, True])
def test_the_last_step_counts_where_success_does_not_end_an_episode(together: bool) -> None:
    def ran(ends_at_success: bool, start: int, max_steps: int | None = None) -> tuple[Any, ...]:
        environment, policy = Wavering(ends_at_success), ToyFlow(0.01)
        unit = dataclasses.replace(UNIT, initial_state=start)
        arm, convention = Arm("unpruned", "unpruned", "baseline"), FakeSuite().convention(policy)
        if together:
            batch = tiny_policy()
            convention = FakeSuite().convention(batch)
            ((_, record),) = run_together(
                batch, [environment], convention, arm, [unit], run="x", attempts=[1], max_steps=max_steps
            )
        else:
            record = run_episode(policy, environment, convention, arm, unit, run="x", max_steps=max_steps)
        return record.success, record.termination, record.steps, record.max_reward

    assert ran(True, 0) == (True, "success", 2, 1.0)
    assert ran(False, 0) == (False, "max_steps", 6, 1.0), "it was solved, and then no longer"
    assert ran(False, 1) == (True, "success", 6, 1.0)
    assert ran(False, 0, max_steps=3) == (True, "success", 3, 1.0)
    assert ran(False, 1, max_steps=4) == (False, "max_steps", 4, 1.0)


def test_the_blank_arm_sees_black() -> None:
    for kind, level in (("blank", 0), ("baseline", 255)):
        policy = ToyFlow()
        arm = Arm(kind, kind, kind)
        run_episode(policy, FakeSuite().make(0), FakeSuite().convention(policy), arm, UNIT, run="x")
        assert policy.seen[0].shape == (32, 32, 3)
        assert (max(image.max() for image in policy.seen) == 0) == (level == 0)


def test_a_finished_run_runs_nothing_again(tmp_path: Path) -> None:
    run(settings(tmp_path))
    before = (tmp_path / EPISODES).read_bytes()
    code, said = run(settings(tmp_path))
    assert code == 0
    assert "18 of 18 episodes are done" in said
    assert (tmp_path / EPISODES).read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "table.md").write_text("precious")
    with pytest.raises(EvaluationError, match=r"holds table\.md and no evaluation"):
        run(settings(tmp_path))
    assert (tmp_path / "table.md").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert run(settings(tmp_path / "empty"))[0] == 0


def test_going_on_in_the_middle_of_a_unit_gives_the_same_records(tmp_path: Path) -> None:
    run(settings(tmp_path / "whole"))
    run(settings(tmp_path / "cut"))
    lines = (tmp_path / "cut" / EPISODES).read_bytes().splitlines(keepends=True)
    (tmp_path / "cut" / EPISODES).write_bytes(b"".join(lines[:7]) + lines[7][:-20])
    code, said = run(settings(tmp_path / "cut"))
    assert code == 0
    assert "was cut off by a crash; its episode runs again" in said
    assert "7 of 18 episodes are done" in said
    assert facts(tmp_path / "cut") == facts(tmp_path / "whole")


def test_more_episodes_are_added_and_said(tmp_path: Path) -> None:
    run(settings(tmp_path))
    code, said = run(settings(tmp_path, episodes=4))
    assert code == 0
    assert "18 of 24 episodes are done" in said
    assert "Episodes were added after a first look (at 3 a task)" in said
    assert json.loads((tmp_path / "run.json").read_text())["extended"] == [3]
    with pytest.raises(EvaluationError, match="was started with 4 episodes a task, and 3 were asked"):
        run(settings(tmp_path))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed: 0, not 1"),
        ({"margin": 0.05}, "margin: 0.02, not 0.05"),
        ({"controls": ("again",)}, 'arms: .*"blank-image"'),
        ({"options": {"value": 0.7}}, "weights: "),
        ({"max_steps": 4}, "max_steps: null, not 4"),
        ({"suites": ("fake", "other")}, "another selection"),
        ({"tasks": ("push",)}, "another selection"),
        ({"first": 1}, "another selection"),
        ({"shard": (1, 2)}, "another selection"),
        ({"suite_options": {"version": "2"}}, "suite_options"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    run(settings(tmp_path, episodes=1))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(EvaluationError, match=named):
        run(settings(tmp_path, **{"episodes": 1, **changes}))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_each_arm_has_a_file_of_its_own(tmp_path: Path) -> None:
    run(settings(tmp_path, episodes=1))
    info = json.loads((tmp_path / "eval_info.json").read_text())
    assert {path.name for path in (tmp_path / "arms").iterdir()} == set(info["arms"])
    for key, content in info["arms"].items():
        alone = json.loads((tmp_path / "arms" / key / "eval_info.json").read_text())
        assert alone.pop("arm")["key"] == key
        assert alone == content
    shutil.rmtree(tmp_path / "arms")
    (tmp_path / "arms").write_text("in the way")
    with pytest.raises(EvaluationError, match=r"arms/unpruned cannot be made \(.*\)\. The episodes are safe"):
        run(settings(tmp_path, episodes=1))


def test_another_version_of_the_simulator_is_refused(tmp_path: Path) -> None:
    asked = settings(tmp_path, episodes=1)
    run(asked)
    with pytest.raises(EvaluationError, match="different versions \\(fake-simulator 2 and 1\\)"):
        run_eval(asked, Console(quiet=True), lambda name: find_fake(name, version="2"))


def test_a_crash_is_an_error_and_is_tried_again(tmp_path: Path) -> None:
    crash = tmp_path / "crash"
    crash.touch()
    asked = settings(tmp_path / "out", suite_options={"crash": crash})
    code, said = run(asked)
    assert code == 1
    # Each message once for all arms of an episode, in the order in which they ran.
    crashes = [line for line in said.splitlines() if line.startswith("Crashed: ")]
    where = "on fake task 0 (reach) from initial state 1: RuntimeError: the simulator is unstable"
    assert crashes[0].endswith(where)
    arms = [arm.key for arm in asked.arms()]
    assert sorted(crashes[0].removeprefix("Crashed: ").removesuffix(f" {where}").split(", ")) == sorted(arms)
    assert len(crashes) == 2
    assert "6 episodes crashed. They count neither as solved nor as failed" in said
    crashed = [record for record in read_records(tmp_path / "out" / EPISODES) if record.crashed]
    assert {record.success for record in crashed} == {None}
    assert {record.steps for record in crashed} == {1}
    assert all("fakes.py" in (record.error or {})["where"] for record in crashed)
    info = json.loads((tmp_path / "out" / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 4
    assert len(info["errors"]) == 6
    crash.unlink()
    code, said = run(asked)
    assert code == 0
    assert "12 of 18 episodes are done; 6 crashed and are tried again" in said
    again = [record for record in read_records(tmp_path / "out" / EPISODES) if record.attempt == 2]
    assert len(again) == 6
    assert not any(record.crashed for record in again)
    info = json.loads((tmp_path / "out" / "eval_info.json").read_text())
    assert (info["overall"]["n_episodes"], info["errors"]) == (6, [])


def test_an_environment_that_crashed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash, made = tmp_path / "crash", []
    crash.touch()
    make = FakeSuite.make
    monkeypatch.setattr(FakeSuite, "make", lambda suite, task: made.append(make(suite, task)) or made[-1])
    run(settings(tmp_path / "out", suite_options={"crash": crash}))
    assert len(made) == 2 + 6, "one for each task, and one after each crash"
    assert all(environment.closed for environment in made)


def test_too_many_crashes_end_the_run(tmp_path: Path) -> None:
    crash = tmp_path / "crash"
    crash.touch()
    with pytest.raises(EvaluationError, match="3 episodes crashed, more than --max-errors 2; the last was"):
        run(settings(tmp_path / "out", suite_options={"crash": crash}, max_errors=2))
    assert sum(record.crashed for record in read_records(tmp_path / "out" / EPISODES)) == 3


def test_an_interrupted_run_shows_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def act(self: ToyFlow, *arguments: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return np.zeros((1, 4), np.float32)

    with monkeypatch.context() as patch:
        patch.setattr(ToyFlow, "act", act)
        code, said = run(settings(tmp_path))
    assert code == 130
    assert "Interrupted" in said
    assert "The run is not finished: up to 6 of 6 episodes an arm are left" in said
    assert len(read_records(tmp_path / EPISODES)) == 1


def test_tiny_policy_is_pruned_and_its_tokens_are_counted(tmp_path: Path) -> None:
    asked = settings(
        tmp_path,
        "tiny",
        episodes=1,
        methods=("vla-pruner:window=1", "fastv"),
        layer=(1,),
        controls=("again", "random", "blank"),
    )
    assert run(asked)[0] == 0
    by_arm = {record.arm: record for record in read_records(tmp_path / EPISODES) if record.unit.task == "reach"}
    assert sorted(by_arm) == [
        "blank-image",
        "fastv-0.25-drop-K1",
        "random-0.25-drop-K1",
        "random-0.25-freeze-K1-after-1",
        "unpruned",
        "unpruned-again",
        "vla-pruner-0.25-freeze-K1-window1-semantic_querieslast",
    ]
    pruned, drawn = (
        by_arm["vla-pruner-0.25-freeze-K1-window1-semantic_querieslast"],
        by_arm["random-0.25-freeze-K1-after-1"],
    )
    for record in (pruned, drawn):
        assert (record.visual_tokens, record.kept_tokens) == (16, [4, 4])
        assert record.pruned_steps == record.control_steps - 1
    assert by_arm["fastv-0.25-drop-K1"].pruned_steps == by_arm["fastv-0.25-drop-K1"].control_steps
    assert (by_arm["unpruned"].visual_tokens, by_arm["unpruned"].kept_tokens) == (None, [])
    first, again = facts(tmp_path)[0], next(one for one in facts(tmp_path) if one["arm"] == "unpruned-again")
    assert {**first, "arm": ""} == {**again, "arm": ""}, "a policy that draws nothing repeats"
    summary = json.loads((tmp_path / "eval_info.json").read_text())["summary"]
    rows = {row["key"]: row for row in summary["arms"]}
    assert rows["fastv-0.25-drop-K1"]["against_random"]["pairs"] == 2
    assert rows["fastv-0.25-drop-K1"]["verdict"]["word"] == "inconclusive"
    assert rows["unpruned-again"]["verdict"] is None


def test_a_motion_gate_is_told_the_path_of_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, planned = [], []
    moved, plan = Session.moved, Convention.plan
    monkeypatch.setattr(Session, "moved", lambda self, distance: (told.append(distance), moved(self, distance))[1])
    monkeypatch.setattr(Convention, "plan", lambda self, chunk: (planned.append(plan(self, chunk)), planned[-1])[1])
    asked = settings(tmp_path, "tiny", episodes=1, methods=("text-query:gate=2", "fastv"), layer=(1,), controls=())
    assert run(asked)[0] == 0
    records = read_records(tmp_path / EPISODES)
    gated = [record for record in records if record.arm.startswith("text-query")]
    assert len(told) == sum(record.control_steps for record in gated) < len(planned), "no other arm is told"
    lengths = [float(sum(np.linalg.norm(action[:3]) for action in actions)) for actions in planned]
    assert any(lengths)
    assert all(any(distance == pytest.approx(length) for length in lengths) for distance in told)


def test_scripted_policies_go_through_the_same_path(tmp_path: Path) -> None:
    assert run(settings(tmp_path, "nothing"))[0] == 0
    records = read_records(tmp_path / EPISODES)
    assert {record.arm for record in records} == {"unpruned", "unpruned-again"}
    assert {record.success for record in records} == {False}
    assert run(settings(tmp_path / "expert", "expert"))[0] == 0
    assert {record.success for record in read_records(tmp_path / "expert" / EPISODES)} == {True}
    with pytest.raises(SuiteError, match="other has no scripted expert"):
        run(settings(tmp_path / "other", "expert", suites=("other",)))
    with pytest.raises(EvaluationError, match="--policy is nothing, which sees no images"):
        settings(tmp_path, "nothing", methods=("vla-pruner",))


def test_a_method_that_does_not_fit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"'vla-pruner 0\.25 freeze K=3 .*' does not fit this policy: layer=3"):
        run(settings(tmp_path, "tiny", methods=("vla-pruner",)))
    assert read_records(tmp_path / EPISODES) == []


@pytest.mark.parametrize("package", ["scipy.special", "statsmodels.stats.multitest"])
def test_a_package_that_the_summary_needs_is_missed_before_anything_runs(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LIBERO's extra brings scipy and not statsmodels, which only corrects the p-values of several methods."""
    several = settings(tmp_path / "run", "tiny", episodes=1, methods=("fastv", "random"), layer=(1,))
    assert run(several)[0] == 0
    monkeypatch.setitem(sys.modules, package, None)
    new = dataclasses.replace(several, out=tmp_path / "new")
    with pytest.raises(PackageMissing, match=f"need {package.split('.')[0]}, .* 'vla-pruner\\[eval\\]'"):
        run(new)
    with pytest.raises(PackageMissing, match="vla-pruner"):
        run_merge([several.out], tmp_path / "new", Console(quiet=True))
    assert not (tmp_path / "new").exists(), "neither episodes that would have to wait, nor a folder in the way"
    if package.startswith("statsmodels"):
        assert run(dataclasses.replace(new, methods=("fastv",)))[0] == 0, "one method needs no correction"


class OtherWords(FakeSuite):
    """The second task asks for what the tiny policy was never trained on."""

    @property
    def tasks(self) -> tuple[Task, ...]:
        first, second = super().tasks
        return first, dataclasses.replace(second, instruction="juggle the puck")


def test_instructions_that_the_policy_refuses_are_refused_before_anything_runs(tmp_path: Path) -> None:
    def ran(out: str, **changes: Any) -> int:
        asked = settings(tmp_path / out, "tiny", episodes=1, controls=(), **changes)
        return run_eval(asked, Console(quiet=True), lambda name: OtherWords(name))

    message = (
        r"instructions of 1 of 2 tasks, .*; choose others by --tasks, or give a policy .* on fake\. Task 1: .*juggle"
    )
    with pytest.raises(EvaluationError, match=message):
        ran("all")
    with pytest.raises(EvaluationError, match=r"of 1 of 1 task, so .* would all crash; give a policy"):
        ran("second", tasks=("1",))
    assert list(tmp_path.iterdir()) == [], "nothing is left of what could not begin"
    assert ran("first", tasks=("0",)) == 0


def test_images_that_a_policy_cannot_use_are_refused_before_anything_runs() -> None:
    def no_multiple(_: np.ndarray) -> np.ndarray:
        raise ObservationError("It sees square images of 128 pixels; found 224 x 224.")

    def package_missing(_: np.ndarray) -> np.ndarray:
        raise ModuleNotFoundError("LIBERO's images need simplejpeg; run: pip install simplejpeg")

    policy = ToyFlow()
    for prepare, message in ((no_multiple, "fake draws images of 224 x 224 .* of 128"), (package_missing, "run: pip")):
        with pytest.raises(SuiteError, match=message):
            check_fits(policy, SizedSuite(), Convention({"image": "corner"}, proprio=True, image=prepare))
    check_fits(policy, SizedSuite(), Convention({"image": "corner"}, proprio=True))


class SizedSuite(FakeSuite):
    """It says how large its images are."""

    image_size = 224


def test_tasks_and_suites_are_chosen_by_name_and_number(tmp_path: Path) -> None:
    asked = settings(tmp_path, suites=("fake", "other"), tasks=("1", "push"), episodes=1, controls=())
    assert run(asked)[0] == 0
    units = [record.unit for record in read_records(tmp_path / EPISODES)]
    assert [(unit.suite, unit.task) for unit in units] == [("fake", "push"), ("other", "push")]
    with pytest.raises(SuiteError, match="fake has no task 'fly'; its tasks are 0 reach, 1 push"):
        run(settings(tmp_path / "b", tasks=("fly",)))
    with pytest.raises(SuiteError, match="fake has no task '²'"):  # a digit, and no number
        run(settings(tmp_path / "b", tasks=("²",)))
    with pytest.raises(SuiteError, match="There is no suite 'mars'"):
        run(settings(tmp_path / "c", suites=("mars",)))


def test_presets(tmp_path: Path) -> None:
    source = FakeSource("flow")
    smoke = EvalSettings(source, ("fake",), tmp_path, preset="smoke")
    assert (smoke.tasks_a_suite, smoke.episodes_a_task, smoke.step_limit, smoke.for_claims) == (1, 1, 40, False)
    quick = EvalSettings(source, ("fake",), tmp_path)
    assert (quick.tasks_a_suite, quick.episodes_a_task, quick.step_limit, quick.for_claims) == (None, 10, None, False)
    standard = EvalSettings(source, ("libero",), tmp_path, preset="standard")
    assert (standard.tasks_a_suite, standard.episodes_a_task, standard.for_claims) == (None, 50, True)
    assert standard.suite_names == ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    assert not dataclasses.replace(standard, max_steps=100).for_claims
    assert [arm.kind for arm in standard.arms()] == ["baseline", "method", "again", "random", "blank"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "huge"}, "--preset is huge; it is one of smoke, quick, standard"),
        ({"episodes": 0}, "--episodes is 0; it is a whole number of 1 or more"),
        ({"margin": 2.0}, "--margin is 200"),
        ({"margin": 0.0}, "--margin is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"shard": (3, 2)}, "--shard is 3/2"),
        ({"controls": ("luck",)}, "--controls is luck; it is none, or some of again, random, blank"),
        ({"methods": ("fastv",), "pruned": ("melt",)}, "--pruned is melt"),
        ({"methods": ("none",), "keep": (0.5,)}, "--method is none, so --keep would be of no effect"),
        ({"methods": ("none",), "layer": (2,), "encoder_keep": (0.5,)}, "so --layer and --encoder-keep would be"),
        ({"methods": ("none",), "pruned": ("freeze",), "encoder_refresh": 2}, "so --pruned and --encoder-refresh"),
        ({"suites": ()}, "--suite names nothing"),
        ({"methods": ("vla-pruner:colour=red",)}, "--method has the option 'colour=red'; vla-pruner takes layer="),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(VLAPrunerError, match=message):
        settings(tmp_path, **changes)


def test_an_unknown_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--method is magic"):
        settings(tmp_path, methods=("magic",))


def test_units_and_shards() -> None:
    tasks = FakeSuite().tasks
    units = plan(tasks, 5, 10, 3)
    assert len(units) == len(set(units)) == 10
    assert {unit.initial_state for unit in units} == set(range(10, 15))
    parts = [shard(units, number, 3) for number in (1, 2, 3)]
    assert sorted(unit for part in parts for unit in part) == sorted(units)
    assert all(any(unit.task_id == task for unit in part) for part in parts for task in (0, 1))
    with pytest.raises(EvaluationError, match="fake has 100 initial states a task, and initial states 90 to 109"):
        plan(tasks, 20, 90, 0)


def test_a_record_reads_as_it_was_written() -> None:
    policy = ToyFlow()
    arm = Arm("unpruned", "unpruned", "baseline")
    record = run_episode(
        policy, FakeSuite().make(0), FakeSuite().convention(policy), arm, UNIT, run="x", versions={"torch": "2"}
    )
    assert Record.from_line(record.to_line()) == record


def test_a_policy_whose_actions_cannot_be_scaled_is_refused_before_the_first_episode() -> None:
    def statistics() -> None:
        raise ObservationError("The policy has statistics of several datasets; give unnorm_key.")

    policy: Any = SimpleNamespace(cameras=("image",), action_size=None, get_action_stats=statistics)
    suite: Any = SimpleNamespace(name="fake", cameras=("front",), action_size=7)
    with pytest.raises(ObservationError, match="several datasets"):
        check_fits(policy, suite, Convention({"image": "front"}, proprio=False))
