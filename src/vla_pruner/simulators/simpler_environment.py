"""One of SIMPLER's bridge tasks as an environment of `simulators.base`."""

from __future__ import annotations

from typing import Any

import numpy as np

from vla_pruner.errors import SessionError
from vla_pruner.simulators.base import Image, Images, Observation, SuiteError, Task, solved
from vla_pruner.simulators.simpler_conventions import ACTION_SIZE, CAMERA, averaged
from vla_pruner.simulators.simpler_package import make, quiet

SEED = 0
"""The seed of every reset; the number of an episode alone places the objects."""


class SimplerEnvironment:
    """One of SIMPLER's bridge tasks; see `simulators.base.Environment`.

    `SimplerSuite.make` makes it. ManiSkill3 draws the camera in every step, also if nobody looks.

    Attributes:
        task: the task.
        images_drawn: camera images drawn so far.

    Args:
        name: ManiSkill3's name of the task.
    """

    def __init__(self, task: Task, name: str) -> None:
        self.task = task
        self.images_drawn = 0
        self._env: Any = make(name)
        self._image = np.zeros((1, 1, 3), np.uint8)
        self._steps = 0
        self._over = True

    @property
    def simulator(self) -> Any:
        """ManiSkill3's environment with the true place of everything, for scripted controllers and never for a policy.

        Raises:
            SessionError: the environment is closed.
        """
        if self._env is None:
            raise SessionError("The environment is closed; make another one.")
        return self._env

    def reset(self, *, initial_state: int) -> tuple[Observation, dict[str, Any]]:
        """See `Environment.reset`; the number is SIMPLER's episode_id. Objects settle within it."""
        import torch

        self.task.check_initial_state(initial_state)
        self._over = True  # until it has begun
        with quiet():
            seen, _ = self.simulator.reset(seed=SEED, options={"episode_id": torch.tensor([int(initial_state)])})
        self._steps = 0
        self._over = False
        return self._observation(seen), {"success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """See `Environment.step`: the episode goes on after a success, and what counts is the last step.

        Args:
            action: (7,) displacement in metres (3), axis times angle in radians (3), gripper (-1 closed, +1 open).

        Raises:
            SuiteError: the action has another shape, or numbers that are not finite.
            SessionError: the episode is over, or the environment closed.
        """
        if self._over:
            raise SessionError("The episode is over, or none has begun; call reset(initial_state=...) first.")
        values = np.asarray(action, dtype=np.float32)
        if values.shape != (ACTION_SIZE,) or not np.isfinite(values).all():
            raise SuiteError(f"SIMPLER's WidowX takes actions of {ACTION_SIZE} finite numbers; found {action!r}.")
        with quiet():
            seen, *_, info = self.simulator.step(values)
        self._steps += 1
        success = solved(info["success"].item())
        self._over = self._steps >= self.task.max_steps
        observation = self._observation(seen)
        ended = self._over and success
        return observation, float(success), ended, self._over and not success, {"success": success}

    def frame(self, size: int) -> Image:
        """See `Environment.frame`; the middle of the camera's image."""
        height, width, _ = self._image.shape
        side, left = min(height, width), max(width - height, 0) // 2
        return averaged(self._image[:side, left : left + side], size)

    def close(self) -> None:
        """See `Environment.close`."""
        if self._env is not None:
            self._env.close()
            self._env = None
        self._over = True

    def _observation(self, seen: Any) -> Observation:
        image = seen["sensor_data"][CAMERA]["rgb"][0].cpu().numpy().copy()
        self._image = image
        self.images_drawn += 1
        (instruction,) = self.simulator.get_language_instruction()
        return Observation(Images(lambda _: image, (CAMERA,), lambda: True), instruction, None)
