"""Meta-World's tasks behind the interface of `simulators.base`.

One action of the suite is one physics command; how many of them follow one look is each policy's convention. Initial
state i is the episode of seed `EVALUATION_SEED + i`: there are as many as wanted, and nothing was trained or tuned on
any of them.
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
    convention_of,
    find_task,
)

CAMERA = metaworld.CORNER
ONE_CAMERA_SIZE, TWO_CAMERA_SIZE = 112, 128
"""Sides in pixels of the images that the two kinds of reference policies were trained on."""

_NEED_VISION = ("reach", "push", "pick-place", "coffee-push")
TASKS: dict[str, tuple[str, ...]] = {
    "metaworld:mt8": tuple(metaworld.TASKS),
    "metaworld:mt6": (*_NEED_VISION, "plate-slide", "drawer-open"),
    "metaworld:mt4": _NEED_VISION,
}
"""The tasks of each suite: all that the reference policy was trained on; those without the two that it most often
solves with another scene's image and another task's words; and those that it cannot solve with another scene's image.
"""


class MetaWorldSuite:
    """Tasks of Meta-World as the reference policies see them.

    Attributes:
        image_sizes: sides in pixels of the images of one camera, and of a pair.
        pair: names of the pair's cameras.

    Args:
        name: a key of `TASKS`.
        image_size: height and width of all images; None: 112 of the camera "corner", and 128 of the pair "corner_128"
            and "wrist_128".

    Raises:
        SuiteError: there is no such suite.
        SimulatorUnavailable: Meta-World is not installed.
    """

    action_size = 4
    settling_steps = 0

    def __init__(self, name: str = "metaworld:mt8", image_size: int | None = None) -> None:
        if name not in TASKS:
            raise SuiteError(f"Meta-World has no suite {name!r} here; its suites are {', '.join(TASKS)}.")
        metaworld._import_simulator()
        self.name = name
        self.image_sizes = (ONE_CAMERA_SIZE, TWO_CAMERA_SIZE) if image_size is None else (image_size, image_size)
        one, two = self.image_sizes
        self.pair = f"{metaworld.CORNER}_{two}", f"{metaworld.WRIST}_{two}"
        self._views = {
            CAMERA: (metaworld.CORNER, one),
            self.pair[0]: (metaworld.CORNER, two),
            self.pair[1]: (metaworld.WRIST, two),
        }
        self.cameras = tuple(self._views)
        self.tasks = tuple(
            Task(name, index, task, metaworld.TASKS[task], metaworld.MAX_COMMANDS, None)
            for index, task in enumerate(TASKS[name])
        )

    def make(self, task: Task | int | str) -> MetaWorldEnvironment:
        """Return the environment of a task; errors as in `Suite.make`."""
        return MetaWorldEnvironment(find_task(self.tasks, task), self._views)

    def convention(self, policy: Any) -> Convention:
        """Return the convention of a reference policy. One camera: "image", each action carried out four times. Two
        cameras: "image" and "wrist_image", as many actions of a chunk as its configuration says, once each. The state
        is passed on as it is.

        Raises:
            SuiteError: the policy wants other cameras, other images or another state.
        """
        if isinstance(policy, SeesTheState):
            return Convention({}, proprio=False)
        state, size = policy.proprio_size, getattr(policy, "image_size", None)
        one, two = self.image_sizes
        if policy.cameras == ("image",) and state in (None, metaworld.PROPRIO_SIZE) and size in (None, one):
            return Convention({"image": CAMERA}, proprio=state is not None, repeat=metaworld.ACTION_REPEAT)
        convention = convention_of(policy, "metaworld", self)
        if convention is not None:
            return convention
        pixels = "" if size is None else f", images of {size} pixels"
        raise SuiteError(
            f"Meta-World shows one camera, 'image' of {one} pixels, or two, 'image' and 'wrist_image' of {two}, and a "
            f"state of {metaworld.PROPRIO_SIZE} numbers; this policy takes the cameras "
            f"{', '.join(map(repr, policy.cameras))}{pixels} and a state of {state}. Run a reference policy for "
            "Meta-World here ('reference:metaworld', 'reference:autoregressive'), or one trained on the same "
            "observations."
        )

    def expert(self) -> MetaWorldExpert:
        """Return Meta-World's own scripted policies."""
        return MetaWorldExpert()

    def versions(self) -> dict[str, str]:
        """Return the versions of Meta-World, MuJoCo and Gymnasium, and the rendering backend."""
        return {
            **{package: version(package) for package in ("metaworld", "mujoco", "gymnasium")},
            "renderer": os.environ.get("MUJOCO_GL", ""),
        }


def two_cameras(policy: Any, suite: MetaWorldSuite) -> Convention | None:
    """Return the convention of the two-camera reference policy; None if it was trained elsewhere or on images of
    another size.
    """
    config = policy.config
    fits = (
        config.suite == "metaworld"
        and policy.cameras == ("image", "wrist_image")
        and policy.proprio_size == metaworld.PROPRIO_SIZE
        and config.action_dimensions == suite.action_size
        and policy.image_size == suite.image_sizes[1]
    )
    if not fits:
        return None
    return Convention(dict(zip(policy.cameras, suite.pair, strict=True)), proprio=True, horizon=config.executed)


class MetaWorldEnvironment:
    """One task of Meta-World; see `simulators.base.Environment`.

    Attributes:
        state: (39,) float64, Meta-World's full observation, for scripted experts and never for a policy.

    Args:
        views: view and side in pixels of every camera.
    """

    def __init__(self, task: Task, views: Mapping[str, tuple[str, int]]) -> None:
        self.task = task
        self.images_drawn = 0
        self._views = views
        self._env = metaworld.MetaWorldEnv(task.name, render=False, action_repeat=1, max_control_steps=task.max_steps)
        self._moment = 0
        self._over = True

    @property
    def state(self) -> np.ndarray:
        return self._env.state

    def reset(self, *, initial_state: int) -> tuple[Observation, dict[str, Any]]:
        """See `Environment.reset`."""
        self.task.check_initial_state(initial_state)
        return self.begin(metaworld.EVALUATION_SEED + int(initial_state)), {"success": False}

    def begin(self, seed: int) -> Observation:
        """Begin the episode of any seed, including those of the training."""
        seen = self._env.reset(seed)
        self._over = False
        return self._observe(seen)

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """See `Environment.step`; `action` is (4,) dx, dy, dz, gripper, clipped to [-1, 1]."""
        if self._over:
            raise SessionError("The episode is over, or none has begun; call reset(initial_state=...) first.")
        seen, success, over = self._env.step(action)
        self._over = over
        return self._observe(seen), float(success), success, over and not success, {"success": success}

    def frame(self, size: int) -> Image:
        """See `Environment.frame`."""
        return self._env.render(size)

    def picture(self, camera: str, size: int) -> Image:
        """Return (size, size, 3) uint8: the view of a camera, for videos; not counted as drawn."""
        return self._env.render(size, self._views[camera][0])

    def close(self) -> None:
        """See `Environment.close`."""
        self._env.close()

    def _observe(self, seen: metaworld.Observation) -> Observation:
        self._moment += 1
        moment = self._moment
        images = Images(self._draw, tuple(self._views), lambda: self._moment == moment)
        return Observation(images, seen.instruction, seen.proprio)

    def _draw(self, camera: str) -> Image:
        self.images_drawn += 1
        return self._env.image(*self._views[camera])


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
        """Begin a new episode: the experts have no memory."""

    def act(self, images: Mapping[str, Image], instruction: str, proprio: np.ndarray | None = None) -> np.ndarray:
        """Return (1, 4) float32, whatever the images.

        Raises:
            SessionError: it was not given an environment to watch.
        """
        if self._environment is None:
            raise SessionError("A scripted expert acts by the simulator's state: call watch(environment) first.")
        return self._act(self._environment.state)[None]
