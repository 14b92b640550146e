"""Files and folders that flags name: checked before anything slow begins, and written."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from vla_pruner.errors import OptionError

STDOUT = "-"
"""Standard output, as a flag names it in place of a file."""
_NO_OTHERS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


def check_output(name: str | None, flag: str = "--json") -> None:
    """Check a file as `check_file` does; standard output and None (no file) need no check."""
    if name not in (None, STDOUT):
        check_file(name, flag)


def left_to(name: str | None) -> AbstractContextManager[Any]:
    """Return a context within which standard output is left to a report that goes there: what policies' own libraries
    print goes to standard error.

    Args:
        name: the file that the flag names; None: none.
    """
    return redirect_stdout(sys.stderr) if name == STDOUT else nullcontext()


def write_output(name: str, text: str, flag: str = "--json") -> None:
    """Write a text to the file that a flag names, or to standard output.

    Raises:
        OptionError: the file cannot be written.
    """
    if name == STDOUT:
        sys.stdout.write(text)
    else:
        write_file(name, text, flag)


def write_file(name: str, content: str | bytes, flag: str) -> None:
    """Write a text, as UTF-8, or bytes to the file that a flag names.

    Raises:
        OptionError: it cannot be written, since a disk is full, for instance.
    """
    try:
        replace_file(Path(name), content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise _unwritable(name, error, flag) from error


def replace_file(path: Path, content: bytes) -> None:
    """Write a file at once: a reader finds the old one or the new one, and a full disk leaves the old one. A pipe or a
    device is written to as it is, and so is a file in a folder that takes no others.

    Raises:
        OSError: it could not be written.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    beside = path.with_name(path.name + ".new")
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            beside.chmod(path.stat().st_mode)
        beside.replace(path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _NO_OTHERS and path.is_file():
            path.write_bytes(content)
            return
        raise


def check_file(name: str, flag: str = "--json") -> None:
    """Prove that a file which a flag names can be written, before anything slow begins, and leave no new file behind.

    Raises:
        OptionError: it cannot be written; the message says why.
    """
    try:
        file = Path(os.path.realpath(name))  # of links that go round, pathlib raises what is no OSError
        if not file.parent.is_dir():
            raise OptionError(f"{flag} is {name}, but there is no such folder; make it first.")
        if Path(name).is_dir():
            raise OptionError(f"{flag} is {name or 'empty'}, which is a folder; give a file in it.")
        if Path(name).exists() and not Path(name).is_file():
            return  # a pipe or a device: its reader would take opening and closing for the whole report
        is_new = not file.exists()
        with file.open("ab"):
            pass
        if is_new:
            file.unlink()
    except OSError as error:
        raise _unwritable(name, error, flag) from error


def check_folder(folder: Path) -> None:
    """Make the folder that --out names, and prove that a file can be written there, before anything slow begins.

    Raises:
        OptionError: no file can be written there; the message says why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        is_file = folder.exists() and not folder.is_dir()
        reason = "it is a file" if is_file else error.strerror or str(error)
        raise OptionError(f"--out is {folder}, which cannot be written to ({reason}); give a folder.") from error


def _unwritable(name: str, error: OSError, flag: str) -> OptionError:
    """Return the error of a file that could not be written."""
    return OptionError(f"{flag} is {name}, which cannot be written ({error.strerror or error}); give another file.")
