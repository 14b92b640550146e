"""JSON files of our formats, read back; and files and folders that flags name, checked before anything slow."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import reprlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from vla_pruner.errors import OptionError

_Found = TypeVar("_Found")

_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
_MOST = 2**63
_NO_OTHERS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


class ForeignFile(ValueError):
    """JSON, but not of the expected format. The message goes into brackets."""


def read_format(path: Path, format: str, make: Callable[[dict[str, Any]], _Found]) -> _Found:
    """Return the result of `make` on a file whose "format" is this one.

    Raises:
        OSError: it cannot be read.
        ForeignFile: it is of another format, or of another version of this one.
        ValueError: it is damaged; the message says where.
    """
    content = load_json(path.read_text(encoding="utf-8"))
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


def load_json(content: str | bytes) -> Any:
    """Return the plain values of a JSON text.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or holds NaN or Infinity, which are no numbers of JSON.
    """
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def typed(hint: Any, value: Any, name: str) -> Any:
    """Return a plain JSON value, checked against a type and made into it: objects become dataclasses, and lists tuples.

    Of a dataclass, a later version may have written fields that this one does not know, which are passed over, and an
    earlier one may lack those that have a default.

    Args:
        hint: a type of JSON, a dataclass, or lists, tuples, mappings and options of these; `Any` checks nothing.
        value: as `load_json` gives it.
        name: of the value, for the message.

    Raises:
        ValueError: a value is of another type, a number is not finite or too large, or a text holds a lone surrogate.
    """
    if hint is Any:
        return value
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in inside:
            return None
        (hint,) = (one for one in inside if one is not NoneType)
        return typed(hint, value, name)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, name)
    if origin in (list, tuple, Sequence):
        if not isinstance(value, (list, tuple)):
            raise _not(value, name, "a list")
        if origin is tuple and inside[-1] is not Ellipsis:
            if len(value) != len(inside):
                raise ValueError(f"{name} has {len(value)} values, not {len(inside)}")
            hints = inside
        else:
            hints = (inside[0],) * len(value)
        found = [
            typed(one, each, f"{name}[{place}]") for place, (one, each) in enumerate(zip(hints, value, strict=True))
        ]
        return tuple(found) if origin is tuple else found
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _not(value, name, "an object")
        return {
            typed(str, key, f"a name in {name}"): typed(inside[1], one, f"{name}.{key}") for key, one in value.items()
        }
    return _scalar(hint, value, name)


def field_of(content: Any, name: str, hint: Any, of: str = "it") -> Any:
    """Return a field of an object that may hold others, as `typed`.

    Args:
        of: the object's name, for the message.

    Raises:
        ValueError: the content is no object, or the field is missing or of another type.
    """
    if not isinstance(content, Mapping):
        raise _not(content, of, "an object")
    if name not in content:
        raise ValueError(f"{name} is missing")
    return typed(hint, content[name], name)


def _dataclass(hint: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise _not(value, name, "an object")
    hints = _hints(hint)
    missing = sorted(required(hint) - set(value))
    if missing:
        raise ValueError(f"the fields {listed(missing)} of {name} are missing")
    return hint(**{one: typed(hints[one], value[one], one) for one in hints if one in value})


def listed(names: Sequence[str]) -> str:
    """Return names from outside, shortened so that they fit into a sentence."""
    told = ", ".join(one if len(one) <= 40 else f"{one[:40]}..." for one in names[:8])
    return told if len(names) <= 8 else f"{told} and {len(names) - 8} more"


@lru_cache
def _hints(cls: type) -> dict[str, Any]:
    known = get_type_hints(cls)
    return {one.name: known[one.name] for one in dataclasses.fields(cls)}


@lru_cache
def required(cls: type) -> frozenset[str]:
    """Return the fields without a default: those that every version has written."""
    absent = dataclasses.MISSING
    fields = dataclasses.fields(cls)
    return frozenset(one.name for one in fields if one.default is absent and one.default_factory is absent)


def _scalar(hint: type, value: Any, name: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < _MOST else math.inf
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise _not(value, name, _WORDS[hint])
    if hint is int and abs(value) >= _MOST:
        raise ValueError(f"{name} is too large")
    if isinstance(value, str) and not _is_unicode(value):
        raise ValueError(f"{name} is {reprlib.repr(value)}, which is no text: it holds a lone surrogate")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _not(value: Any, name: str, wanted: str) -> ValueError:
    return ValueError(f"{name} is {reprlib.repr(value)}, not {wanted}")


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
        raise unwritable(name, error, flag) from error


def check_folder(folder: Path, flag: str = "--out") -> None:
    """Make a folder which a flag names, and prove that a file can be written there, before anything slow begins.

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
        raise OptionError(f"{flag} is {folder}, which cannot be written to ({reason}); give a folder.") from error


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


def unwritable(name: str, error: OSError, flag: str = "--json") -> OptionError:
    """Return the error of a file that could not be written."""
    return OptionError(f"{flag} is {name}, which cannot be written ({error.strerror or error}); give another file.")
