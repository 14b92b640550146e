"""Meta-World (MuJoCo) as the reference policies see it.

The tasks are Meta-World's own `<task>-v3-goal-observable` environments: physics, layouts and success are untouched. The
environment adds the needs of an image policy: a fixed camera, proprioception, an instruction, an action repeat and a
cap on the number of control steps. Only the drawing is changed: shadows and multisampling are off (software rendering
is ten times faster without), and every goal marker is green, so that a goal's colour does not give the task away.

Seeds: demonstrations and DAgger use seeds below 90_000, development checks 90_000 to 99_999, and published figures
seeds from `EVALUATION_SEED` on. A seed fully determines an episode's initial state, whatever ran before it.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np

from vla_pruner.observations import Observation
from vla_pruner.simulators.base import SimulatorUnavailable, solved
from vla_pruner.wording import install

EVALUATION_SEED = 1_000_000
"""First seed of published evaluations; nothing was trained or tuned on seeds from here on."""

ACTION_REPEAT = 4
MAX_CONTROL_STEPS = 40
MAX_COMMANDS = ACTION_REPEAT * MAX_CONTROL_STEPS
"""Physics commands after which an episode is over, however a policy groups them."""
PROPRIO_SIZE = 4

CORNER, WRIST = "corner", "wrist"
"""Cameras: the free one described below, and Meta-World's own at the gripper."""
_WRIST_CAMERA = "gripperPOV"

TASKS: dict[str, str] = {
    "reach": "reach the green ball",
    "push": "push the puck to the ball",
    "pick-place": "lift the puck to the ball",
    "coffee-push": "push the mug to the machine",
    "door-open": "open the door",
    "window-open": "open the window",
    "plate-slide": "slide the plate into the goal",
    "drawer-open": "open the drawer",
}
"""The instruction of each task by its name."""

CAMERA_LOOKAT = (0.0, 0.71, 0.09)
CAMERA_DISTANCE = 1.0
CAMERA_AZIMUTH = 130.0
CAMERA_ELEVATION = -45.0
CAMERA_FOVY = 42.0

_GOAL_RGBA = (0.0, 0.8, 0.0, 1.0)
_RENDER_SCALE = 2  # rendered larger and averaged down: anti-aliasing at no cost in software rendering
_GL_HELP = (
    "sudo apt-get install -y libegl1 libgl1 libosmesa6 libgles2 libgl1-mesa-dri libegl-mesa0"
    "  (or set MUJOCO_GL to a backend that this machine has)"
)
_PIP_HELP = install("metaworld")


def _import_simulator() -> tuple[Any, Any]:
    """Return `(mujoco, metaworld.env_dict)`, imported with a rendering backend chosen; one clear error if they are
    missing.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])
    os.environ.setdefault("LP_NUM_THREADS", "1")  # llvmpipe's threads only compete with the policy's
    try:
        import mujoco
    except ImportError as error:
        if getattr(error, "name", None) == "mujoco":
            raise SimulatorUnavailable(
                "The simulator is not installed (no module named 'mujoco')", _PIP_HELP
            ) from error
        raise SimulatorUnavailable(f"MuJoCo cannot load its rendering library ({error})", _GL_HELP) from error
    except (OSError, AttributeError, RuntimeError) as error:  # PyOpenGL's errors for a missing library
        raise SimulatorUnavailable(f"MuJoCo cannot load its rendering library ({error})", _GL_HELP) from error
    try:
        from metaworld import env_dict
    except ImportError as error:
        raise SimulatorUnavailable(f"The simulator is not installed ({error})", _PIP_HELP) from error
    return mujoco, env_dict


class MetaWorldEnv:
    """One task of Meta-World as a sequence of control steps.

    Args:
        task: a key of `TASKS`.
        image_size: height and width of the observation's image.
        render: False leaves images out (all zeros), for experts and tests that need only the state.
        action_repeat: physics commands that one control step repeats its action for.
        max_control_steps: control steps after which an episode is over.
    """

    def __init__(
        self,
        task: str,
        image_size: int = 112,
        render: bool = True,
        action_repeat: int = ACTION_REPEAT,
        max_control_steps: int = MAX_CONTROL_STEPS,
    ) -> None:
        if task not in TASKS:
            raise ValueError(f"Unknown task {task!r}; the tasks are {', '.join(TASKS)}.")
        self.task = task
        self.instruction = TASKS[task]
        self.image_size = image_size
        self._action_repeat, self._max_control_steps = action_repeat, max_control_steps
        self._mujoco, env_dict = _import_simulator()
        self._env = env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"](seed=0)
        self._env._freeze_rand_vec = False  # a new layout at each reset ...
        self._env.seeded_rand_vec = True  # ... drawn from the environment's own seeded generator
        self._model = self._env.model
        self._recolour_goals()
        self._render_images = render
        self._renderers: dict[int, Any] = {}
        self._camera = self._make_camera()
        self._state = np.zeros(39)
        self._steps = 0
        if render:
            self._renderer(image_size * _RENDER_SCALE)

    def _recolour_goals(self) -> None:
        for index in range(self._model.nsite):
            if self._model.site(index).name in ("goal", "coffee_goal") and self._model.site_rgba[index, 3] > 0:
                self._model.site_rgba[index] = _GOAL_RGBA

    def _make_camera(self) -> Any:
        camera = self._mujoco.MjvCamera()
        camera.type = self._mujoco.mjtCamera.mjCAMERA_FREE
        camera.lookat[:] = CAMERA_LOOKAT
        camera.distance = CAMERA_DISTANCE
        camera.azimuth = CAMERA_AZIMUTH
        camera.elevation = CAMERA_ELEVATION
        self._model.vis.global_.fovy = CAMERA_FOVY
        return camera

    def _renderer(self, size: int) -> Any:
        if size not in self._renderers:
            self._model.vis.quality.offsamples = 0
            self._model.vis.global_.offwidth = max(self._model.vis.global_.offwidth, size)
            self._model.vis.global_.offheight = max(self._model.vis.global_.offheight, size)
            try:
                self._renderers[size] = self._mujoco.Renderer(self._model, size, size)
            except Exception as error:  # the backends raise error types of their own
                raise SimulatorUnavailable(f"MuJoCo cannot open a rendering context ({error})", _GL_HELP) from error
        return self._renderers[size]

    @property
    def state(self) -> np.ndarray:
        """(39,) float64: Meta-World's full observation, for scripted experts and never for a policy."""
        return self._state.copy()

    @property
    def control_steps(self) -> int:
        """Control steps since the reset."""
        return self._steps

    def reset(self, seed: int) -> Observation:
        """Start the episode of `seed`."""
        self._env.seed(seed)
        self._env.reset()
        # Goals and furniture are moved after the last physics step of a reset, and until derived quantities are
        # computed again the image and the returned state still show the layout before.
        self._mujoco.mj_forward(self._model, self._env.data)
        self._state = np.asarray(self._env._get_obs(), dtype=np.float64)
        self._steps = 0
        return self._observation()

    def step(self, action: np.ndarray) -> tuple[Observation, bool, bool]:
        """Run one control step.

        Args:
            action: (4,) dx, dy, dz, gripper in [-1, 1]; clipped to it, then repeated `action_repeat` times.

        Returns:
            The next observation, whether the task is solved, and whether the episode is over.
        """
        action = np.clip(np.asarray(action, dtype=np.float32).reshape(-1), -1.0, 1.0)
        success, state = False, self._state
        for _ in range(self._action_repeat):
            state, _, _, _, info = self._env.step(action)
            if solved(info["success"]):
                success = True
                break
        self._state = np.asarray(state, dtype=np.float64)
        self._steps += 1
        return self._observation(), success, success or self._steps >= self._max_control_steps

    def render(self, size: int, camera: str = CORNER) -> np.ndarray:
        """Return (size, size, 3) uint8: the present scene from `CORNER` or `WRIST`."""
        renderer = self._renderer(size)
        renderer.update_scene(self._env.data, _WRIST_CAMERA if camera == WRIST else self._camera)
        renderer.scene.flags[self._mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        renderer.scene.flags[self._mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        return renderer.render().copy()

    def image(self, camera: str = CORNER, size: int | None = None) -> np.ndarray:
        """Return (size, size, 3) uint8: the present scene as a policy sees it from `CORNER` or `WRIST`; None:
        `image_size`.
        """
        size = self.image_size if size is None else size
        large = self.render(size * _RENDER_SCALE, camera).reshape(size, _RENDER_SCALE, size, _RENDER_SCALE, 3)
        return large.mean(axis=(1, 3)).round().astype(np.uint8)

    def _observation(self) -> Observation:
        """Return the image of `CORNER` as "image", and (4,) float32: the hand's x, y and z in metres, and the opening
        of the gripper in [0, 1].
        """
        size = self.image_size
        image = self.image() if self._render_images else np.zeros((size, size, 3), np.uint8)
        return Observation({"image": image}, self.instruction, self._state[:PROPRIO_SIZE].astype(np.float32))

    def close(self) -> None:
        """Free the renderers; the environment cannot be used afterwards."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()

    def __enter__(self) -> MetaWorldEnv:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def scripted_expert(task: str) -> Any:
    """Return Meta-World's scripted policy of `task`: a function of the full state (39,) -> action (4,) in [-1, 1]."""
    _import_simulator()
    from metaworld.policies import ENV_POLICY_MAP

    policy = ENV_POLICY_MAP[f"{task}-v3"]()

    def act(state: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "constant(s) may be too high": they are clipped, as the environments do
            # a copy, because some of the experts write into the state that they are given
            return np.clip(np.asarray(policy.get_action(np.array(state)), dtype=np.float32), -1.0, 1.0)

    return act
