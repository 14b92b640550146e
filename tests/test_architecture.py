"""docs/architecture.md names every part of the package, and what is said to need no transformers needs none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_part_of_the_package_is_in_the_picture() -> None:
    picture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    parts = {path.stem for path in (ROOT / "src" / "vla_pruner").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert parts - {"__init__", "__pycache__"} - set(re.findall(r"\w+", picture)) == set()


@pytest.mark.parametrize("folder", ["methods", "preprocessing"])
def test_what_make_test_oldest_leaves_out_knows_nothing_of_transformers(folder: str) -> None:
    models = re.compile(r"\b(transformers|families|policies)\b|\.attach\(")
    tests = (ROOT / "tests" / folder).glob("*.py")
    assert [path.name for path in tests if models.search(path.read_text(encoding="utf-8"))] == []
