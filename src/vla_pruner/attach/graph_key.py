"""What a compiled program depends on, derived from the fields of what it reads.

A program holds whatever was true while it was traced. It may be used again only if all of that is still true, so every
field of a dataclass is part of the key unless it opts out, with a reason.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import fields
from enum import Enum
from functools import cache
from typing import Any

from torch import Tensor

_REASON = "not in the graph key"


def not_in_key(reason: str) -> dict[str, str]:
    """The metadata of a field that no program depends on.

    Args:
        reason: why no program does.
    """
    return {_REASON: reason}


def graph_key(instance: Any) -> tuple[Hashable, ...]:
    """What a program depends on of a dataclass: every field that does not opt out by `not_in_key`.

    Raises:
        TypeError: a field holds something of which it is not known what a program depends on.
    """
    return tuple([kind_of(getattr(instance, name)) for name in _names(type(instance))])


def kind_of(value: Any) -> Hashable:
    """What a program depends on of a value: all of a number, a word or a collection; the shape of a tensor, since its
    numbers are inputs of the graph; and the `graph_key` of any other object.

    Raises:
        TypeError: it is something else.
    """
    if value is None or isinstance(value, (bool, int, str, Enum)):
        return value
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, (tuple, list)):
        return tuple([kind_of(part) for part in value])
    if isinstance(value, (set, frozenset)):
        return frozenset(map(kind_of, value))
    if isinstance(value, dict):
        return tuple([(kind_of(key), kind_of(part)) for key, part in value.items()])
    if hasattr(type(value), "graph_key"):
        return value.graph_key
    raise TypeError(
        f"It is not known what a compiled program depends on of a {type(value).__name__}; give it a property "
        "graph_key, or its field the metadata not_in_key(reason)."
    )


@cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind) if _REASON not in field.metadata)
