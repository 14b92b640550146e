"""docs/architecture.md names every part of the package, imports point down, and the parts that claim to need no
transformers need none.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "vla_pruner"

FLOORS = (
    (
        "accelerators", "anatomy", "bootstrap", "caches", "checks", "conditions", "cost", "errors", "fate", "feed",
        "flags", "installation", "json_file", "markdown", "observations", "outputs", "plugins", "registry",
        "replacements", "statistics", "strangers", "terminal", "timing", "versions", "wording",
    ),
    ("checkpoints", "client", "methods", "preprocessing"),
    ("attach", "method_names", "models", "simulators"),
    ("families",),
    ("front", "policies"),
    ("auditing", "benching", "calibration", "demo", "evaluation", "official", "report", "serving"),
    ("cli",),
    ("__main__",),
)  # fmt: skip
"""Folders and modules of the package, the lowest floor first. A part imports what lies below it, and on its own floor
what does not import it in turn. `vla_pruner` itself is on no floor: it hands out names, each imported when it is asked
for. What `registry` names as "module:name" is found when it is used.
"""


def imports(path: Path) -> Iterator[str]:
    """Every module of the package that a file imports, at its top, in a function, or for its types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import, which this test does not read"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] == PACKAGE.name)


def edges() -> set[tuple[str, str, str]]:
    """File, its part of the package, and another part that it imports."""
    floor = {part for parts in FLOORS for part in parts}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE)
        part = inside.parts[0].removesuffix(".py")
        for name in imports(path):
            other = (*name.split("."), "")[1]
            if part != "__init__" and other in floor and other != part:
                found.add((inside.as_posix(), part, other))
    return found


def test_every_part_of_the_package_is_on_a_floor() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    floors = [part for floor in FLOORS for part in floor]
    assert sorted(floors) == sorted(parts - {"__init__", "__pycache__"})


def test_imports_point_down() -> None:
    floor = {part: number for number, parts in enumerate(FLOORS) for part in parts}
    upward = {(file, other) for file, part, other in edges() if floor[other] > floor[part]}
    assert upward == set(), "these import against the floors of the house"


def test_no_parts_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for _, part, other in edges():
        graph.setdefault(part, set()).add(other)
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"the parts {' <- '.join(error.args[1])} import each other")


def test_an_import_is_seen_wherever_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "one.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport vla_pruner.a\nif TYPE_CHECKING:\n    from vla_pruner.b import x\n"
        "def late():\n    from vla_pruner import c\n    import_module('vla_pruner.d')\n    import torch\n"
    )
    assert {name.split(".")[1] for name in imports(file)} == {"a", "b", "c", "d"}


def test_every_part_of_the_package_is_in_the_picture() -> None:
    picture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    parts = {path.stem for path in (ROOT / "src" / "vla_pruner").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert parts - {"__init__", "__pycache__"} - set(re.findall(r"\w+", picture)) == set()


@pytest.mark.parametrize("folder", ["methods", "preprocessing"])
def test_what_make_test_oldest_leaves_out_knows_nothing_of_transformers(folder: str) -> None:
    models = re.compile(r"\b(transformers|families|policies)\b|\.attach\(")
    tests = (ROOT / "tests" / folder).glob("*.py")
    assert [path.name for path in tests if models.search(path.read_text(encoding="utf-8"))] == []


def test_what_may_be_traced_imports_no_lazy_module() -> None:
    """Up to torch 2.11 a compiler refuses `from transformers import ...` in a function, since the package is lazy."""
    files = [PACKAGE / "caches.py", *(PACKAGE / "attach").glob("*.py"), *(PACKAGE / "methods").glob("*.py")]
    assert len(files) > 30
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.module == "transformers"), f"{path}:{node.lineno}"
