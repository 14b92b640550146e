"""Meta-World's tasks behind the interface of `simulators.base`.

Initial state i is the episode of seed `EVALUATION_SEED + i`: there are as many as wanted, and nothing was trained or
tuned on any of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from torch import nn

from vla_pruner.errors import SessionError
from vla_pruner.simulators import metaworld
from vla_pruner.simulators.base import (
    Convention,
    Environment,
    Image,
    Images,
    Observation,
    SeesTheState,
    SuiteError,
    Task,
    find_task,
)

CAMERA = "corner"

_NEED_VISION = ("reach", "push", "pick-place", "coffee-push")
TASKS: dict[str, tuple[str, ...]] = {
    "metaworld:mt8": tuple(metaworld.TASKS),
    "metaworld:mt6": (*_NEED_VISION, "plate-slide", "drawer-open"),
    "metaworld:mt4": _NEED_VISION,
}
"""Suite -> tasks: all that the reference policy was trained on; those without the two that it most often solves with
another scene's image and another task's words; and those that it cannot solve with another scene's image.
"""


class MetaWorldSuite:
    """Tasks of Meta-World as the reference policy sees them.

    Args:
        name: a key of `TASKS`.
        image_size: height and width of the images; the shipped policy takes 112.

    Raises:
        SuiteError: there is no such suite.
        SimulatorUnavailable: Meta-World is not installed.
    """

    cameras = (CAMERA,)
    action_size = 4
    settling_steps = 0

    def __init__(self, name: str = "metaworld:mt8", image_size: int = 112) -> None:
        if name not in TASKS:
            raise SuiteError(f"Meta-World has no suite {name!r} here; its suites are {', '.join(TASKS)}.")
        metaworld._import_simulator()
        self.name = name
        self.image_size = image_size
        self.tasks = tuple(
            Task(name, index, task, metaworld.TASKS[task], metaworld.MAX_CONTROL_STEPS, None)
            for index, task in enumerate(TASKS[name])
        )

    def make(self, task: Task | int | str) -> MetaWorldEnvironment:
        """The environment of a task; errors as in `Suite.make`."""
        return MetaWorldEnvironment(find_task(self.tasks, task), self.image_size)

    def convention(self, policy: Any) -> Convention:
        """One camera, "image", the state as it is, one action at a time.

        Raises:
            SuiteError: the policy wants other cameras or another state.
        """
        if isinstance(policy, SeesTheState):
            return Convention({}, proprio=False)
        if policy.cameras != ("image",) or policy.proprio_size not in (None, metaworld.PROPRIO_SIZE):
            raise SuiteError(
                f"Meta-World has one camera, 'image', and a state of {metaworld.PROPRIO_SIZE} numbers; this policy "
                f"takes the cameras {', '.join(map(repr, policy.cameras))} and a state of {policy.proprio_size}. Run "
                "the reference policy here, or one trained on the same observations."
            )
        return Convention({"image": CAMERA}, proprio=policy.proprio_size is not None)

    def versions(self) -> dict[str, str]:
        """Of Meta-World, MuJoCo and Gymnasium, and the rendering backend."""
        return {
            **{package: version(package) for package in ("metaworld", "mujoco", "gymnasium")},
            "renderer": os.environ.get("MUJOCO_GL", ""),
        }


class MetaWorldEnvironment:
    """One task of Meta-World; see `simulators.base.Environment`.

    Attributes:
        state: (39,) float64, Meta-World's full observation: what a scripted expert may see, and no policy.
    """

    def __init__(self, task: Task, image_size: int) -> None:
        self.task = task
        self.images_drawn = 0
        self._env = metaworld.MetaWorldEnv(task.name, image_size, render=False)
        self._moment = 0
        self._over = True

    @property
    def state(self) -> np.ndarray:
        return self._env.state

    def reset(self, *, initial_state: int) -> tuple[Observation, dict[str, Any]]:
        """As `Environment.reset`."""
        self.task.check_initial_state(initial_state)
        seen = self._env.reset(metaworld.EVALUATION_SEED + int(initial_state))
        self._over = False
        return self._observe(seen), {"success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """As `Environment.step`: (4,) dx, dy, dz, gripper, clipped to [-1, 1]."""
        if self._over:
            raise SessionError("The episode is over, or none has begun; call reset(initial_state=...) first.")
        seen, success, over = self._env.step(action)
        self._over = over
        return self._observe(seen), float(success), success, over and not success, {"success": success}

    def frame(self, size: int) -> Image:
        """As `Environment.frame`."""
        return self._env.render(size)

    def close(self) -> None:
        """As `Environment.close`."""
        self._env.close()

    def _observe(self, seen: metaworld.Observation) -> Observation:
        self._moment += 1
        moment = self._moment
        images = Images(self._draw, (CAMERA,), lambda: self._moment == moment)
        return Observation(images, seen.proprio, seen.instruction)

    def _draw(self, camera: str) -> Image:
        self.images_drawn += 1
        return self._env.image()


class MetaWorldExpert(nn.Module):
    """Meta-World's own scripted policies as a policy that sees the simulator's state instead of images."""

    cameras: tuple[str, ...] = ()
    vision_towers: tuple[nn.Module, ...] = ()
    proprio_size = None

    def __init__(self) -> None:
        super().__init__()
        self._environment: MetaWorldEnvironment | None = None
        self._act: Any = None

    def watch(self, environment: Environment) -> None:
        """See this environment's state from now on.

        Raises:
            SuiteError: it is not Meta-World's.
        """
        if not isinstance(environment, MetaWorldEnvironment):
            raise SuiteError(f"Meta-World's experts act in Meta-World alone; found {environment.task.suite}.")
        self._environment = environment
        self._act = metaworld.scripted_expert(environment.task.name)

    def reset(self) -> None:
        """Begin a new episode: the experts remember nothing."""

    def act(self, images: Mapping[str, Image], instruction: str, proprio: np.ndarray | None = None) -> np.ndarray:
        """(1, 4) float32, whatever the images.

        Raises:
            SessionError: it was not given an environment to watch.
        """
        if self._environment is None:
            raise SessionError("A scripted expert acts by the simulator's state: call watch(environment) first.")
        return self._act(self._environment.state)[None]
