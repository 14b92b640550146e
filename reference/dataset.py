"""Training batches: recorded frames, and for each frame several questions with the expert's answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reference.experts import EXPERTS, GOAL, HAND, OBJECT
from reference.heads import project
from reference.store import Frames
from vla_pruner.models.reference.configuration import ReferenceConfig
from vla_pruner.models.reference.tokenizer import encode
from vla_pruner.simulators.metaworld import TASKS

SHARED_SCENE = ("reach", "push", "pick-place")
"""Tasks with the same objects on the table: only the instruction tells them apart."""

SHARES = {"push": 1.5, "pick-place": 2.0, "plate-slide": 2.5, "window-open": 1.5}
"""The weight of a task's frames in drawing, 1 if not named: more if closed-loop checks showed need."""

_TASK_NAMES = list(TASKS)
_ANCHORS = np.array([getattr(EXPERTS[task], "anchor", (0.0, 0.0, 0.0)) for task in TASKS])
_GRASPS = [
    number
    for number, task in enumerate(TASKS)
    if task not in ("door-open", "window-open", "plate-slide", "drawer-open")
]
_THINGS = np.array([[4, 5, 6], [36, 37, 38]])
FRESH_SHARE = 2.0
"""The weight of frames that were recorded while the policy acted, in drawing."""

_CONTACT = 0.07  # metres: nearer than this the object may be held or moving, and the hand is where the image shows it
_LOW, _HIGH = np.array([-0.35, 0.4, 0.05]), np.array([0.35, 0.95, 0.4])


def expert_actions(tasks: np.ndarray, states: np.ndarray) -> np.ndarray:
    """(N,) task numbers and (N, 39) states -> (N, 4) actions."""
    actions = np.zeros((len(states), 4), np.float32)
    for task in np.unique(tasks):
        rows = tasks == task
        actions[rows] = EXPERTS[_TASK_NAMES[task]](states[rows])
    return actions


def moved_hands(rng: np.random.Generator, tasks: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Return states (N, 39) with the hand in another place, if that is possible without the scene looking different.

    The experts depend on the hand only through its position, which proprioception tells exactly; so a frame can teach
    the actions from many places. A hand that may hold something is moved by millimetres only.
    """
    states, count = states.copy(), len(states)
    hand, thing, goal = states[:, HAND], states[:, OBJECT], states[:, GOAL]
    anchor = thing + _ANCHORS[tasks]
    around = hand + rng.normal(0, 0.05, (count, 3))
    column = anchor + rng.normal(0, 0.03, (count, 3))
    column[:, 2] = anchor[:, 2] + 0.3 * rng.random(count) ** 2
    on_way = anchor + rng.random((count, 1)) * (goal - thing) + rng.normal(0, 0.04, (count, 3))
    anywhere = rng.uniform(_LOW, _HIGH, (count, 3))
    choice = rng.choice(4, size=(count, 1), p=[0.35, 0.4, 0.15, 0.1])
    moved = np.select([choice == 0, choice == 1, choice == 2], [around, column, on_way], anywhere)
    held = np.linalg.norm(hand - thing, axis=1, keepdims=True) < _CONTACT
    held &= np.isin(tasks, _GRASPS)[:, None]
    moved = np.where(held, hand + rng.normal(0, 0.004, (count, 3)), np.clip(moved, _LOW, _HIGH))
    states[:, HAND] = moved
    return states


@dataclass
class Batch:
    """B frames with S suffixes each."""

    rows: np.ndarray
    """(B,) numbers of the frames."""
    text: Tensor
    """(B, S, T) int64."""
    proprio: Tensor
    """(B, S, P) float32."""
    actions: Tensor
    """(B, S, 4) float32."""
    positions: Tensor
    """(B, STATE_TARGETS) float32, standardised."""
    pixels: Tensor
    """(B, 2, 2) float32 column and row of object and goal in the image."""


class Dataset:
    """Frames split by episode into training and held-out rows, and a sampler of batches."""

    def __init__(self, frames: Frames, config: ReferenceConfig, seed: int) -> None:
        self.frames, self.image_size = frames, config.image_size
        self.rng = np.random.default_rng(seed)
        held_out = frames.episodes % 25 == 7
        self.train_rows, self.test_rows = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        self.ids = np.array([encode(text, config.words, config.instruction_length) for text in TASKS.values()])
        self.shared = np.array([_TASK_NAMES.index(task) for task in SHARED_SCENE])
        # a task's share does not depend on how long its episodes are
        tasks = frames.tasks[self.train_rows]
        shares = np.array([SHARES.get(task, 1.0) for task in TASKS])
        self.weights = (shares / np.bincount(tasks, minlength=len(TASKS)).clip(1))[tasks]
        self.weights *= np.where(frames.fresh[self.train_rows], FRESH_SHARE, 1.0)
        self.weights /= self.weights.sum()

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """(N, 6) object and goal positions, roughly standardised."""
        states = self.frames.states[rows]
        raw = np.concatenate([states[:, OBJECT], states[:, GOAL]], axis=1)
        return ((raw - np.array([0, 0.7, 0.1] * 2)) / 0.1).astype(np.float32)

    def sample(self, size: int) -> np.ndarray:
        """(size,) training rows."""
        return self.rng.choice(self.train_rows, size, p=self.weights)

    def batch(self, rows: np.ndarray, suffixes: int) -> Batch:
        """Return a batch. The first suffix of each frame is the recorded one; the others move the hand or change the
        task.
        """
        states = np.repeat(self.frames.states[rows], suffixes, axis=0).astype(np.float64)
        tasks = np.repeat(self.frames.tasks[rows], suffixes).astype(np.int64)
        extra = np.arange(len(states)) % suffixes > 0
        change = extra & np.isin(tasks, self.shared) & (self.rng.random(len(states)) < 0.5)
        tasks[change] = self.rng.choice(self.shared, int(change.sum()))
        move = extra & (self.rng.random(len(states)) < 0.85)
        states[move] = moved_hands(self.rng, tasks[move], states[move])
        actions = expert_actions(tasks, states)
        shape = (len(rows), suffixes, -1)
        return Batch(
            rows,
            torch.from_numpy(self.ids[tasks]).view(shape),
            torch.from_numpy(states[:, :4].astype(np.float32)).view(shape),
            torch.from_numpy(actions).view(shape),
            torch.from_numpy(self.positions(rows)),
            torch.from_numpy(project(self.frames.states[rows][:, _THINGS], self.image_size)).float(),
        )

    def images(self, rows: np.ndarray) -> Tensor:
        """(N, H, W, 3) uint8."""
        return torch.from_numpy(self.frames.images[rows])
