"""ManiSkill3, which runs SIMPLER's bridge tasks: found, checked and imported without its questions and warnings.

Left alone, `gymnasium.make` asks on standard input whether to download assets that are missing.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vla_pruner.simulators.base import SimulatorUnavailable
from vla_pruner.simulators.simpler_conventions import INSTALL

VERSIONS = {"mani-skill": "3.0.1", "sapien": "3.0.3"}
"""The versions that were tested; others may simulate and draw differently."""

INSTALL_ASSETS = " && ".join(
    f"python -m mani_skill.utils.download_asset {asset}" for asset in ("bridge_v2_real2sim", "widowx250s")
)
"""The command takes one asset at a time. It writes to MS_ASSET_DIR, ~/.maniskill by default."""

INSTALL_VULKAN = (
    "sudo apt-get install -y mesa-vulkan-drivers  (Mesa 25 or newer, which Debian 12 has in its backports alone: see "
    "docs/simpler.md; VK_ICD_FILENAMES names the file of a driver that is elsewhere)"
)
"""Mesa's llvmpipe draws on the CPU; 22.3 lacks the indexing of descriptors that SAPIEN needs."""

_BRIDGE = "tasks/bridge_v2_real2sim_dataset"
_IN_ASSETS = (f"{_BRIDGE}/custom", f"{_BRIDGE}/real_inpainting", f"{_BRIDGE}/stages", "robots/widowx")


def check_packages() -> None:
    """Check that ManiSkill3 and its assets are installed, without importing it.

    Raises:
        SimulatorUnavailable: a package is missing or of another version, or the assets are not there.
    """
    for package, supported in VERSIONS.items():
        try:
            found = version(package)
        except PackageNotFoundError as error:
            raise SimulatorUnavailable(
                f"SIMPLER's bridge tasks run in ManiSkill3, which is not installed ({package} is missing)",
                f"{INSTALL} && {INSTALL_ASSETS}",
            ) from error
        if found != supported:
            raise SimulatorUnavailable(
                f"SIMPLER's bridge tasks run on {package} {supported} here, since others may draw or simulate "
                f"differently; found {found}",
                INSTALL,
            )
    folder = assets_folder()
    lacking = [name for name in _IN_ASSETS if not (folder / name).is_dir()]
    if lacking:
        raise SimulatorUnavailable(
            f"The folder {folder} lacks {', '.join(lacking)} of ManiSkill3's assets (MS_ASSET_DIR names another one)",
            INSTALL_ASSETS,
        )


def assets_folder() -> Path:
    """Return the folder in which ManiSkill3 looks for its assets."""
    return Path(os.environ.get("MS_ASSET_DIR", Path.home() / ".maniskill")) / "data"


def make(name: str) -> Any:
    """Return ManiSkill3's environment of this name, drawn and simulated on the CPU.

    Raises:
        SimulatorUnavailable: ManiSkill3 cannot be imported, nothing can draw on this machine, or a file of the assets
            is missing or damaged.
    """
    os.environ.setdefault("LP_NUM_THREADS", "1")  # llvmpipe's threads only compete with the policy's
    with quiet():
        try:
            importlib.import_module("mani_skill.envs")  # it registers the environments
            gymnasium, sapien = (importlib.import_module(name) for name in ("gymnasium", "sapien"))
        except (ImportError, OSError) as error:
            raise SimulatorUnavailable(f"ManiSkill3 cannot be imported ({error})", INSTALL) from error
        importlib.import_module("mani_skill.utils.logging_utils").logger.setLevel(logging.ERROR)
        try:
            sapien.render.RenderSystem(sapien.Device("cpu"))
        except RuntimeError as error:
            raise SimulatorUnavailable(f"SAPIEN cannot draw on this machine ({error})", INSTALL_VULKAN) from error
        try:
            # Without segmentation ManiSkill3 could not lay the scene over the photograph of the real one.
            made = gymnasium.make(
                name, obs_mode="rgb+segmentation", num_envs=1, sim_backend="cpu", render_backend="cpu"
            )
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise _unbuilt(name, str(error)) from error
    environment = made.unwrapped
    if immaterial := _immaterial(environment):
        environment.close()
        raise _unbuilt(name, f"no collision mesh of {', '.join(immaterial)}")
    # ManiSkill3 3.0.1 keeps the photographs of all environments in one table of the class, by the camera's name, so
    # an environment that is made later would replace the photograph of this one.
    environment._rgb_overlay_images = dict(environment._rgb_overlay_images)
    return environment


def _unbuilt(name: str, why: str) -> SimulatorUnavailable:
    return SimulatorUnavailable(
        f"ManiSkill3 cannot build {name} from the assets in {assets_folder()} ({why})", INSTALL_ASSETS
    )


def _immaterial(environment: Any) -> list[str]:
    """Return the things that everything passes through: SAPIEN goes on without the collision meshes that it lacks."""
    urdf = Path(environment.agent.urdf_path)
    meshes = re.findall(r'filename="([^"]+)"', urdf.read_text(encoding="utf-8"))
    return [
        *(mesh for mesh in dict.fromkeys(meshes) if not (urdf.parent / mesh).is_file()),
        *(
            name
            for name, actor in environment.scene.actors.items()
            if not any(getattr(part, "collision_shapes", ()) for part in actor._objs[0].components)
        ),
    ]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of ManiSkill3's packages in the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that an episode depends on."""
    return {package: version(package) for package in (*VERSIONS, "gymnasium", "numpy")}
