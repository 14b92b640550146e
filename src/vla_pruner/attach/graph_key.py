"""The key of a compiled program: everything that it depends on, derived from the fields of the objects that it reads.

A program holds whatever was true while it was traced. It may be used again only if all of that is still true, so every
field of a dataclass is part of the key unless it opts out, with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import fields
from enum import Enum
from functools import cache
from operator import attrgetter
from typing import Any

from torch import Tensor

_REASON = "not in the graph key"


def not_in_key(reason: str) -> dict[str, str]:
    """Return the metadata of a field that no program depends on.

    Args:
        reason: why no program does.
    """
    return {_REASON: reason}


def graph_key(instance: Any) -> tuple[Hashable, ...]:
    """Return the part of a program's key that a dataclass makes: every field that does not opt out by `not_in_key`.

    Raises:
        TypeError: a field holds a value of an unsupported type.
    """
    return tuple([_reader_of(type(value))(value) for value in _values_of(type(instance))(instance)])


def kind_of(value: Any) -> Hashable:
    """Return the part of a program's key that a value makes: all of a number, a word or a collection; the shape of a
    tensor, since its numbers are inputs of the graph; and the `graph_key` of any other object.

    Raises:
        TypeError: it is something else.
    """
    return _reader_of(type(value))(value)


@cache
def _reader_of(kind: type) -> Callable[[Any], Hashable]:
    """Return the function that makes the key of a value of this type, cached since every compiled call has keys."""
    if issubclass(kind, (type(None), bool, int, str, Enum)):
        return _itself
    if issubclass(kind, Tensor):
        return attrgetter("shape")
    if issubclass(kind, (tuple, list)):
        return lambda value: tuple([_reader_of(type(part))(part) for part in value])
    if issubclass(kind, (set, frozenset)):
        return lambda value: frozenset([kind_of(part) for part in value])
    if issubclass(kind, dict):
        return lambda value: tuple([(key, _reader_of(type(part))(part)) for key, part in value.items()])
    if hasattr(kind, "graph_key"):
        return attrgetter("graph_key")
    raise TypeError(
        f"It is not known what a compiled program depends on of a {kind.__name__}; give it a property graph_key, or "
        "its field the metadata not_in_key(reason)."
    )


def _itself(value: Hashable) -> Hashable:
    return value


@cache
def _values_of(kind: type) -> Callable[[Any], tuple[Any, ...]]:
    """Return the function that reads the fields of a dataclass that are part of its key."""
    names = [field.name for field in fields(kind) if _REASON not in field.metadata]
    read = attrgetter(*names)
    return read if len(names) > 1 else lambda instance: (read(instance),)
