"""Distributions as an installer leaves them: modules, and a dist-info folder beside them, in a folder on the path."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path

EXAMPLE = Path(__file__).parent / "example"


def install(folder: Path, name: str, version: str, entries: Mapping[str, Mapping[str, str]], record: str = "") -> None:
    """Write the metadata of a distribution.

    Args:
        entries: by group, names and their objects.
        record: the files that the distribution has installed, one a line.
    """
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(record)
    lines = [
        line
        for group, named in entries.items()
        for line in (f"[{group}]", *(f"{word} = {path}" for word, path in named.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def install_example(folder: Path, version: str | None = None) -> None:
    """The distribution of the folder `example`, as its pyproject.toml describes it."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    shutil.copytree(EXAMPLE / "src", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.py"))]
    install(folder, project["name"], version or project["version"], project["entry-points"], "\n".join(files))
