"""Words that messages and tables of several subcommands share."""

from __future__ import annotations


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
