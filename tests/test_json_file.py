"""JSON that people edit: every value is of its type, or one sentence says which is not."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vla_pruner.errors import OptionError
from vla_pruner.json_file import check_file, field_of, load_json, replace_file, typed


@dataclass(frozen=True)
class Inner:
    name: str
    size: int


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...]
    pair: tuple[int, int] | None
    rates: list[float]
    words: Mapping[str, str | None]
    anything: Any
    done: bool | None = None


WHOLE: dict[str, Any] = {
    "inner": [{"name": "a", "size": 1}],
    "pair": [1, 2],
    "rates": [0.5, 1],
    "words": {"x": None, "y": "z"},
    "anything": [None, {}],
    "done": None,
}


def test_plain_values_become_what_the_type_says() -> None:
    found = typed(Outer, WHOLE, "it")
    assert found == Outer((Inner("a", 1),), (1, 2), [0.5, 1.0], {"x": None, "y": "z"}, [None, {}], None)
    assert [type(rate) for rate in found.rates] == [float, float]


def test_fields_of_other_versions_are_passed_over() -> None:
    @dataclass(frozen=True)
    class Newer:
        name: str
        size: int = 7

    assert typed(Newer, {"name": "a", "colour": "blue"}, "it") == Newer("a")
    assert typed(Outer, {**WHOLE, "later": 1}, "it") == typed(Outer, WHOLE, "it")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"inner": {}}, "inner is {}, not a list"),
        ({"inner": [1]}, r"inner\[0\] is 1, not an object"),
        ({"inner": [{"name": "a"}]}, r"the fields size of inner\[0\] are missing"),
        ({"inner": [{"name": 1, "size": 1}]}, "name is 1, not text"),
        ({"inner": [{"name": "\ud800", "size": 1}]}, "name is '.ud800', which is no text: it holds a lone surrogate"),
        ({"inner": [{"name": "a", "size": True}]}, "size is True, not a whole number"),
        ({"inner": [{"name": "a", "size": 1.0}]}, "size is 1.0, not a whole number"),
        ({"inner": [{"name": "a", "size": 2**63}]}, "size is too large"),
        ({"pair": [1]}, "pair has 1 values, not 2"),
        ({"pair": [1, "2"]}, r"pair\[1\] is '2', not a whole number"),
        ({"rates": [float("nan")]}, r"rates\[0\] is nan, not a finite number"),
        ({"rates": [10**400]}, r"rates\[0\] is inf, not a finite number"),
        ({"rates": [False]}, r"rates\[0\] is False, not a finite number"),
        ({"rates": None}, "rates is None, not a list"),
        ({"words": []}, r"words is \[\], not an object"),
        ({"words": {"x": 1}}, "words.x is 1, not text"),
        ({"words": {"\udc00": None}}, "a name in words is '.udc00', which is no text"),
        ({"done": 0}, "done is 0, not true or false"),
    ],
)
def test_what_is_of_another_type_is_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=rf"^{told}"):
        typed(Outer, {**WHOLE, **changes}, "it")


def test_what_is_long_is_shortened() -> None:
    with pytest.raises(ValueError) as error:
        typed(Outer, {**WHOLE, "pair": "x" * 100_000}, "it")
    assert len(str(error.value)) < 200


def test_a_field_of_an_object_that_may_hold_others() -> None:
    assert field_of({"a": 1, "b": "x"}, "a", float) == 1.0
    with pytest.raises(ValueError, match="a is missing"):
        field_of({}, "a", int)
    for content in (None, [], "a", 5):
        with pytest.raises(ValueError, match=r"the file is .*, not an object"):
            field_of(content, "a", int, "the file")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": NaN}', "[Infinity, 1]", "-Infinity", "", "{", b"\xff\xfe\x00", "1" * 5000]
)
def test_json_that_is_none_has_one_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        load_json(text)
    assert load_json(b'{"a": [1e3, null]}') == {"a": [1000.0, None]}


@pytest.mark.parametrize("full", ["write", "sync"])
def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    there = tmp_path / "results.json"
    there.write_bytes(b"hours of work")

    def no_space(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        if full == "sync":
            patched.setattr(os, "fsync", no_space)
        else:
            patched.setattr(Path, "open", no_space)
        with pytest.raises(OSError, match="No space left"):
            replace_file(there, b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("results.json", b"hours of work")]
    replace_file(there, b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("results.json", b"new")]


def test_a_file_is_replaced_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o600)
    link.symlink_to(real)
    replace_file(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    replace_file(Path("/dev/null"), b"new")
    assert Path("/dev/null").is_char_device()
    opened = Path.open

    def refused(path: Path, *mode: Any, **options: Any) -> Any:
        if path.suffix == ".new":
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *mode, **options)

    monkeypatch.setattr(Path, "open", refused)
    replace_file(real, b"in a folder that takes no other files")
    assert real.read_bytes() == b"in a folder that takes no other files"
    with pytest.raises(PermissionError):
        replace_file(tmp_path / "absent", b"new")


def test_links_that_go_round_are_refused_in_a_sentence(tmp_path: Path) -> None:
    round_link = tmp_path / "round"
    round_link.symlink_to(round_link)
    with pytest.raises(OptionError, match="which cannot be written"):
        check_file(str(round_link))
