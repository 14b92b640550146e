"""Words that several subcommands share: commands that install, text from outside, and what errors say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from vla_pruner.wording import a_type, install, one_line, ordinal, readable, said_by, span

ROOT = Path(__file__).parents[1]


def test_what_an_extra_brings_is_installed_by_its_name() -> None:
    assert install("eval") == "pip install 'vla-pruner[eval]'"
    assert install("eval", "--no-deps x") == "pip install 'vla-pruner[eval]' && pip install --no-deps x"


def test_every_extra_that_a_message_or_a_page_names_is_there() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    assert "pip install -e" not in code
    named = set(re.findall(r"install\(\"([\w-]+)\"", code)) | set(re.findall(r"install\('([\w-]+)'", code))
    assert len(named) >= 6
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert "pip install -e" not in text, path.name
        for extras in re.findall(r"(?:'\.|vla-pruner)\[([\w,-]+)\]", text):
            named.update(extras.split(","))
    assert named <= set(declared)


def test_text_from_outside_cannot_steer_a_terminal_or_break_an_encoder() -> None:
    assert readable("plain, größer, 机器人, [bold]") == "plain, größer, 机器人, [bold]"
    assert readable("a\nb\tc") == "a\nb\tc"
    assert readable("\x1b[2J\x07\x00\x9b") == r"\x1b[2J\x07\x00\x9b"
    assert readable("bad \udc80 byte").encode() == rb"bad \udc80 byte"
    assert readable("user\u202eecorp\u2066.\u2028") == r"user\u202eecorp\u2066.\u2028"
    assert one_line("a\x1b[2J\r\nb\u202e\u2028\ud800é") == r"a\x1b[2J\r\nb\u202e\u2028\ud800é"


class _Mute(Exception):
    def __init__(self, raises: type[BaseException]) -> None:
        self._raises = raises

    def __str__(self) -> str:
        raise self._raises


def test_an_error_is_told_of_even_if_its_str_raises() -> None:
    assert said_by(ValueError("no\x1b")) == r"no\x1b"
    for raises in (RuntimeError, SystemExit, GeneratorExit):
        assert said_by(_Mute(raises)) == f"its message cannot be read, since str() of it raises {raises.__name__}"
    with pytest.raises(KeyboardInterrupt):
        said_by(_Mute(KeyboardInterrupt))


@pytest.mark.parametrize(("value", "said"), [(7, "an int"), ("x", "a str"), ([], "a list"), (OSError(), "an OSError")])
def test_types_have_their_article(value: object, said: str) -> None:
    assert a_type(value) == said


def test_one_of_a_span_is_no_span() -> None:
    assert span("initial state", 3, 1) == "initial state 3"
    assert span("initial state", 0, 10) == "initial states 0 to 9"


def test_ordinals_end_as_they_are_spoken() -> None:
    said = ["1st", "2nd", "3rd", "4th", "8th", "11th", "12th", "13th", "21st", "22nd", "111th"]
    assert [ordinal(number) for number in (1, 2, 3, 4, 8, 11, 12, 13, 21, 22, 111)] == said
