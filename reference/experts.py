"""The labels: for each task an expert that is a function of Meta-World's state, vectorised over states.

All of them are one pattern with other numbers: move above an anchor on the object, come down, then act (carry, push,
slide or pull). They follow Meta-World's scripted policies, with one change for tasks that need a grasp or a push:
hysteresis. Once the hand is down beside the object a larger horizontal error is tolerated before it goes up again, so
that a policy that sees the object with a centimetre of error does not start over at every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_pruner.simulators.metaworld import TASKS

HAND, GRIP, OBJECT, GOAL = slice(0, 3), 3, slice(4, 7), slice(36, 39)
"""The slices of Meta-World's state of 39 numbers."""


@dataclass(frozen=True)
class Expert:
    """Numbers of one task; lengths in metres."""

    anchor: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """From the object's position to the point that the hand aims at."""
    reach_high: float = 0.02
    """Horizontal error above which the hand goes up, while it is high."""
    reach_low: float = 0.02
    """The same once it is down."""
    above: tuple[float, float, float] = (0.0, 0.0, 0.2)
    down: tuple[float, float, float] = (0.0, 0.0, 0.0)
    height: float = 0.04
    """Vertical error above which the hand comes down."""
    act: tuple[float | None, float | None, float | None] | None = None
    """The place to act, from the anchor; None acts at the goal."""
    act_at: tuple[float | None, float | None, float | None] = (None, None, None)
    """Fixed coordinates that replace the target's while acting."""
    gain: float = 10.0
    act_gain: float | None = None
    grip_far: float = 0.0
    grip_near: float = 0.6
    grip_height: float = 0.1
    lift: bool = False
    """Wait for the gripper to close, and do not come down again once the object is in the air."""
    anchored_z: bool = False
    """While acting keep the anchor's height."""

    def __call__(self, states: np.ndarray) -> np.ndarray:
        """(N, 39) states -> (N, 4) actions in [-1, 1]."""
        hand, anchor, goal = states[:, HAND], states[:, OBJECT] + np.array(self.anchor), states[:, GOAL]
        across = np.linalg.norm(hand[:, :2] - anchor[:, :2], axis=1)
        height = np.abs(hand[:, 2] - anchor[:, 2])
        allowed = np.where(height < self.height + 0.03, self.reach_low, self.reach_high)
        far = across > allowed
        high = ~far & (height > self.height)
        near = ~far & (height < self.grip_height)
        target = goal.copy() if self.act is None else anchor + np.array(self.act)
        for axis, value in enumerate(self.act_at):
            if value is not None:
                target[:, axis] = value
        if self.anchored_z:
            target[:, 2] = anchor[:, 2]
        gain = np.full(len(states), self.gain if self.act_gain is None else self.act_gain)
        if self.lift:
            high &= states[:, OBJECT][:, 2] < 0.04
            wait = ~far & ~high & (states[:, GRIP] > 0.73)
            target[wait] = hand[wait]
        target[high] = anchor[high] + np.array(self.down)
        target[far] = anchor[far] + np.array(self.above)
        gain[far | high] = self.gain
        grip = np.where(near, self.grip_near, self.grip_far)
        return np.clip(np.column_stack([gain[:, None] * (target - hand), grip]), -1, 1).astype(np.float32)


@dataclass(frozen=True)
class Reach:
    """Straight to the goal."""

    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    gain: float = 5.0

    def __call__(self, states: np.ndarray) -> np.ndarray:
        delta = self.gain * (states[:, GOAL] + np.array(self.offset) - states[:, HAND])
        return np.clip(np.column_stack([delta, np.zeros(len(states))]), -1, 1).astype(np.float32)


EXPERTS = {
    "reach": Reach(offset=(0.0, 0.0, 0.03)),
    "push": Expert(
        anchor=(-0.005, 0, 0), reach_high=0.025, reach_low=0.05, above=(0, 0, 0.1), down=(0, 0, 0.03), grip_near=1.0
    ),
    "pick-place": Expert(
        anchor=(-0.005, 0, 0),
        reach_high=0.02,
        reach_low=0.04,
        above=(0, 0, 0.1),
        down=(0, 0, 0.03),
        height=0.045,
        grip_near=1.0,
        grip_height=0.06,
        lift=True,
    ),
    "coffee-push": Expert(
        anchor=(0.01, 0, 0.05),
        reach_high=0.06,
        reach_low=0.08,
        above=(0, 0, 0.12),
        height=0.03,
        act_at=(None, None, 0.1),
        grip_far=-1.0,
        grip_near=0.5,
    ),
    "door-open": Expert(
        anchor=(-0.05, 0, 0),
        reach_high=0.12,
        reach_low=0.12,
        above=(0.06, 0.02, 0.2),
        down=(0.06, 0.02, 0.0),
        act=(0, 0, 0),
        gain=25.0,
        grip_far=1.0,
        grip_near=1.0,
    ),
    "window-open": Expert(
        anchor=(-0.03, -0.03, -0.08),
        reach_high=0.05,
        reach_low=0.1,
        above=(0, 0, 0.2),
        height=0.05,
        act=(0.1, 0, 0),
        gain=15.0,
        grip_far=1.0,
        grip_near=1.0,
    ),
    "plate-slide": Expert(
        anchor=(0, -0.055, 0.03),
        reach_high=0.03,
        reach_low=0.03,
        above=(0, 0, 0.1),
        act_at=(None, 0.9, None),
        anchored_z=True,
        grip_far=-1.0,
        grip_near=-1.0,
    ),
    "drawer-open": Expert(
        anchor=(0, 0, -0.02),
        reach_high=0.06,
        reach_low=0.06,
        above=(0, 0, 0.3),
        act=(0, -0.06, 0),
        gain=4.0,
        act_gain=50.0,
        grip_far=-1.0,
        grip_near=-1.0,
    ),
}
"""Task -> expert."""
assert set(EXPERTS) == set(TASKS)
