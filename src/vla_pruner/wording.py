"""Words that messages and tables of several subcommands share."""

from __future__ import annotations

import unicodedata


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 episode", "2 episodes"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def install(extra: str, *more: str) -> str:
    """The command that installs an extra of this package, which is on no package index.

    Args:
        extra: its name in pyproject.toml.
        more: what to install besides, as arguments of pip.
    """
    commands = " && ".join([f"pip install -e '.[{extra}]'", *(f"pip install {one}" for one in more)])
    return f"{commands}  (in the folder of the repository)"


def readable(text: str) -> str:
    """Text from outside without what would steer a terminal or cannot be encoded: control characters other than line
    breaks and tabs, and lone surrogates, are written as escapes.
    """
    return "".join(_escaped(one) if unicodedata.category(one) in ("Cc", "Cs") else one for one in text)


def _escaped(character: str) -> str:
    return character if character in "\n\t" else character.encode("unicode_escape").decode()


def said_by(error: BaseException) -> str:
    """What an exception of somebody else's says, even if its own `str` raises."""
    try:
        return readable(str(error))
    except KeyboardInterrupt:
        raise
    except BaseException as second:  # whatever it is, the first error is the one to tell of
        return f"its message cannot be read, since str() of it raises {type(second).__name__}"
