"""The fate of the other tokens is one type; options and records spell it as words."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vla_pruner as vp
from vla_pruner.fate import WITHIN_A_STEP, Fate

PACKAGE = Path(vp.__file__).parent
WORDS = {str(fate) for fate in Fate}


def compared(source: str) -> Iterator[int]:
    """Lines in which something is compared with a fate's word, or looked for among such words."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                if any(isinstance(part, ast.Constant) and part.value in WORDS for part in ast.walk(side)):
                    yield node.lineno


def test_words_are_compared_in_one_place_alone():
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line in compared(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_a_comparison_is_found_wherever_the_word_stands():
    source = "a.pruned == 'drop'\nb = x in ('freeze', 'reuse')\nc = 'drop'\nd(pruned='freeze')\n"
    assert list(compared(source)) == [1, 2]


def test_every_method_takes_the_word_and_shows_it():
    for fate in WITHIN_A_STEP:
        for given in (fate, str(fate)):
            method = vp.FastV(keep=0.5, pruned=given)
            assert type(method.pruned) is str
            assert method.fate is fate
            assert method == vp.FastV(keep=0.5, pruned=str(fate))
            assert f"pruned='{fate}'" in repr(method)
    assert vp.VLACache().fate is Fate.REUSE


def test_what_code_asks():
    asked = {fate: (fate.readable, fate.projects, fate.needs_last_step, fate.gerund) for fate in Fate}
    assert asked == {
        Fate.DROP: (False, False, False, "dropping"),
        Fate.FREEZE: (True, True, False, "freezing"),
        Fate.REUSE: (True, False, True, "reusing"),
    }


def test_another_word_is_refused():
    with pytest.raises(
        vp.OptionError, match=r"pruned='burn' was given; what becomes of tokens is one of 'drop', 'freeze', 'reuse'"
    ):
        Fate.of("burn")
