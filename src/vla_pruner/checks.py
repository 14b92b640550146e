"""Checks of options that several parts of the package take."""

from __future__ import annotations

import math

from vla_pruner.errors import OptionError, UnsupportedModelError

ATTENTION = ("sdpa", "eager")


def is_count(value: object, least: int) -> bool:
    """Return True if `value` is an int, and no bool, of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Return True if `value` is a finite int or float, and no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False


def is_seed(value: object) -> bool:
    """Return True if `value` is an int that NumPy's and torch's generators both take."""
    return isinstance(value, int) and is_count(value, 0) and value < 2**32


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise OptionError unless `value` is one of `choices`."""
    if value not in choices:
        raise OptionError(f"{name}={value!r} was given; it is one of {', '.join(map(repr, choices))}.")


def check_attention(attn_implementation: str) -> None:
    """Refuse an attention backend under which nothing can be pruned.

    Raises:
        UnsupportedModelError: it is neither "sdpa" nor "eager".
    """
    if attn_implementation not in ATTENTION:
        raise UnsupportedModelError(
            f"attn_implementation={attn_implementation!r} was given; 'sdpa' and 'eager' are supported, since other "
            "backends show no attention to choose tokens by. Leave it out for 'sdpa'."
        )
