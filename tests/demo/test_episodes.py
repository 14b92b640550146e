"""Pairing, interleaving, recording and the deadline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.demo.conftest import FakeEnvironments, leaves_no_trace
from vla_pruner.demo.arms import PAPER, RECOMMENDED, Arm, UncompiledArms, default_arms
from vla_pruner.demo.episodes import Runner, Unit, outcomes, plan, run_episode
from vla_pruner.methods import RandomKeep


def test_plan_lets_the_tasks_take_turns() -> None:
    assert [(u.task, u.seed) for u in plan(["a", "b"], 2, 7)] == [("a", 7), ("b", 7), ("a", 8), ("b", 8)]


def test_an_episode_is_recorded_step_by_step(
    policy: Any, arms: tuple[Arm, ...], environments: FakeEnvironments
) -> None:
    with leaves_no_trace(policy):
        episode = run_episode(UncompiledArms(policy), arms[1], environments("reach"), Unit("reach", 4), trace_size=8)
    assert episode.success
    assert episode.steps == 5
    assert episode.kept == [None, None, None, 4, 4]  # a window of three steps fills before pruning begins
    assert episode.trace is not None
    assert len(episode.trace.frames) == 6  # and how it ended
    assert episode.trace.frames[0].shape == (8, 8, 3)
    kept = episode.trace.kept[4]
    assert kept is not None
    assert kept == sorted(set(kept))
    assert len(kept) == 4
    assert all(time.pruning > 0 for time in episode.times[3:])
    assert all(time.prefill > 0 and time.decode > 0 and time.vision > 0 for time in episode.times)


def test_an_unpruned_episode_has_no_session(policy: Any, arms: tuple[Arm, ...], environments: FakeEnvironments) -> None:
    episode = run_episode(UncompiledArms(policy), arms[0], environments("reach"), Unit("reach", 5))
    assert not episode.success
    assert episode.kept == [None] * 6
    assert episode.trace is None
    assert all(time.pruning == 0 for time in episode.times)


def test_arms_are_paired_and_take_turns_to_begin(
    policy: Any, arms: tuple[Arm, ...], environments: FakeEnvironments
) -> None:
    runner = Runner(arms, environments, trace_size=8)
    episodes = list(runner.run(plan(["reach", "push"], 2, 10), UncompiledArms(policy)))
    assert len(episodes) == 12
    assert [episode.arm for episode in episodes[:6]] == ["unpruned", "drop", "random", "drop", "random", "unpruned"]
    for unit in runner.finished:
        assert list(unit) == ["unpruned", "drop", "random"]
        assert len({episode.unit for episode in unit.values()}) == 1
    # Only the first episode of a task is recorded.
    assert [unit["drop"].trace is not None for unit in runner.finished] == [True, True, False, False]
    assert environments.made["reach"].resets == [10, 10, 10, 11, 11, 11]
    assert outcomes(runner.finished, "drop") == [True, True, False, False]
    runner.close()
    assert all(environment.closed for environment in environments.made.values())


def test_no_unit_begins_after_the_deadline_but_one_always_runs(
    policy: Any, arms: tuple[Arm, ...], environments: FakeEnvironments
) -> None:
    runner = Runner(arms, environments)
    assert len(list(runner.run(plan(["reach"], 5, 0), UncompiledArms(policy), minutes=0.0))) == len(arms)
    assert len(runner.finished) == 1


def test_an_interrupted_unit_does_not_count(policy: Any, arms: tuple[Arm, ...], environments: FakeEnvironments) -> None:
    runner = Runner(arms, environments)
    episodes = runner.run(plan(["reach"], 2, 0), UncompiledArms(policy))
    for _ in range(len(arms) + 2):
        next(episodes)
    assert len(runner.finished) == 1


def test_default_arms() -> None:
    arms = {arm.key: arm for arm in default_arms()}
    assert list(arms) == ["unpruned", "recommended", "paper", "random"]
    assert arms["unpruned"].method is None
    assert (arms["recommended"].method, arms["paper"].method) == (RECOMMENDED, PAPER)
    assert arms["random"].method == RandomKeep(keep=PAPER.keep, layer=PAPER.layer, pruned=PAPER.pruned)
    fewer: dict[str, Any] = {arm.key: arm.method for arm in default_arms(0.125) if arm.method}
    assert fewer["recommended"] == replace(RECOMMENDED, keep=0.125)
    assert {method.keep for method in fewer.values()} == {0.125}
    assert all(len(line) <= 12 for arm in arms.values() for line in arm.short.splitlines())


def test_a_random_arm_draws_anew_in_each_episode(policy: Any) -> None:
    arm = Arm("random", "random", "random", RandomKeep(keep=0.25, layer=1))
    with arm.attach(policy, 3) as first:
        assert first.method.seed == 3
    with arm.attach(policy, 4) as second:
        assert second.method.seed == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_leaves_the_policy_as_it_was(
    policy: Any, arms: tuple[Arm, ...], environments: FakeEnvironments, error: type[BaseException]
) -> None:
    environment = environments("reach")

    def fail(_: Any) -> Any:
        raise error

    environment.step = fail  # type: ignore[method-assign]
    with leaves_no_trace(policy), pytest.raises(error):
        run_episode(UncompiledArms(policy), arms[1], environment, Unit("reach", 0))
