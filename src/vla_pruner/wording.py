"""Words that messages and tables of several subcommands share."""

from __future__ import annotations

import re

# Control characters of both blocks, those that break lines or turn their direction around, and halves of surrogate
# pairs.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 episode", "2 episodes"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def span(noun: str, first: int, number: int) -> str:
    """Return the name of numbered things in a row: "state 3", "states 0 to 9"."""
    return f"{noun} {first}" if number == 1 else f"{noun}s {first} to {first + number - 1}"


def ordinal(number: int) -> str:
    """Return the number of one in a row: "2nd", "8th", "11th"."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def a_type(value: object) -> str:
    """Return the name of a value's type with its article: "a str", "an int"."""
    name = type(value).__name__
    return f"an {name}" if name[:1] in "AEIOaeio" else f"a {name}"


def install(extra: str, *more: str) -> str:
    """Return the command that installs the packages of an extra of this package.

    pip finds the package installed, asks no index for it, and adds the missing packages of the extra; also in a
    checkout.

    Args:
        extra: its name in pyproject.toml.
        more: further arguments of pip.
    """
    return " && ".join(f"pip install {one}" for one in (f"'vla-pruner[{extra}]'", *more))


def readable(text: str) -> str:
    """Return text from outside without characters that steer a terminal or cannot be encoded: control characters other
    than line breaks and tabs, those that turn the direction of writing around, and lone surrogates are written as
    escapes.
    """
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in "\n\t" else _escaped(found), text)


def one_line(text: str) -> str:
    """Return `readable` text with line breaks and tabs as escapes, too, so that it is one line of a log."""
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


def said_by(error: BaseException) -> str:
    """Return the message of a third-party exception, even if its own `str` raises."""
    try:
        return readable(str(error))
    except KeyboardInterrupt:
        raise
    except BaseException as second:  # whatever it is, the first error is the one to report
        return f"its message cannot be read, since str() of it raises {type(second).__name__}"
