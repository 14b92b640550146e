"""Episodes side by side: the same records as one by one, even if some leave or crash, and refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.evaluation import fakes
from tests.evaluation.fakes import FakeSuite, ToyFlow
from tests.evaluation.test_run import facts, run, settings
from vla_pruner import FastV, RandomKeep, TextQuery, VLACache, VLAPruner
from vla_pruner.evaluation import EvaluationError, read_records, replica
from vla_pruner.evaluation.arms import Arm
from vla_pruner.evaluation.episode import Course
from vla_pruner.evaluation.lockstep import run_together, shares
from vla_pruner.evaluation.records import EPISODES
from vla_pruner.evaluation.units import Unit
from vla_pruner.methods import Memory
from vla_pruner.models.reference import ReferencePolicy

METHODS = ("vla-pruner:window=1", "vla-pruner:window=1:refresh_every=2", "fastv", "random")


def by_key(folder: Path) -> dict[Any, dict[str, Any]]:
    """Return the result of each episode, whatever the order."""
    return {
        (one["arm"], one["unit"]["suite"], one["unit"]["task_id"], one["unit"]["initial_state"]): one
        for one in facts(folder)
    }


def asked(out: Path, batch: int, **changes: Any) -> Any:
    return settings(
        out, "tiny", **{"methods": METHODS, "layer": (1,), "pruned": ("drop", "freeze"), "batch": batch, **changes}
    )


class Widths:
    """Counts the robots of each pass of the tiny policy."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.together: list[int] = []
        original = ReferencePolicy.act_batch

        def act_batch(policy: Any, images: Sequence[Any], *others: Any) -> np.ndarray:
            self.together.append(len(images))
            return original(policy, images, *others)

        patch.setattr(ReferencePolicy, "act_batch", act_batch)


def test_the_records_are_those_of_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = Widths(monkeypatch)
    assert run(asked(tmp_path / "alone", 1, controls=("again", "random", "blank")))[0] == 0
    assert not widths.together
    assert run(asked(tmp_path / "beside", 4, controls=("again", "random", "blank")))[0] == 0
    assert max(widths.together) == 4
    assert min(widths.together) < 4, "episodes that are over leave the pass"
    assert by_key(tmp_path / "beside") == by_key(tmp_path / "alone")


class Remembered:
    """The ids that each robot kept and its memory after each of its control steps, by its image there."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.found: dict[bytes, tuple[Any, ...]] = {}
        self._shown: list[bytes] = []
        note, act, act_batch = Course.note, ReferencePolicy.act, ReferencePolicy.act_batch

        def keep(images: Sequence[Any], texts: Sequence[str]) -> None:
            self._shown = [image["image"].tobytes() + text.encode() for image, text in zip(images, texts, strict=True)]

        def alone(policy: Any, images: Any, text: str, *others: Any) -> np.ndarray:
            keep([images], [text])
            return act(policy, images, text, *others)

        def beside(policy: Any, images: Any, texts: Any, *others: Any) -> np.ndarray:
            keep(images, texts)
            return act_batch(policy, images, texts, *others)

        def noted(course: Course, session: Any, latency: float | None) -> None:
            note(course, session, latency)
            if session is None:
                return
            for row, shown in enumerate(self._shown):
                memory = session.memory.take([row]).state_dict()
                kept = None if session.kept is None else session.kept[row].tolist()
                self.found[shown] = kept, *(memory[name].numpy().round(5).tolist() for name in ("action", "steps"))

        patch.setattr(ReferencePolicy, "act", alone)
        patch.setattr(ReferencePolicy, "act_batch", beside)
        patch.setattr(Course, "note", noted)


@pytest.mark.parametrize("method", ["vla-pruner:window=1", "action-only:window=2"])
def test_each_robot_keeps_and_remembers_what_it_would_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    # Prompts of other lengths; episodes end after one, two and three control steps, and those of state 1 crash.
    monkeypatch.setattr(fakes, "TASKS", (("reach", "reach"), ("push", "push the puck the puck")))
    crash = tmp_path / "crash"
    crash.touch()
    options = {"methods": (method,), "pruned": ("drop",), "controls": (), "episodes": 5, "max_steps": 6}
    seen = {}
    for batch in (1, 10):
        with monkeypatch.context() as patch:
            seen[batch] = Remembered(patch)
            run(asked(tmp_path / str(batch), batch, **options, suite_options={"crash": crash}))
    alone, beside = seen[1].found, seen[10].found
    assert len(alone) > 20
    assert sum(kept is not None for kept, *_ in alone.values()) > 3
    assert beside == alone
    lengths = {record.control_steps for record in read_records(tmp_path / "10" / EPISODES)}
    assert len(lengths) > 1


def test_no_latency_is_told_where_passes_are_shared(tmp_path: Path) -> None:
    run(asked(tmp_path, 5, controls=()))
    for record in read_records(tmp_path / EPISODES):
        assert (record.latency_ms, record.latency_p50_ms) == ([], None), "also of the sixth, and of random's, alone"
        assert record.seconds > 0.0


def test_a_session_that_fails_is_a_crash_of_all_that_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(memory: Memory, rows: list[int]) -> Memory:
        raise RuntimeError("device lost")

    monkeypatch.setattr(Memory, "take", broken)
    code, said = run(asked(tmp_path, 6, methods=("fastv",), pruned=("drop",), controls=()))
    assert code == 1
    records = [record for record in read_records(tmp_path / EPISODES) if record.arm.startswith("fastv")]
    assert {record.crashed for record in records} == {True, False}, "who was done is done"
    assert all(record.error["message"] == "device lost" for record in records if record.error)
    assert "device lost" in said


def test_a_run_goes_on_with_another_batch(tmp_path: Path) -> None:
    run(asked(tmp_path / "whole", 1))
    run(asked(tmp_path / "cut", 4))
    lines = (tmp_path / "cut" / EPISODES).read_bytes().splitlines(keepends=True)
    (tmp_path / "cut" / EPISODES).write_bytes(b"".join(lines[:11]))
    code, said = run(asked(tmp_path / "cut", 5))
    assert code == 0
    assert "11 of" in said
    assert by_key(tmp_path / "cut") == by_key(tmp_path / "whole")


def test_traced_episodes_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = Widths(monkeypatch)
    assert run(asked(tmp_path, 6, trace=2, episodes=3, methods=("fastv",), pruned=("drop",), controls=()))[0] == 0
    assert set(widths.together) <= {1, 2}, "the two that are not traced"
    assert len(list((tmp_path / "traces").glob("*.npz"))) == 2 * 2 * 2


def test_a_simulator_that_crashes_ends_its_own_episode(tmp_path: Path) -> None:
    crash = tmp_path / "crash"
    crash.touch()
    options = {"suite_options": {"crash": crash}, "methods": ("fastv",), "pruned": ("drop",), "controls": ()}
    code, said = run(asked(tmp_path / "out", 6, **options))
    assert code == 1
    assert "RuntimeError: the simulator is unstable" in said
    states = {record.unit.initial_state: record.crashed for record in read_records(tmp_path / "out" / EPISODES)}
    assert states == {0: False, 1: True, 2: False}
    crash.unlink()
    assert run(asked(tmp_path / "out", 6, **options))[0] == 0
    run(asked(tmp_path / "well", 1, **{**options, "suite_options": {"crash": crash}}))
    done = {key: {**one, "attempt": 1} for key, one in by_key(tmp_path / "out").items()}
    assert done == by_key(tmp_path / "well")


def test_environments_that_cannot_be_made_are_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(suite: FakeSuite, task: int) -> Any:
        raise RuntimeError("no rendering context")

    monkeypatch.setattr(FakeSuite, "make", broken)
    code, said = run(asked(tmp_path, 2, episodes=1, methods=("fastv",), pruned=("drop",), controls=()))
    assert code == 1
    assert said.count("RuntimeError: no rendering context") == 4


class Unsteady(ToyFlow):
    """Acts for several: draws, or fails at its second pass."""

    def __init__(self, draws: bool) -> None:
        super().__init__()
        self.draws, self.passes = draws, 0

    def act_batch(
        self, images: Sequence[Mapping[str, np.ndarray]], instructions: Sequence[str], proprio: Any = None
    ) -> np.ndarray:
        self.passes += 1
        if not self.draws and self.passes == 2:
            raise RuntimeError("out of memory")
        return torch.rand(len(images), 3, 4).numpy() if self.draws else np.zeros((len(images), 3, 4))


def together(policy: Any) -> list[Any]:
    suite = FakeSuite()
    units = [Unit("fake", task, name, 2, 0) for task, name in enumerate(("reach", "push"))]
    records = run_together(
        policy,
        [suite.make(0), suite.make(1)],
        suite.convention(policy),
        Arm("unpruned", "unpruned", "baseline"),
        units,
        run="x",
        attempts=[1, 3],
    )
    return [record for _, record in sorted(records)]


def test_a_policy_that_fails_ends_all_that_shared_the_pass() -> None:
    records = together(Unsteady(draws=False))
    assert [record.termination for record in records] == ["error", "error"]
    assert [record.attempt for record in records] == [1, 3]
    assert [record.control_steps for record in records] == [1, 1]
    assert all(record.error["message"] == "out of memory" for record in records if record.error)


def test_a_policy_that_draws_is_refused() -> None:
    before = torch.random.get_rng_state()
    with pytest.raises(EvaluationError, match=r"Unsteady\.act_batch draws from torch's generator"):
        together(Unsteady(draws=True))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_policy_of_one_robot_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="--batch is 2, but ToyFlow acts for one robot at a time"):
        run(settings(tmp_path / "flow", batch=2))
    assert not (tmp_path / "flow").exists()
    with pytest.raises(EvaluationError, match="--batch is 0; it is a whole number of 1 or more"):
        settings(tmp_path, batch=0)


def test_what_is_not_each_robots_own_runs_alone() -> None:
    alone = (RandomKeep(), TextQuery(gate=2), VLACache())
    together = (None, VLAPruner(preset="paper"), FastV(), TextQuery())
    assert [shares(Arm("a", "a", "method", method)) for method in (*together, *alone)] == [True] * 4 + [False] * 3


def test_environments_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], FakeSuite.make
    monkeypatch.setattr(FakeSuite, "make", lambda suite, task: (made.append(make(suite, task)), made[-1])[1])
    assert run(asked(tmp_path, 12, episodes=9, methods=("fastv",), pruned=("drop",), controls=()))[0] == 0
    assert len(made) == 12, "as many as act at once, and each is used again"
    assert all(environment.closed for environment in made)


def test_an_environment_that_acts_is_not_given_up_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "_OPEN", 1)
    options = {"suites": ("fake", "other"), "methods": ("fastv",), "pruned": ("drop",), "controls": ()}
    assert run(asked(tmp_path / "beside", 3, **options))[0] == 0, "a closed environment would refuse its reset"
    run(asked(tmp_path / "alone", 1, **options))
    assert by_key(tmp_path / "beside") == by_key(tmp_path / "alone")
