"""attach/README.md lists the files that one drop goes through, and the tests hold the code to the list."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import torch

import vla_pruner as vp
from tests.attach.tiny import VISUAL, K, prompt, tiny_lm

PACKAGE = Path(vp.__file__).parent
README = (PACKAGE / "attach" / "README.md").read_text(encoding="utf-8")
STATIONS = re.findall(r"^\d+\. `([\w/]+\.py)`: .*?\(`([\w.]+)`\)?", README, re.MULTILINE)
PATH = re.findall(r"^\d+\. `([\w/]+\.py)`", README, re.MULTILINE)

BESIDE = {
    "attach/arithmetic.py",  # a decorator: float32 whatever runs around it
    "attach/layout.py",  # the family's description of the prompt
    "attach/stages.py",  # how many tokens stay
    "caches.py",  # how wide a static cache is
    "methods/base.py",  # Evidence
    "methods/memory.py",
    "fate.py",
    "methods/scores.py",
    "methods/selection.py",
}
"""Files that are called on the way and need not be read to follow it."""


def files_run(at: int) -> tuple[set[str], set[str]]:
    """The package's files that run in a pruned prompt, and those that run before its layer `at` alone."""
    model, seen, before = tiny_lm(), set(), set()
    hooked = model.model.layers[at]
    inside: list[Any] = []

    def watch(frame: Any, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            name = path.relative_to(PACKAGE).as_posix()
            seen.add(name)
            if frame.f_code.co_name == "_enter_layer" and frame.f_locals.get("module") is hooked:
                inside.append(frame)
            if inside:
                before.add(name)
        elif event == "return" and inside and frame is inside[-1]:
            inside.clear()

    with (
        vp.VLAPruner(keep=0.25, layer=at, warmup="semantic", preset="paper").attach(model, visual=VISUAL) as session,
        torch.no_grad(),
    ):
        sys.setprofile(watch)
        try:
            model(inputs_embeds=prompt()[0])
        finally:
            sys.setprofile(None)
        assert session.kept is not None
    return seen, before


def test_one_drop_goes_through_at_most_seven_files():
    assert 1 <= len(PATH) == len(set(PATH)) <= 7
    seen, before = files_run(K)
    assert set(PATH) <= seen, "a file that is listed has no part in a drop"
    assert before - set(PATH) == BESIDE, "a drop goes through a file that is not listed, or one less"
    assert len(before & set(PATH)) >= 6


def test_what_is_named_in_these_files_is_there():
    assert len(STATIONS) == len(PATH) - 1  # of the family there is nothing to name
    for path, name in STATIONS:
        tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert set(name.split(".")) <= defined, (path, name)


def test_files_and_names_of_the_package_that_it_mentions_are_there():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    for owner, name in re.findall(r"`([A-Z]\w+)\.(\w+)`", README):
        assert re.search(rf"class {owner}\b", sources), owner
        assert re.search(rf"(def {name}\b|^    {name}:|self\.{name}\b)", sources, re.MULTILINE), (owner, name)
