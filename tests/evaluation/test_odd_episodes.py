"""Environments that raise odd errors or return odd values: one crashed episode each, never the end of the run, and
never a success that was not claimed.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.evaluation.fakes import FakeEnvironment, FakeSuite, ToyFlow, find_fake, settings
from vla_pruner.errors import ObservationError, SessionError, VLAPrunerError
from vla_pruner.evaluation import EvaluationError, read_records
from vla_pruner.evaluation.command import run_eval
from vla_pruner.evaluation.records import EPISODES, Record
from vla_pruner.simulators.base import OutcomeError, SimulatorUnavailable, SuiteError, outcome, solved

Step = tuple[Any, Any, Any, Any, Any]


def run(out: Path, **changes: Any) -> tuple[int, str, list[Record]]:
    said = io.StringIO()
    asked = {"policy": "flow", "controls": ("again",), "episodes": 2, **changes}
    code = run_eval(settings(out, asked.pop("policy"), **asked), Console(file=said, width=200), find_fake)
    return code, said.getvalue(), read_records(out / EPISODES)


def odd(monkeypatch: pytest.MonkeyPatch, change: Callable[[Step], Step]) -> None:
    """Change every step of the start 1 of the second task, in every arm."""
    step = FakeEnvironment.step

    def changed(self: FakeEnvironment, action: np.ndarray) -> Any:
        said = step(self, action)
        return change(said) if (self.task.index, self.resets[-1]) == (1, 1) else said

    monkeypatch.setattr(FakeEnvironment, "step", changed)


def saying(name: str, value: Any) -> Callable[[Step], Step]:
    def change(said: Step) -> Step:
        fields = dict(zip(("observation", "reward", "terminated", "truncated", "info"), said, strict=True))
        if name == "success":
            fields["info"] = {"success": value}
        elif name == "proprio":
            seen = fields["observation"]
            fields["observation"] = dataclasses.replace(seen, proprio=seen.proprio * value)
        else:
            fields[name] = value
        return tuple(fields.values())  # type: ignore[return-value]

    return change


def raising(error: BaseException) -> Callable[[Step], Step]:
    def change(said: Step) -> Step:
        raise error

    return change


class Mute(Exception):
    def __str__(self) -> str:
        raise SystemExit


SAID = [
    ("reward", float("nan"), "reward is nan, which is no finite number"),
    ("reward", np.float32("inf"), "reward is .*inf.*, which is no finite number"),
    ("reward", "1", "reward is '1'"),
    ("reward", None, "reward is None"),
    ("reward", 1j, "reward is 1j"),
    ("reward", np.zeros(2), "reward is array"),
    ("success", float("nan"), "success is nan, which is neither True nor False"),
    ("success", 1, "success is 1,"),
    ("success", "False", "success is 'False'"),
    ("success", None, "success is None"),
    ("success", np.array([True]), "success is array"),
    ("terminated", float("nan"), "terminated is nan"),
    ("truncated", None, "truncated is None"),
    ("info", {}, "info does not say 'success'"),
    ("info", None, "info does not say 'success'"),
    ("proprio", np.nan, "state holds numbers that are not finite"),
]


@pytest.mark.parametrize(("name", "value", "told"), SAID, ids=[f"{name} {value}" for name, value, _ in SAID])
def test_an_outcome_that_can_be_none_is_a_crash_of_its_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, told: str
) -> None:
    odd(monkeypatch, saying(name, value))
    code, said, records = run(tmp_path / "out")
    assert code == 1
    assert len(records) == 8
    crashed = [record for record in records if record.crashed]
    assert {(one.unit.task, one.unit.initial_state) for one in crashed} == {("push", 1)}
    assert [one.arm for one in crashed] in (["unpruned", "unpruned-again"], ["unpruned-again", "unpruned"])
    assert {one.success for one in crashed} == {None}
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(crashed[0].error)
    assert "2 episodes crashed" in said
    assert "success=None" not in said


def test_numpys_scalars_are_an_outcome() -> None:
    assert outcome(np.float64(0.5), np.False_, np.True_, {"success": np.False_}) == (0.5, True, False)
    found = outcome(1, False, False, {"success": np.True_})
    assert found == (1.0, False, True)
    assert [type(one) for one in found] == [float, bool, bool]
    with pytest.raises(OutcomeError, match="reward is nan"):
        outcome(np.nan, False, False, {"success": True})


def test_rewards_that_add_up_to_infinity_are_no_lost_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd(monkeypatch, saying("reward", 1.5e308))
    code, _, records = run(tmp_path / "out")
    assert (code, len(records), sum(record.crashed for record in records)) == (1, 8, 2)


ERRORS = [
    SystemExit(3),
    GeneratorExit(),
    Mute(),
    StopIteration("over"),
    RuntimeError("mesh [/x] is [bold]unstable \x1b[2J\ud800"),
    SessionError("the image was asked for after the environment had moved on"),
    ObservationError("of the environment"),
    SuiteError("of the environment"),
    AssertionError(),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("batch", [1, 2])
def test_what_an_environment_raises_ends_its_own_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, batch: int
) -> None:
    odd(monkeypatch, raising(error))
    out = tmp_path / "out"
    asked: dict[str, Any] = {"policy": "tiny", "batch": batch, "controls": (), "episodes": 3}
    for attempt in (1, 2):  # the same command gets as far again
        code, said, records = run(out, **asked)
        assert code == 1
        done = [record for record in records if not record.crashed]
        assert len(done) == 5
        crashed = [record for record in records if record.crashed]
        assert [(one.unit.task, one.unit.initial_state, one.attempt) for one in crashed] == [
            ("push", 1, number) for number in range(1, attempt + 1)
        ]
        assert crashed[-1].error is not None
        assert crashed[-1].error["type"] == type(error).__name__
        assert f"Crashed: unpruned on fake task 1 (push) from initial state 1: {type(error).__name__}: " in said
    if isinstance(error, RuntimeError) and "mesh" in error.args[0]:
        assert r"mesh [/x] is [bold]unstable \x1b[2J\ud800" in said


@pytest.mark.parametrize(
    "error", [SystemExit(1), GeneratorExit(), ObservationError("odd")], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("batch", [1, 2])
def test_what_a_policy_raises_ends_its_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, batch: int
) -> None:
    """In a shared pass the others crash with it, and run alone the next time."""
    from vla_pruner.models.reference import ReferencePolicy

    act = ReferencePolicy.predict_action

    def acting(self: Any, images: Any, instruction: Any, proprio: Any = None) -> Any:
        sentences = [instruction] if isinstance(instruction, str) else instruction
        if any("puck" in one for one in sentences):
            raise error
        return act(self, images, instruction, proprio)

    monkeypatch.setattr(ReferencePolicy, "predict_action", acting)
    out = tmp_path / "out"
    for _ in range(2):
        code, _, records = run(out, policy="tiny", batch=batch, controls=())
        assert code == 1
    assert {record.unit.task for record in records if not record.crashed} == {"reach"}
    assert sum(not record.crashed for record in records) == 2
    assert {record.unit.task for record in records if record.crashed and record.attempt > 1} <= {"push"}


@pytest.mark.parametrize("where", ["reset", "close", "make"])
@pytest.mark.parametrize("error", [SystemExit(1), GeneratorExit(), Mute()], ids=lambda error: type(error).__name__)
def test_it_may_do_so_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    of = FakeSuite if where == "make" else FakeEnvironment

    def broken(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(of, where, broken)
    if where == "close":
        assert run(tmp_path / "out")[0] == 0
        return
    with pytest.raises(EvaluationError, match="8 episodes crashed, more than --max-errors 7"):
        run(tmp_path / "out", max_errors=7)
    assert all(record.crashed for record in read_records(tmp_path / "out" / EPISODES))


def test_an_interrupt_and_a_missing_simulator_still_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd(monkeypatch, raising(KeyboardInterrupt()))
    code, said, _ = run(tmp_path / "a")
    assert code == 130
    assert "Interrupted" in said
    monkeypatch.undo()
    odd(monkeypatch, raising(SimulatorUnavailable("There is no screen", "apt-get install it")))
    with pytest.raises(EvaluationError, match="There is no screen"):
        run(tmp_path / "b")


def test_an_action_that_is_not_finite_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    act = ToyFlow.act

    def acting(self: ToyFlow, images: Any, instruction: str, proprio: Any = None) -> np.ndarray:
        return act(self, images, instruction, proprio) * (np.nan if "puck" in instruction else 1)

    monkeypatch.setattr(ToyFlow, "act", acting)
    code, said, records = run(tmp_path / "out")
    assert (code, sum(record.crashed for record in records)) == (1, 4)
    assert "The policy's action holds numbers that are not finite" in said


def test_a_policy_of_another_action_size_is_refused_before_the_first_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyFlow, "action_size", 7, raising=False)
    with pytest.raises(VLAPrunerError, match="fake takes actions of 4 numbers, and this policy's have 7"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(ToyFlow, "action_size", 4)
    assert run(tmp_path / "out")[0] == 0


@pytest.mark.parametrize("cameras", [("image", "wrist"), ("left",), ("wrist", "image")], ids=str)
def test_a_policy_of_other_cameras_is_refused_before_the_first_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cameras: tuple[str, ...]
) -> None:
    monkeypatch.setattr(ToyFlow, "cameras", cameras)
    with pytest.raises(
        VLAPrunerError, match=r"fake has the cameras 'corner', and this policy takes .* nothing is known"
    ):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_camera_that_the_suite_lacks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeSuite, "cameras", ("front",))
    with pytest.raises(VLAPrunerError, match="nothing is known of 'corner'"):
        run(tmp_path / "out")


@pytest.mark.parametrize("name", ["reference", "openvla", "openvla-oft", "pi0"])
def test_every_family_says_how_many_numbers_its_actions_have(name: str) -> None:
    from vla_pruner.evaluation.policies import action_size
    from vla_pruner.policies.random import random_policy

    policy = random_policy(name)
    images = {camera: np.zeros((224, 224, 3), np.uint8) for camera in policy.cameras}
    if name == "reference":
        images = {"image": np.zeros((policy.image_size, policy.image_size, 3), np.uint8)}
    words = policy.instructions[0] if name == "reference" else "pick it up"
    proprio = None if policy.proprio_size is None else np.zeros(policy.proprio_size, np.float32)
    assert action_size(policy) == np.atleast_2d(policy.act(images, words, proprio)).shape[1]


def test_a_simulators_own_word_on_success_is_true_or_false() -> None:
    assert [solved(said) for said in (True, False, np.True_, 1, 0.0, np.float64(1))] == [
        True,
        False,
        True,
        True,
        False,
        True,
    ]
    for said in (float("nan"), 0.5, 2, None, "True", np.nan, [True]):
        with pytest.raises(OutcomeError, match="where success is True or False, 1 or 0"):
            solved(said)
