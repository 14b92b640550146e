"""The true place of everything in a LIBERO scene: for scripted experts, never for a policy."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

HAND = "gripper0_grip_site"
FINGERS = ("gripper0_leftfinger", "gripper0_rightfinger")
_COLLISION = 0  # robosuite's group of shapes that collide; those of group 1 are only drawn
_SIGNS = np.array(list(itertools.product((-1.0, 1.0), repeat=3)))


@dataclass(frozen=True)
class Pose:
    """A place in the world."""

    position: np.ndarray
    """(3,) metres; z points up."""
    rotation: np.ndarray
    """(3, 3)."""


class GroundTruth:
    """The present state of a LIBERO scene in the simulator.

    Args:
        domain: LIBERO's environment below its wrappers (`BDDLBaseDomain`).
    """

    def __init__(self, domain: Any) -> None:
        self._domain = domain

    @property
    def objects(self) -> tuple[str, ...]:
        """The names of the movable objects."""
        return tuple(self._domain.objects_dict)

    @property
    def goal(self) -> tuple[tuple[str, ...], ...]:
        """The goal as LIBERO's predicates: (("in", "milk_1", "basket_1_contain_region"),)."""
        return tuple(tuple(part) for part in self._domain.parsed_problem["goal_state"])

    def pose(self, name: str) -> Pose:
        """Return the pose of an object or a fixture."""
        data = self._domain.sim.data
        body = self._domain.obj_body_id[name]
        return Pose(np.array(data.body_xpos[body]), np.array(data.body_xmat[body]).reshape(3, 3))

    def site(self, name: str) -> Pose:
        """Return the pose of a region of the goal, such as the inside of a basket."""
        data = self._domain.sim.data
        return Pose(np.array(data.get_site_xpos(name)), np.array(data.get_site_xmat(name)).reshape(3, 3))

    def hand(self) -> Pose:
        """Return the pose of the point between the finger tips; its z axis points from the hand to the tips."""
        return self.site(HAND)

    def fingers(self) -> np.ndarray:
        """Return (3,) metres: from the right finger to the left one."""
        data = self._domain.sim.data
        left, right = (np.array(data.get_body_xpos(name)) for name in FINGERS)
        return left - right

    def points(self, name: str) -> np.ndarray:
        """Return (n, 3) metres: the corners of the boxes that an object collides by, in the world."""
        model, data = self._domain.sim.model._model, self._domain.sim.data._data
        body = self._domain.obj_body_id[name]
        corners = [
            data.geom_xpos[geom] + _SIGNS * model.geom_size[geom] @ data.geom_xmat[geom].reshape(3, 3).T
            for geom in range(model.ngeom)
            if model.geom_bodyid[geom] == body and model.geom_group[geom] == _COLLISION
        ]
        return np.concatenate(corners)
