"""Methods and families from outside of this package: entry points of other distributions, and modules of the user's
own.

Nothing is imported until it is needed, and a broken distribution does not hide the names of others.
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from vla_pruner.errors import PluginError
from vla_pruner.wording import one_line

METHODS = "vla_pruner.methods"
FAMILIES = "vla_pruner.families"
"""The groups of entry points: each has a name, and the module and class that it stands for."""

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class Plugin:
    """An entry point of a distribution.

    Attributes:
        name: of the entry point.
        path: module and class, such as "my_module:MyMethod".
        distribution, version: of the distribution that brings it.
    """

    name: str
    path: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} ({self.path}) of the distribution {self.distribution} {self.version}"

    def load(self) -> type:
        """Return the class.

        Raises:
            PluginError: it cannot be imported, or is no class.
        """
        try:
            return class_at(self.path)
        except PluginError as error:
            raise PluginError(f"{self} cannot be used: {error}") from error


def plugins(group: str) -> tuple[Plugin, ...]:
    """Return the entry points of a group, in the order of their names; those of one path are looked up once."""
    return _plugins(group, tuple(sys.path))


@lru_cache(maxsize=16)
def _plugins(group: str, path: tuple[str, ...]) -> tuple[Plugin, ...]:
    found: dict[tuple[str, str], Plugin] = {}
    seen: set[str] = set()
    for distribution in metadata.distributions():
        try:
            entries = [(one.name, one.value.strip()) for one in distribution.entry_points if one.group == group]
            name, version = (distribution.metadata["Name"], distribution.version) if entries else ("", "")
        except Exception:  # a damaged record of any distribution would hide the names of all others
            continue
        # As in imports, the first of two copies on the path counts.
        plain = re.sub(r"[-_.]+", "-", str(name)).lower()
        if not entries or plain in seen:
            continue
        seen.add(plain)
        for entry, value in entries:
            found[entry, plain] = Plugin(entry, value, str(name), str(version))
    return tuple(found[key] for key in sorted(found))


def class_at(path: str) -> type:
    """Return the class that a path such as "my_module:MyMethod" names; its module is imported, which runs it.

    Raises:
        PluginError: it is no such path, the module cannot be imported, or there is no such class in it.
    """
    found = object_at(path, "class")
    if not isinstance(found, type):
        module, _, name = path.partition(":")
        told = f"has {name}, which is a {type(found).__name__} and no class"
        raise PluginError(f"the module {module} ({getattr(sys.modules[module], '__file__', None)}) {told}: {name}.")
    return found


def object_at(path: str, what: str = "object") -> Any:
    """Return the object that a path such as "my_module:my_function" names; its module is imported, which runs it.

    Args:
        path: module and name.
        what: the object's kind, for messages.

    Raises:
        PluginError: it is no such path, the module cannot be imported, or nothing in it has the name.
    """
    if not _PATH.fullmatch(path):
        raise PluginError(f"{path!r} is no module and {what}, such as my_module:MyMethod.")
    module, _, name = path.partition(":")
    try:
        found: Any = import_module(module)
    except (Exception, SystemExit) as error:  # a third-party module may do anything when it is imported
        told = f"{type(error).__name__}: {one_line(str(error))}"
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        fix = (
            "install it, or put its folder on PYTHONPATH (PYTHONPATH=. for the present one)"
            if missing
            else "try `import` of it in Python, and fix the error"
        )
        raise PluginError(f"the module {module} cannot be imported ({told}); {fix}.") from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        file = getattr(sys.modules[module], "__file__", None)
        raise PluginError(f"the module {module} ({file}) has no such {what}: {name}.")
    return found


def is_foreign(kind: type) -> bool:
    """Return True for a class from outside of this package."""
    return kind.__module__.partition(".")[0] != __name__.partition(".")[0]


def source_of(kind: type) -> dict[str, str] | None:
    """Return the origin of a class, as plain JSON values; None for those of this package.

    Returns:
        "class" (its module and name), and "distribution" and "version" if an installed distribution brings it, else
        "sha256", the first digits of that of its module's file.
    """
    return dict(_source(kind)) if is_foreign(kind) else None


@lru_cache(maxsize=256)
def _source(kind: type) -> tuple[tuple[str, str], ...]:
    module = kind.__module__
    path = f"{module}:{kind.__qualname__}"
    named = ("class", path)
    for plugin in (*plugins(METHODS), *plugins(FAMILIES)):
        if plugin.path == path:
            return named, ("distribution", plugin.distribution), ("version", plugin.version)
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return (named,)
    try:
        for name in metadata.packages_distributions().get(module.partition(".")[0], ()):
            distribution = metadata.distribution(name)
            if _holds(distribution, Path(file)):
                return named, ("distribution", name), ("version", distribution.version)
    except Exception:  # a damaged record of any distribution
        pass
    try:
        return named, ("sha256", hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12])
    except OSError:
        return (named,)


def _holds(distribution: metadata.Distribution, file: Path) -> bool:
    """Return True if a module's file is of a distribution, and not of another folder that comes before it on the
    path.
    """
    editable = '"editable": true' in (distribution.read_text("direct_url.json") or "")
    return editable or file.resolve().is_relative_to(Path(str(distribution.locate_file(""))).resolve())
