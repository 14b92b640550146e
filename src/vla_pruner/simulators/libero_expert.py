"""A scripted expert for LIBERO's object suite: it picks the object up and drops it into the basket.

It acts by the simulator's ground truth, which it gets from `watch` alone, and proves the evaluation without weights: if
it succeeds and a policy that does nothing fails, simulator, actions and success work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
from torch import nn

from vla_pruner.errors import SessionError
from vla_pruner.simulators.base import Environment, Image, SuiteError
from vla_pruner.simulators.libero_environment import LiberoEnvironment
from vla_pruner.simulators.libero_truth import GroundTruth

OPEN, CLOSE = -1.0, 1.0

_STEP = 0.05  # metres that an action of 1 commands
_TURN = 0.5  # radians
_GAIN = 0.7  # share of the remaining way that is commanded at once
_NEAR = 0.012  # metres
_ABOVE = 0.08  # from the object's top to the finger tips while the hand comes
_REACH = 0.035  # how far the fingers reach below the object's top; beyond it the palm touches
_FLOOR = 0.006  # the finger tips' distance from the ground
_WIDTH = 0.065  # width that the open hand takes in, with some room
_PALM = np.array([0.105, 0.038])  # half of the palm's extent along the fingers' motion and across it
_PALM_HEIGHT = 0.045  # above the finger tips
_EDGE = 0.015  # from the end of an object that a finger's pad still holds
_SINKING = 40  # steps
_CLOSING = 14
_OPENING = 30
_LIFTING = 12
_RAISED = 0.03  # metres; an object that rose less in `_LIFTING` steps was not grasped


class _Phase(Enum):
    COME = auto()
    SINK = auto()
    GRASP = auto()
    LIFT = auto()
    CARRY = auto()
    RELEASE = auto()


class LiberoObjectExpert(nn.Module):
    """Come above the object, sink, close, lift, carry above the basket, open; begin again if the object stayed.

    A policy (`policies.base.Policy`) without cameras; chunks of one action.
    """

    cameras: tuple[str, ...] = ()
    vision_towers: tuple[nn.Module, ...] = ()
    proprio_size = None

    def __init__(self) -> None:
        super().__init__()
        self._truth: GroundTruth | None = None
        self._object = self._basket = ""
        self._grip = Grip(0.0, 0.0)
        self.reset()

    def watch(self, environment: Environment) -> None:
        """See this environment's ground truth from now on.

        Raises:
            SuiteError: its task is not to put one object into a basket.
        """
        goal = environment.truth.goal if isinstance(environment, LiberoEnvironment) else ()
        if not isinstance(environment, LiberoEnvironment) or len(goal) != 1 or not _is_into_basket(goal[0]):
            raise SuiteError(
                "This expert puts one object into a basket, as in the suite libero_object; the task "
                f"{environment.task.name} of {environment.task.suite} is another."
            )
        self._truth = environment.truth
        _, self._object, region = goal[0]
        self._basket = region.removesuffix("_contain_region")
        self.reset()

    def reset(self) -> None:
        """Begin a new episode."""
        self._enter(_Phase.COME)
        self._height = 0.0
        self._tries = 0

    def act(self, images: Mapping[str, Image], instruction: str, proprio: np.ndarray | None = None) -> np.ndarray:
        """Return (1, 7) float64: the next action, whatever the images and the instruction.

        Raises:
            SessionError: it was not given an environment to watch.
        """
        if self._truth is None:
            raise SessionError("A scripted expert acts by the simulator's state: call watch(environment) first.")
        self._steps += 1
        act = {
            _Phase.COME: self._come,
            _Phase.SINK: self._sink,
            _Phase.GRASP: self._grasp,
            _Phase.LIFT: self._lift,
            _Phase.CARRY: self._carry,
            _Phase.RELEASE: self._release,
        }[self._phase]
        return act(self._truth)[None]

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        self._steps = 0

    def _come(self, truth: GroundTruth) -> np.ndarray:
        points = truth.points(self._object)
        if self._steps == 1:
            neighbours = [truth.points(name) for name in truth.objects if name != self._object]
            self._grip = plan_grip(points, neighbours, self._tips(points), _angle(truth.fingers()))
        way = self._way_to_grip(truth, points[:, 2].max() + _ABOVE)
        turn = self._turn(truth)
        if np.linalg.norm(way[:2]) < _NEAR / 2 and way[2] > -0.05 and abs(turn) < 0.05:
            self._height = truth.pose(self._object).position[2]
            self._enter(_Phase.SINK)
        return _action(way, turn, OPEN)

    def _sink(self, truth: GroundTruth) -> np.ndarray:
        way = self._way_to_grip(truth, self._tips(truth.points(self._object)))
        if abs(way[2]) < _NEAR / 3 or self._steps > _SINKING:
            self._enter(_Phase.GRASP)
        return _action(way, self._turn(truth), OPEN)

    def _grasp(self, truth: GroundTruth) -> np.ndarray:
        if self._steps >= _CLOSING:
            self._enter(_Phase.LIFT)
        return _action(np.zeros(3), 0.0, CLOSE)

    def _lift(self, truth: GroundTruth) -> np.ndarray:
        way = self._way_over_basket(truth) * [0.0, 0.0, 1.0]
        if self._steps > _LIFTING and not self._held(truth):
            self._tries += 1
            self._enter(_Phase.COME)
        elif way[2] < _NEAR:
            self._enter(_Phase.CARRY)
        return _action(way, 0.0, CLOSE)

    def _carry(self, truth: GroundTruth) -> np.ndarray:
        way = self._way_over_basket(truth)
        if not self._held(truth):
            self._tries += 1
            self._enter(_Phase.COME)
        elif np.linalg.norm(way[:2]) < _NEAR:
            self._enter(_Phase.RELEASE)
        return _action(way, 0.0, CLOSE)

    def _release(self, truth: GroundTruth) -> np.ndarray:
        if self._steps > _OPENING:
            self._enter(_Phase.COME)
        return _action(np.zeros(3), 0.0, OPEN)

    def _held(self, truth: GroundTruth) -> bool:
        return truth.pose(self._object).position[2] > self._height + _RAISED

    def _tips(self, points: np.ndarray) -> float:
        """Return the height of the finger tips; every further try reaches deeper, since the one before slipped off."""
        return max(points[:, 2].min() + _FLOOR, points[:, 2].max() - _REACH - 0.01 * self._tries)

    def _way_to_grip(self, truth: GroundTruth, height: float) -> np.ndarray:
        place = self._grip.place(truth.points(self._object))
        return np.array([*place, height]) - truth.hand().position

    def _turn(self, truth: GroundTruth) -> float:
        """Return the remaining turn, within a quarter turn: the two fingers are alike."""
        left = self._grip.angle - _angle(truth.fingers())
        return (left + math.pi / 2) % math.pi - math.pi / 2

    def _way_over_basket(self, truth: GroundTruth) -> np.ndarray:
        """Return the way (3,) of the held object to just above the basket's middle."""
        held, basket = truth.points(self._object), truth.points(self._basket)
        above = basket[:, 2].max() + 0.02 - held[:, 2].min()
        return np.array([*(_middle(basket) - truth.pose(self._object).position[:2]), above])


@dataclass(frozen=True)
class Grip:
    """A grip on an object from above."""

    angle: float
    """Radians: the direction in which the fingers close."""
    shift: float
    """Metres from the object's middle, across that direction."""

    def place(self, points: np.ndarray) -> np.ndarray:
        """Return (2,): the place of the hand above an object whose collision boxes have these corners (n, 3)."""
        return _middle(points) + self.shift * np.array([-math.sin(self.angle), math.cos(self.angle)])


def plan_grip(points: np.ndarray, neighbours: list[np.ndarray], tips: float, now: float) -> Grip:
    """Return the grip nearest to the hand's present direction for which the object fits between the fingers and the
    palm touches no neighbour; if there is none, the grip across the object's narrowest side.

    Args:
        points: (n, 3) corners of the object.
        neighbours: those of the other objects.
        tips: height of the finger tips when they close.
        now: direction of the fingers, in radians.
    """
    obstacles = [other[:, :2] for other in neighbours if other[:, 2].max() > tips + _PALM_HEIGHT]
    grips = []
    for angle in now + np.radians(np.arange(-90, 91, 5)):
        width, length = _extents(points, angle)
        room = max(0.0, length / 2 - _EDGE)
        grips += [(width, Grip(float(angle), float(shift))) for shift in np.arange(-room, room + 1e-9, 0.005)]
        grips.append((width, Grip(float(angle), 0.0)))
    grips.sort(key=lambda item: abs(item[1].angle - now) / math.pi + 10 * abs(item[1].shift))
    for width, grip in grips:
        if width < _WIDTH and not any(_touches(grip, points, other) for other in obstacles):
            return grip
    return min(grips, key=lambda item: item[0])[1]


def _touches(grip: Grip, points: np.ndarray, other: np.ndarray) -> bool:
    """Return True if the palm covers a part of another object's outline (n, 2), both as boxes along the palm."""
    place = grip.place(points)
    low, high = (edge(_along(other - place, grip.angle), axis=0) for edge in (np.min, np.max))
    return bool(np.all((low < _PALM) & (high > -_PALM)))


def _extents(points: np.ndarray, angle: float) -> np.ndarray:
    """Return (2,): the object's extent along the direction and across it."""
    return np.ptp(_along(points[:, :2], angle), axis=0)


def _along(places: np.ndarray, angle: float) -> np.ndarray:
    """Return (n, 2) turned so that the first number is along the direction and the second across."""
    return places @ np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _angle(fingers: np.ndarray) -> float:
    return math.atan2(fingers[1], fingers[0])


def _is_into_basket(predicate: tuple[str, ...]) -> bool:
    return len(predicate) == 3 and predicate[0] == "in" and "basket" in predicate[2]


def _middle(points: np.ndarray) -> np.ndarray:
    """Return (2,): the middle of the points' bounding box on the ground."""
    return (points[:, :2].min(axis=0) + points[:, :2].max(axis=0)) / 2


def _action(way: np.ndarray, turn: float, gripper: float) -> np.ndarray:
    """Return (7,): a part of the way (3,) in metres and of the turn about the vertical in radians."""
    return np.array([*np.clip(_GAIN * way / _STEP, -1, 1), 0.0, 0.0, np.clip(_GAIN * turn / _TURN, -1, 1), gripper])
