"""The conditions of a measurement: versions, machine, load, source tree. Demo and benchmark record the same."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


def machine_conditions(packages: Sequence[str]) -> dict[str, Any]:
    """Return the facts that a reader needs to judge or repeat a run on this machine; plain JSON values.

    Args:
        packages: distributions whose versions count.
    """
    import torch

    return {
        "command": " ".join(Path(word).name if index == 0 else word for index, word in enumerate(sys.argv)),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "busy_cores_before": busy_cores(),
        "load_average_before": load_average(),
        "git": git_commit(),
    }


def busy_cores() -> float | None:
    """Return the number of cores that other programs use now, watched for half a second; None if the system does not
    say.
    """
    before = _cpu_ticks()
    time.sleep(0.5)
    after = _cpu_ticks()
    if before is None or after is None or after[1] <= before[1]:
        return None
    idle, total = after[0] - before[0], after[1] - before[1]
    return round((os.cpu_count() or 1) * (1 - idle / total), 2)


def _cpu_ticks() -> tuple[int, int] | None:
    """Return (idle, all) ticks of all cores since the system started."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    return ticks[3] + ticks[4], sum(ticks)


def load_average() -> float | None:
    """Return the number of programs that wanted a core during the last minute; None if the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def processor() -> str:
    """Return the CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """Return the version of an installed distribution; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def sha256(path: Path) -> str | None:
    """Return the SHA-256 of a file; None if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def git_commit() -> str | None:
    """Return the commit of the source tree, "+" appended if tracked files differ from it; None outside of a clone."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
