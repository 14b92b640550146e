"""The pages of the documentation, their code, and their commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from vla_pruner import cli

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def page(name: str) -> str:
    """The text of a page, by its path in docs/."""
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(text: str, language: str = "python") -> list[str]:
    """The fenced blocks of a language, in order; "" is for commands."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for named, block in fences if named == language]


class _Parsed(Exception):
    pass


def understood(line: str) -> None:
    """Parse a command without running it.

    Args:
        line: such as "vla-pruner audit reference"; the text after two spaces and a # is a comment.
    """

    def stop(*_: Any) -> Any:
        raise _Parsed

    words = shlex.split(line.split("  #")[0].removeprefix("PYTHONPATH=. "))[1:]
    with (
        mock.patch.object(cli, "_no_loading_bars", stop),
        mock.patch.object(cli, "_env", stop),
        pytest.raises(_Parsed),
    ):
        cli.main(words)
