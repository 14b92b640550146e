"""The file that `--json` names, checked before anything slow begins."""

from __future__ import annotations

from pathlib import Path

from vla_pruner.errors import BudgetError


def check_file(name: str) -> None:
    """Proves that `--json FILE` can be written, before anything slow begins, and leaves no new file behind.

    Raises:
        BudgetError: saying why not.
    """
    try:
        if not Path(name).resolve().parent.is_dir():
            raise BudgetError(f"--json is {name}, but there is no such folder; make it first.")
        if Path(name).is_dir():
            raise BudgetError(f"--json is {name or 'empty'}, which is a folder; give a file in it.")
        if Path(name).exists() and not Path(name).is_file():
            return  # a pipe or a device: who reads it would take opening and closing for the whole report
        file = Path(name).resolve()
        is_new = not file.exists()
        with file.open("ab"):
            pass
        if is_new:
            file.unlink()
    except OSError as error:
        raise unwritable(name, error) from error


def unwritable(name: str, error: OSError) -> BudgetError:
    """The error of a file that could not be written."""
    return BudgetError(f"--json is {name}, which cannot be written ({error.strerror or error}); give another file.")
