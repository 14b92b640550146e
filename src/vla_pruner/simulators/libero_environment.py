"""One LIBERO task as an environment of `simulators.base`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_pruner.errors import SessionError
from vla_pruner.simulators.base import Image, Images, Observation, SimulatorUnavailable, SuiteError, Task, solved
from vla_pruner.simulators.libero_conventions import ACTION_SIZE, AGENT, CAMERAS
from vla_pruner.simulators.libero_package import INSTALL_ASSETS, INSTALL_GL, LiberoPackage
from vla_pruner.simulators.libero_scene import Scene
from vla_pruner.simulators.libero_truth import GroundTruth

SETTLING_STEPS = 10
DUMMY_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""The action that stands still with the hand open, used while objects settle: they begin above the table."""

_OF_DATA = (
    "xpos",
    "xmat",
    "geom_xpos",
    "geom_xmat",
    "site_xpos",
    "site_xmat",
    "cam_xpos",
    "cam_xmat",
    "light_xpos",
    "light_xdir",
)
_OF_MODEL = ("site_rgba", "geom_rgba")  # a burner that is on glows


class LiberoEnvironment:
    """One task of LIBERO; see `simulators.base.Environment`.

    `LiberoSuite.make` makes it.

    Attributes:
        task: the task.
        images_drawn: camera images drawn so far.
        truth: the true place of everything, for scripted experts and never for a policy.
    """

    def __init__(
        self,
        task: Task,
        package: LiberoPackage,
        bddl: Path,
        initial_states: np.ndarray,
        image_size: int,
        seed: int,
        scene: Scene,
    ) -> None:
        self.task = task
        self.images_drawn = 0
        self._package = package
        self._initial_states = initial_states
        self._size = image_size
        self._seed = seed
        self._scene = scene
        self._steps = 0
        self._episode = 0
        self._over = True
        self._moment: dict[str, np.ndarray] = {}
        self._env: Any = self._make(bddl)
        self._env.env.add_observable(self._moments())
        self.truth = GroundTruth(self._env.env)

    def _make(self, bddl: Path) -> Any:
        try:
            with self._package.loading(self._seed):
                # Without camera observations: robosuite would draw both cameras in every step.
                return self._package.make(bddl_file_name=str(bddl), use_camera_obs=False)
        except (FileNotFoundError, ValueError) as error:  # MuJoCo's error for a mesh that it cannot open
            raise SimulatorUnavailable(
                f"LIBERO cannot build {self.task.name} from the assets in {self._package.assets} ({error})",
                INSTALL_ASSETS,
            ) from error
        except (ImportError, RuntimeError) as error:
            raise SimulatorUnavailable(f"MuJoCo cannot open a rendering context ({error})", INSTALL_GL) from error

    def _moments(self) -> Any:
        """Return an observable that robosuite calls when it would draw the cameras: it saves the scene's state.

        robosuite looks at a scene once in a control step, a substep or two before its end.
        """
        observables = importlib.import_module("robosuite.utils.observables")

        @observables.sensor(modality="moment")
        def moment(_: Mapping[str, Any]) -> float:
            sim = self._env.sim
            self._moment = {name: np.array(getattr(sim.data._data, name)) for name in _OF_DATA}
            self._moment |= {name: np.array(getattr(sim.model._model, name)) for name in _OF_MODEL}
            return 0.0

        return observables.Observable("moment", moment, sampling_rate=self._env.env.control_freq)

    def reset(self, *, initial_state: int) -> tuple[Observation, dict[str, Any]]:
        """See `Environment.reset`; the settling steps are done.

        Returns:
            the observation, and `info` with "success" and "settling": metres that the object which moved most slid
            sideways meanwhile. Objects fall from a few centimetres, straight down.
        """
        self.task.check_initial_state(initial_state)
        self._episode += 1
        self._over = True  # until it has settled
        with self._package.loading(self._seed):
            self._make_current()
            self._scene.before_reset(self._env.env, int(initial_state))
            self._env.reset()
            self._env.set_init_state(self._initial_states[int(initial_state)])
        stored = self._places()
        self._scene.after_reset(self._env.sim, stored, int(initial_state))
        for _ in range(SETTLING_STEPS):
            seen, *_ = self._env.step(DUMMY_ACTION)
        settling = float(np.linalg.norm((self._places() - stored)[:, :2], axis=1).max())
        self._steps = 0
        self._over = False
        observation = self._observation(seen)  # pyright: ignore[reportPossiblyUnboundVariable]
        return observation, {"success": False, "settling": settling}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """See `Environment.step`.

        Args:
            action: (7,) translation, rotation and gripper (-1 opens, +1 closes) in [-1, 1]; robosuite clips beyond.

        Raises:
            SuiteError: the action has another shape, or numbers that are not finite.
            SessionError: the episode is over, or the environment closed.
        """
        if self._over:
            raise SessionError("The episode is over, or none has begun; call reset(initial_state=...) first.")
        values = np.asarray(action, dtype=np.float64)
        if values.shape != (ACTION_SIZE,) or not np.isfinite(values).all():
            raise SuiteError(f"LIBERO takes actions of {ACTION_SIZE} finite numbers; found {action!r}.")
        seen, reward, done, _ = self._open().step(values)
        self._steps += 1
        success = solved(done)
        truncated = not success and self._steps >= self.task.max_steps
        self._over = success or truncated
        return self._observation(seen), float(reward), success, truncated, {"success": success}

    def begin(self, seed: int) -> Observation:
        """Begin the episode of the initial state `seed`, as `reset` does."""
        return self.reset(initial_state=seed)[0]

    def frame(self, size: int) -> Image:
        """See `Environment.frame`; the view is from in front of the robot."""
        return self._draw(AGENT, size)

    def picture(self, camera: str, size: int) -> Image:
        """Return (size, size, 3) uint8: the view of a camera, for videos; not counted as drawn."""
        return self._draw(camera, size)

    def close(self) -> None:
        """See `Environment.close`."""
        if self._env is not None:
            self._make_current()
            self._env.close()
            self._env = None
        self._over = True

    def _places(self) -> np.ndarray:
        """Return the positions (n, 3) of all movable objects."""
        return np.array([self.truth.pose(name).position for name in self.truth.objects])

    def _open(self) -> Any:
        if self._env is None:
            raise SessionError("The environment is closed; make another one.")
        return self._env

    def _observation(self, seen: Mapping[str, np.ndarray]) -> Observation:
        moment, episode = self._moment, self._episode

        def draw(camera: str) -> Image:
            self.images_drawn += 1
            return self._draw_moment(camera, moment)

        images = Images(draw, CAMERAS, lambda: self._env is not None and self._episode == episode)
        proprio = np.concatenate(
            [seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"]), seen["robot0_gripper_qpos"]]
        )
        return Observation(images, self.task.instruction, proprio.astype(np.float32))

    def _draw_moment(self, camera: str, moment: Mapping[str, np.ndarray]) -> Image:
        """Draw the view of a camera at a moment: the scene is set back to it, and restored afterwards."""
        sim = self._open().sim
        places = {name: getattr(sim.data._data, name) for name in _OF_DATA}
        places |= {name: getattr(sim.model._model, name) for name in _OF_MODEL}
        now = {name: np.array(place) for name, place in places.items()}
        try:
            for name, place in places.items():
                place[:] = moment[name]
            return self._draw(camera, self._size)
        finally:
            for name, place in places.items():
                place[:] = now[name]

    def _make_current(self) -> None:
        """Make this environment's OpenGL context current. Otherwise another environment's would be drawn to, or freed
        in a reset.
        """
        self._open().sim._render_context_offscreen.gl_ctx.make_current()

    def _draw(self, camera: str, size: int) -> Image:
        """Return (size, size, 3) uint8, turned by 180 degrees as all data sets are: OpenGL's images are upside down."""
        self._make_current()
        sim = self._open().sim
        return np.ascontiguousarray(sim.render(width=size, height=size, camera_name=camera)[::-1, ::-1])


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Return a rotation as axis times angle, as LIBERO's policies were trained on it: the angle is 0 to 2 pi, and q and
    -q differ.

    Args:
        quaternion: (4,) x, y, z, w.

    Returns:
        (3,) float64; zeros for no rotation.
    """
    x, y, z, w = (float(part) for part in quaternion)
    w = min(max(w, -1.0), 1.0)
    length = math.sqrt(1.0 - w * w)
    if math.isclose(length, 0.0):
        return np.zeros(3)
    return np.array([x, y, z]) * (2.0 * math.acos(w) / length)
