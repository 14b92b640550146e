"""A scripted controller that carries an object of SIMPLER onto another, by the simulator's state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import nn

OPEN, CLOSED = 1.0, -1.0
UP = np.array([0.0, 0.0, 1.0])


class Carrier(nn.Module):
    """Comes above the object, sinks, closes, lifts, carries, lowers and opens; each move as many steps as it takes.

    Args:
        takes_away: whether it then lifts the object off again.
    """

    cameras: tuple[str, ...] = ()
    vision_towers: tuple[nn.Module, ...] = ()
    proprio_size = None

    def __init__(self, takes_away: bool = False) -> None:
        super().__init__()
        self._takes_away = takes_away

    def watch(self, environment: Any) -> None:
        simulator = environment.simulator
        self._hand_link = simulator.agent.robot.links_map["ee_gripper_link"]
        self._carried, self._target = simulator.objs.values()
        self._moves = self._plan()

    def reset(self) -> None:
        """It has no memory besides its plan, which `watch` makes."""

    def act(self, images: Mapping[str, np.ndarray], instruction: str, proprio: np.ndarray | None = None) -> np.ndarray:
        assert not images
        return next(self._moves)[None]

    def _plan(self) -> Iterator[np.ndarray]:
        yield from self._pick()
        place, high = _position(self._target), self._hand[2]
        # What hangs in the hand is brought above the target, not the hand itself.
        yield from self._go(lambda: [*(self._hand + place - _position(self._carried))[:2], high], CLOSED)
        yield from self._go(lambda: [*self._hand[:2], high - 0.07], CLOSED)
        yield from self._hold(OPEN)
        here = self._hand
        yield from self._go(lambda: [*here[:2], high], OPEN)
        if self._takes_away:
            yield from self._pick()
        while True:
            yield self._towards(self._hand, CLOSED if self._takes_away else OPEN)

    def _pick(self) -> Iterator[np.ndarray]:
        for height in (0.06, 0.005):
            yield from self._go(lambda height=height: _position(self._carried) + height * UP, OPEN)
        yield from self._hold(CLOSED)
        here = self._hand
        yield from self._go(lambda: here + 0.1 * UP, CLOSED)

    def _go(self, goal: Any, gripper: float) -> Iterator[np.ndarray]:
        while np.linalg.norm(goal() - self._hand) > 0.012:
            yield self._towards(np.asarray(goal()), gripper)

    def _hold(self, gripper: float) -> Iterator[np.ndarray]:
        for _ in range(4):
            yield self._towards(self._hand, gripper)

    @property
    def _hand(self) -> np.ndarray:
        return _position(self._hand_link)

    def _towards(self, goal: np.ndarray, gripper: float) -> np.ndarray:
        x, y, z = np.clip(goal - self._hand, -0.03, 0.03)
        return np.array([-x, -y, z, 0, 0, 0, gripper])  # the robot faces the other way


def _position(thing: Any) -> np.ndarray:
    return thing.pose.p[0].numpy().astype(np.float64)
