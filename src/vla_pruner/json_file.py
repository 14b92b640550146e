"""JSON files of a format of ours, read back; and files and folders that flags name, checked before anything slow."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vla_pruner.errors import BudgetError

_Found = TypeVar("_Found")


class ForeignFile(ValueError):
    """JSON, but not of the format that was asked for. The message goes into brackets."""


def read_format(path: Path, format: str, make: Callable[[dict[str, Any]], _Found]) -> _Found:
    """What `make` makes of a file whose "format" is this one.

    Raises:
        OSError: it cannot be read.
        ForeignFile: it is of another format, or of another version of this one.
        ValueError: it is damaged; the message says where.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    found = content.get("format") if isinstance(content, dict) else None
    if found != format:
        said = "it names no format" if found is None else f"its format is {found!r}"
        raise ForeignFile(f"{said}, and this version reads {format!r}")
    try:
        return make(content)
    except KeyError as error:
        raise ValueError(f"{error} is missing") from error
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(str(error)) from error


def check_file(name: str, flag: str = "--json") -> None:
    """Proves that a file which a flag names can be written, before anything slow begins, and leaves no new file behind.

    Raises:
        BudgetError: saying why not.
    """
    try:
        if not Path(name).resolve().parent.is_dir():
            raise BudgetError(f"{flag} is {name}, but there is no such folder; make it first.")
        if Path(name).is_dir():
            raise BudgetError(f"{flag} is {name or 'empty'}, which is a folder; give a file in it.")
        if Path(name).exists() and not Path(name).is_file():
            return  # a pipe or a device: who reads it would take opening and closing for the whole report
        file = Path(name).resolve()
        is_new = not file.exists()
        with file.open("ab"):
            pass
        if is_new:
            file.unlink()
    except OSError as error:
        raise unwritable(name, error, flag) from error


def check_folder(folder: Path, flag: str = "--out") -> None:
    """Makes a folder which a flag names, and proves that a file can be written there, before anything slow begins.

    Raises:
        BudgetError: saying why not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        is_file = folder.exists() and not folder.is_dir()
        reason = "it is a file" if is_file else error.strerror or str(error)
        raise BudgetError(f"{flag} is {folder}, which cannot be written to ({reason}); give a folder.") from error


def unwritable(name: str, error: OSError, flag: str = "--json") -> BudgetError:
    """The error of a file that could not be written."""
    return BudgetError(f"{flag} is {name}, which cannot be written ({error.strerror or error}); give another file.")
