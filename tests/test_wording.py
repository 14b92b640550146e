"""Words that several subcommands share: commands that install, text from outside, and what errors say."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vla_pruner import wording
from vla_pruner.wording import a_type, install, one_line, readable, said_by, span

ROOT = Path(__file__).parents[1]


def test_a_checkout_is_installed_from_its_folder() -> None:
    assert install("eval") == f"pip install -e '.[eval]'  (in {ROOT})"
    assert install("eval", "--no-deps x") == f"pip install -e '.[eval]' && pip install --no-deps x  (in {ROOT})"


def test_outside_of_a_checkout_the_packages_of_the_extra_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.8", 'scipy>=1.11; extra == "eval"', 'av[x]<20,>=14; extra == "dataset"']
    lines.append('lerobot<0.7; (python_version >= "3.11") and extra == "eval"')
    lines.append('never; (python_version < "3") and extra == "eval"')
    monkeypatch.setattr(metadata, "requires", lambda _: lines)
    monkeypatch.setattr(wording, "checkout", lambda: None)
    assert install("eval") == "pip install 'scipy>=1.11' 'lerobot<0.7'"
    assert install("dataset", "--no-deps y") == "pip install 'av[x]<20,>=14' && pip install --no-deps y"


def test_a_package_in_site_packages_is_no_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert wording.checkout() == ROOT
    monkeypatch.setattr(wording, "__file__", str(tmp_path / "site-packages" / "vla_pruner" / "wording.py"))
    assert wording.checkout() is None


@pytest.mark.parametrize("extra", ["metaworld", "eval", "ray", "serve", "dataset", "libero", "libero-images"])
def test_every_extra_that_a_message_names_is_there(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    monkeypatch.setattr(wording, "checkout", lambda: None)
    monkeypatch.setattr(metadata, "requires", lambda _: [f'{one}; extra == "{extra}"' for one in declared[extra]])
    command = install(extra)
    assert command.startswith("pip install ")
    assert all(Requirement(one).name in command for one in declared[extra])


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
