"""Replays: a known error is found, only pruned steps count, everybody has the same noise, nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.calibration.fakes import STEPS, Drawn, made_up_folder, made_up_trace, off
from tests.evaluation.fakes import tiny_policy
from vla_pruner.calibration import CalibrationError, calibrate, find_recordings
from vla_pruner.calibration.replay import replay
from vla_pruner.evaluation.arms import all_arms, method_arms
from vla_pruner.evaluation.traces import write_trace


def test_a_known_error_is_found_in_both_units(tmp_path: Path) -> None:
    policy = Drawn()
    made_up_folder(tmp_path, states=3)
    offset = np.array([0.1, -0.2, 0.0, 0.4])
    found = calibrate(policy, [off("a", offset), off("b", 2 * offset)], find_recordings(tmp_path, policy))
    actions = np.concatenate([made_up_trace(state, task).actions for state in range(3) for task in range(2)])
    spread = actions.reshape(-1, 4).astype(float).std(axis=0)
    assert found.scale == pytest.approx(spread.tolist())
    baseline, one, two = found.arms
    assert baseline.moved is not None
    assert baseline.moved.value == 0.0
    assert one.moved is not None
    assert one.moved_in_units is not None
    assert two.moved is not None
    assert one.moved.value == pytest.approx((np.abs(offset) / spread).mean())
    assert one.moved_in_units.value == pytest.approx(np.abs(offset).mean())
    assert one.by_dimension == pytest.approx(np.abs(offset).tolist())
    assert two.moved.value == pytest.approx(2 * one.moved.value)
    assert one.by_episode == pytest.approx([one.moved.value] * 6)
    assert (one.steps, one.pruned_steps) == (6 * STEPS, 6 * (STEPS - 1))


def test_the_mean_is_over_episodes_and_the_interval_too(tmp_path: Path) -> None:
    """An error that grows with the image's brightness differs from episode to episode."""
    made_up_folder(tmp_path, states=4, tasks=1)
    policy = Drawn()
    arm = off("a", np.ones(4))
    act = Drawn.act

    def brighter(self: Drawn, images: Any, *given: Any) -> np.ndarray:
        chunk = act(self, images, *given)
        return chunk + (self.offset > 0) * (images["image"].mean() - 100)

    policy.__class__ = type("Brighter", (Drawn,), {"act": brighter})
    found = calibrate(policy, [arm], find_recordings(tmp_path, policy)).arms[1]
    assert found.moved is not None
    assert found.moved.low is not None
    assert found.moved.high is not None
    means = [value for value in found.by_episode if value is not None]
    assert len({round(value, 6) for value in means}) == 4
    assert found.moved.value == pytest.approx(np.mean(means))
    assert min(means) <= found.moved.low < found.moved.value < found.moved.high <= max(means)


def test_observations_come_in_order_and_episodes_begin_anew(tmp_path: Path) -> None:
    policy = Drawn()
    made_up_folder(tmp_path, states=2, tasks=1)
    replay(policy, [off("a", np.ones(4)), off("b", np.ones(4))], find_recordings(tmp_path, policy))
    shown = [made_up_trace(state).images["image"].mean(axis=(1, 2, 3)).tolist() for state in range(2)]
    assert [mean for mean, _ in policy.seen] == pytest.approx([*shown[0][:1], *(3 * shown[0]), *(3 * shown[1])])
    assert policy.resets == 1 + 2 * 3


def test_every_arm_has_the_noise_of_the_unit_and_step(tmp_path: Path) -> None:
    """With another noise for one of them, an arm that changes nothing would move."""
    policy = Drawn()
    made_up_folder(tmp_path)
    before = torch.random.get_rng_state()
    arms = all_arms([], ("again", "blank"))
    found = calibrate(policy, [*arms, off("same", np.zeros(4), waits=0)], find_recordings(tmp_path, policy))
    assert torch.equal(before, torch.random.get_rng_state())
    moved = {arm.key: arm.moved.value for arm in found.arms if arm.moved is not None}
    assert moved["same"] == 0.0
    assert moved["unpruned-again"] > 0.5, "other noise"
    assert moved["blank-image"] > 0.1
    assert found.arms[0].kind == "baseline"
    assert len(found.arms) == 4


def test_the_recorded_seeds_give_the_recorded_actions(tmp_path: Path) -> None:
    """A traced policy acts again as it did; a skipped step keeps the others' noise."""
    policy = Drawn()
    made = made_up_trace(0)
    chunks = []
    for step in range(STEPS):
        torch.manual_seed(int(made.noise_seeds[step]))
        seen = made.observation(step)
        chunks.append(policy.act(seen.images, seen.instruction, seen.proprio))
    write_trace(tmp_path, made_up_trace(0, actions=np.stack(chunks).astype(np.float32)))
    for every in (1, 2):
        found = replay(policy, [], find_recordings(tmp_path, policy, every=every))
        assert found.against_recorded == pytest.approx(0.0, abs=1e-6)
    write_trace(tmp_path, made_up_trace(0, actions=np.stack(chunks).astype(np.float32) + 0.25))
    assert replay(policy, [], find_recordings(tmp_path, policy)).against_recorded == pytest.approx(0.25, abs=1e-6)


def test_an_arm_that_never_prunes_has_no_figure(tmp_path: Path) -> None:
    policy = Drawn()
    made_up_folder(tmp_path)
    found = calibrate(policy, [off("late", np.ones(4), waits=99)], find_recordings(tmp_path, policy)).arms[1]
    assert found.moved is None
    assert found.by_episode == [None] * 6
    assert found.pruned_steps == 0


def test_a_gate_is_told_how_far_the_arm_went_as_it_was_recorded(tmp_path: Path) -> None:
    policy = Drawn()
    actions = np.zeros((STEPS, 2, 4), np.float32)
    actions[:, 0, :3] = [3, 0, 4]
    actions[:, 1, 1] = 100
    actions[2, 0, 0] = 1
    write_trace(tmp_path, made_up_trace(0, actions=actions))
    arm: Any = off("gated", np.ones(4), motion=3)
    arm.method.told.clear()
    replay(policy, [arm], find_recordings(tmp_path, policy))
    assert arm.method.told[:-1] == pytest.approx([5, 5, np.hypot(1, 4), 5]), "one action of two was carried out"
    arm.method.told.clear()
    replay(policy, [arm], find_recordings(tmp_path, policy, every=2))
    assert arm.method.told[:-1] == pytest.approx([10, 5 + np.hypot(1, 4)])


def test_actions_that_never_change_have_no_scale(tmp_path: Path) -> None:
    policy = Drawn()
    still = np.zeros((STEPS, 1, 4), np.float32)
    write_trace(tmp_path, made_up_trace(0, actions=still))
    with pytest.raises(CalibrationError, match="never change, so there is no scale"):
        calibrate(policy, [], find_recordings(tmp_path, policy))
    still[:, 0, 1] = np.arange(STEPS)
    write_trace(tmp_path, made_up_trace(0, actions=still))
    found = calibrate(policy, [off("a", np.array([9.0, 1.0, 9.0, 9.0]))], find_recordings(tmp_path, policy))
    assert found.left_out == [0, 2, 3]
    assert found.arms[1].moved is not None
    assert found.arms[1].moved.value == pytest.approx(1 / np.arange(5).std())
    assert found.arms[1].moved.high is None, "one episode has no interval"


def test_actions_of_another_robot_are_refused(tmp_path: Path) -> None:
    made_up_folder(tmp_path, states=1, dim=7)
    with pytest.raises(CalibrationError, match=r"The policy's actions have 4 numbers, and the recorded ones .* 7"):
        replay(Drawn(), [], find_recordings(tmp_path, Drawn()))


def test_the_tiny_policy_moves_more_the_less_it_keeps(tmp_path: Path) -> None:
    policy = tiny_policy()
    made_up_folder(tmp_path, size=32)
    arms = method_arms(("semantic-only",), (0.75, 0.25, 1), (1,), ("drop",))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    found = calibrate(policy, arms, find_recordings(tmp_path, policy))
    moved = [arm.moved.value for arm in found.arms if arm.moved is not None]
    assert moved[0] == 0.0 < moved[1] < moved[3]
    assert moved[2] > moved[1]
    assert found.arms[1].pruned_steps == found.arms[1].steps == 6 * STEPS
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
