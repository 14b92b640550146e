"""Changes of a LIBERO scene that MuJoCo makes by itself, drawn by the number of the initial state: no data is needed.

They are defined here and are not LIBERO-Plus's. Objects, robot, instruction and success stay as they are.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_pruner.simulators.base import SuiteError
from vla_pruner.simulators.libero_conventions import AGENT

DEFINITION = 1
"""Of the draws below; a record names it."""

FLOORS = (
    "dark",
    "rustic",
    "light-gray",
    "white-marble",
    "wood-plank",
    "brown-ceramic",
    "gray-ceramic",
    "tile_grigia_caldera",
)
WALLS = (
    "light-blue",
    "dark-blue",
    "dark-gray-plaster",
    "gray-plaster",
    "dark-green",
    "light-gray-plaster",
    "ceramic",
    "white",
    "yellow-linen",
)
"""LIBERO's own textures."""


class Scene:
    """The changes to a scene in an episode: here none.

    Args:
        strength: a factor on how far the scene is changed, if that has degrees.

    Attributes:
        has_degrees: whether the strength counts.
    """

    has_degrees = False

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def before_reset(self, domain: Any, initial_state: int) -> None:
        """Change what LIBERO's next reset builds.

        Args:
            domain: LIBERO's environment below its wrappers.
        """

    def after_reset(self, sim: Any, places: np.ndarray, initial_state: int) -> None:
        """Change what was built; it is seen from the next physics step on.

        Args:
            sim: robosuite's simulation.
            places: (n, 3) metres: the movable objects.
        """


@dataclass(frozen=True)
class View:
    """A way around the objects; all zero and a distance of 1 is the published view."""

    azimuth: float
    """Radians about the vertical."""
    elevation: float
    """Radians upwards."""
    distance: float
    """Times the published distance."""


def draw_view(initial_state: int, strength: float = 1.0) -> View:
    """Return the view of an episode: at strength 1 by 5 to 15 degrees to a side, by 2 to 6 up or down, and 5 to 15
    percent nearer or farther.
    """
    draw = np.random.default_rng((DEFINITION, 1, initial_state))
    azimuth, elevation, distance = draw.choice((-1.0, 1.0), 3) * draw.uniform((5.0, 2.0, 0.05), (15.0, 6.0, 0.15))
    return View(math.radians(strength * azimuth), math.radians(strength * elevation), 1.0 + strength * distance)


def seen_from(
    view: View, position: np.ndarray, rotation: np.ndarray, middle: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the position (3,) and the rotation (3, 3) of a camera that went around `middle`, which stays where it was
    in the image.

    Args:
        position: (3,) metres.
        rotation: (3, 3): the camera's axes as columns; it looks along its negative z axis, and x points right.
        middle: (3,) metres.
    """
    turn = _about(np.array([0.0, 0.0, 1.0]), view.azimuth) @ _about(rotation[:, 0], -view.elevation)
    return middle + view.distance * turn @ (position - middle), turn @ rotation


def _about(axis: np.ndarray, angle: float) -> np.ndarray:
    """Return the rotation (3, 3) about an axis (3,) of length 1."""
    x, y, z = axis
    across = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + math.sin(angle) * across + (1.0 - math.cos(angle)) * across @ across


class CameraMoved(Scene):
    """The camera in front of the robot goes around the middle of the objects; the one on its hand stays."""

    has_degrees = True

    def after_reset(self, sim: Any, places: np.ndarray, initial_state: int) -> None:
        """See `Scene.after_reset`."""
        mujoco: Any = importlib.import_module("mujoco")
        model = sim.model._model
        camera = sim.model.camera_name2id(AGENT)
        rotation, quaternion = np.empty(9), np.empty(4)
        mujoco.mju_quat2Mat(rotation, model.cam_quat[camera])
        view = draw_view(initial_state, self.strength)
        position, turned = seen_from(view, model.cam_pos[camera], rotation.reshape(3, 3), places.mean(axis=0))
        mujoco.mju_mat2Quat(quaternion, turned.ravel())
        model.cam_pos[camera] = position
        model.cam_quat[camera] = quaternion


@dataclass(frozen=True)
class Light:
    """The change of all lights; all 1 and no shift is the published light."""

    colours: np.ndarray
    """(3,): factors on red, green and blue: brightness and tint."""
    shift: np.ndarray
    """(2,) metres: how far the lamps move over the ground."""


DARKEST = 0.1
"""The smallest brightness of a light, as a factor: far below it there is nothing to see, and MuJoCo takes negative ones
for light that darkens.
"""


def draw_light(initial_state: int, strength: float = 1.0) -> Light:
    """Return the light of an episode: at strength 1 by 20 to 40 percent darker or brighter, each colour by up to 10
    percent more or less, the lamps by up to 1 m along each axis. No light is darker than a tenth.
    """
    draw = np.random.default_rng((DEFINITION, 2, initial_state))
    brightness = draw.choice((-1.0, 1.0)) * draw.uniform(0.2, 0.4)
    tint = draw.uniform(-0.1, 0.1, 3)
    shift = draw.uniform(-1.0, 1.0, 2)
    return Light(max(1.0 + strength * brightness, DARKEST) * (1.0 + strength * tint), strength * shift)


class LightChanged(Scene):
    """All lights are darker or brighter and tinted, and the lamps move."""

    has_degrees = True

    def after_reset(self, sim: Any, places: np.ndarray, initial_state: int) -> None:
        """See `Scene.after_reset`."""
        model = sim.model._model
        light = draw_light(initial_state, self.strength)
        head = model.vis.headlight
        for lamp in (model.light_ambient, model.light_diffuse, model.light_specular):
            lamp[:] = lamp * light.colours
        for lamp in (head.ambient, head.diffuse, head.specular):
            lamp[:] = lamp * light.colours
        model.light_pos[:, :2] += light.shift


class BackgroundChanged(Scene):
    """The floor and the walls have others of LIBERO's textures."""

    def before_reset(self, domain: Any, initial_state: int) -> None:
        """See `Scene.before_reset`."""
        published = dict(getattr(domain, "_published_properties", domain._arena_properties))
        domain._published_properties = published
        domain._arena_properties = published | draw_background(initial_state, published)


def draw_background(initial_state: int, published: dict[str, str]) -> dict[str, str]:
    """Return the styles of floor and wall of an episode, neither of them the published one."""
    draw = np.random.default_rng((DEFINITION, 3, initial_state))
    return {
        name: str(draw.choice([style for style in styles if style != published[name]]))
        for name, styles in (("floor_style", FLOORS), ("wall_style", WALLS))
    }


SCENES = {"camera": CameraMoved, "light": LightChanged, "background": BackgroundChanged}
"""The kinds of perturbation that are defined here."""


def make_scene(kind: str | None, strength: float | str) -> Scene:
    """Return the scene of a kind of perturbation; the plain one if it changes no scene, or is None.

    Raises:
        SuiteError: the strength is no number above 0 and up to 3, or the kind has none.
    """
    try:
        factor = float(strength)
    except (TypeError, ValueError):
        factor = math.nan
    if not 0.0 < factor <= 3.0:
        raise SuiteError(f"strength is {strength!r}; it is a number above 0 and up to 3, such as 0.5 (default: 1).")
    return (Scene if kind is None else SCENES.get(kind, Scene))(factor)
