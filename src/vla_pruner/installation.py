"""The installed packages and the machine, as a bug report needs them (`vla-pruner env`)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from vla_pruner import __version__
from vla_pruner.checks import ATTENTION
from vla_pruner.conditions import git_commit, processor, version
from vla_pruner.plugins import FAMILIES, METHODS, plugins
from vla_pruner.versions import transformers_problem
from vla_pruner.wording import counted, one_line

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "triton",
    "torchvision",
    "lerobot",
    "flash-attn",
)
"""The distributions whose versions matter if something does not work."""
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "MUJOCO_GL", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF")
"""The environment variables that change how things run; no others are shown."""

_SECONDS = 60
_NAMED = 3
_DRAW = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 16, 16).close()"


def installation() -> dict[str, Any]:
    """Return versions, device, extras, attention backends and rendering, as plain JSON values.

    Nothing raises: a value that cannot be found out is None, or a text that says why.
    """
    found = version("transformers")
    return {
        "vla_pruner": __version__,
        "git": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "packages": {name: version(name) for name in PACKAGES},
        "transformers_problem": transformers_problem(found) if found else "transformers is not installed",
        **_devices(),
        "extras": extras(),
        "rendering": _rendering(),
        "methods_from_outside": [str(one) for one in plugins(METHODS)],
        "families_from_outside": [str(one) for one in plugins(FAMILIES)],
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def extras() -> dict[str, list[str] | None]:
    """Return the missing packages of each extra; an empty list: it is installed; None: it is not for this Python."""
    try:
        declared = metadata.metadata("vla-pruner").get_all("Provides-Extra") or []
        lines = [Requirement(line) for line in metadata.requires("vla-pruner") or ()]
    except metadata.PackageNotFoundError:  # imported from a folder that was never installed
        return {}
    found: dict[str, list[str] | None] = {}
    for name in declared:
        brings = [line for line in lines if line.marker is not None and _is_of(line, name)]
        found[name] = [_without_marker(line) for line in brings if not _satisfied(line)] if brings else None
    return found


def _is_of(line: Requirement, extra: str) -> bool:
    assert line.marker is not None
    return line.marker.evaluate({"extra": extra}) and not line.marker.evaluate({"extra": ""})


def _satisfied(wanted: Requirement) -> bool:
    found = version(wanted.name)
    return found is not None and wanted.specifier.contains(found, prereleases=True)


def _without_marker(line: Requirement) -> str:
    return str(line).partition(";")[0].strip()


def _devices() -> dict[str, Any]:
    """Return the accelerators, and how attention is computed on them."""
    try:
        import torch

        from vla_pruner.accelerators import available, described
    except Exception as error:  # a broken installation is the purpose of this command
        return {"devices": None, "attention": None, "torch_problem": f"{type(error).__name__}: {error}"}
    cuda = torch.backends.cuda
    kernels = {
        "flash": cuda.flash_sdp_enabled(),
        "memory_efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    devices = [f"cpu ({counted(torch.get_num_threads(), 'thread')})"]
    try:
        devices += map(described, available())
    except RuntimeError as error:
        devices.append(f"the accelerator cannot be used: {error}")
    return {
        "devices": devices,
        "cuda_of_torch": torch.version.cuda,
        "attention": {"supported": list(ATTENTION), "sdpa_kernels_on_cuda": kernels},
    }


def _rendering() -> str:
    """Return a sentence on whether MuJoCo draws, tried in another process, since a broken driver may end it."""
    if version("mujoco") is None:
        return "MuJoCo is not installed"
    chosen = os.environ.get("MUJOCO_GL", "egl")
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DRAW],
            env={**os.environ, "MUJOCO_GL": chosen},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"MuJoCo {version('mujoco')} was not tried with MUJOCO_GL={chosen}: {error}"
    if done.returncode == 0:
        return f"MuJoCo {version('mujoco')} draws with MUJOCO_GL={chosen}"
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"MuJoCo {version('mujoco')} does not draw with MUJOCO_GL={chosen}: {said}"


def as_text(found: dict[str, Any]) -> str:
    """Return an installation as lines that fit a terminal of 80 columns if their content does."""
    git = f" ({found['git']})" if found["git"] else ""
    rows: list[tuple[str, str]] = [
        ("vla-pruner", found["vla_pruner"] + git),
        ("Python", f"{found['python']}, {found['platform']}"),
        ("CPU", f"{found['processor']}, {found['cores']} cores"),
        *((name, number or "not installed") for name, number in found["packages"].items()),
    ]
    if found["transformers_problem"]:
        rows.append(("problem", found["transformers_problem"]))
    if found["devices"] is None:
        rows.append(("problem", f"torch cannot be imported: {found['torch_problem']}"))
    else:
        rows += [("device", device) for device in found["devices"]]
        kernels = found["attention"]["sdpa_kernels_on_cuda"]
        on = ", ".join(name.replace("_", " ") for name, enabled in kernels.items() if enabled)
        rows.append(("CUDA of torch", found["cuda_of_torch"] or "none: this torch is for the CPU"))
        rows.append(
            ("attention", f"{' and '.join(found['attention']['supported'])}; kernels of sdpa that CUDA may use: {on}")
        )
    for name, missing in found["extras"].items():
        rows.append((f"extra {name}", _told(missing)))
    rows.append(("rendering", found["rendering"]))
    for kind in ("methods", "families"):
        rows += [(f"{kind} added", one) for one in found[f"{kind}_from_outside"]]
    rows += [(name, value) for name, value in found["environment"].items()]
    widest = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{widest}}  {one_line(value)}" for name, value in rows)


def _told(missing: list[str] | None) -> str:
    if missing is None:
        return "not for this Python"
    if not missing:
        return "installed"
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    return f"lacks {', '.join(missing[:_NAMED])}{more}"


def as_json(found: dict[str, Any]) -> str:
    """Return an installation as JSON text."""
    return json.dumps(found, indent=2)
