"""docs/performance.md: its commands and its Python are those of the program, and its figures are committed ones."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import vla_pruner as vp
from vla_pruner.benching.command import add_bench, settings_of
from vla_pruner.benching.settings import NAMED, BenchSettings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^vla-pruner (bench .*)$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line: str) -> None:
    parser = argparse.ArgumentParser()
    add_bench(parser.add_subparsers())
    options = parser.parse_args(shlex.split(line))
    assert settings_of(options).iters == 30


def test_there_are_commands_and_every_model_is_named() -> None:
    assert len(COMMANDS) >= 5
    assert f"`--model` is {', '.join(NAMED)}" in " ".join(TEXT.split())


def test_the_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def bench(model: Any, **options: Any) -> dict[str, Any]:
        loaded = not isinstance(model, str)
        settings = BenchSettings(type(model).__name__ if loaded else model, loaded=loaded, **options)
        from vla_pruner.benching.arms import arms_of

        given.update({arm.name: argparse.Namespace(speed=None) for arm in arms_of(settings)})
        return given

    monkeypatch.setattr(vp, "bench", bench, raising=False)
    block = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert block is not None
    exec(block[1], {})
    ours = {f"vla-pruner 0.25 {fate} K=3 semantic_queries=last" for fate in ("drop", "freeze")}
    assert set(given) == {"unpruned", *ours, "fastv 64 drop K=3"}


def test_rows_in_the_document_are_committed_results() -> None:
    rows = [
        line for line in TEXT.splitlines() if re.match(r"\| (llama:|openvla|pi0|pi05|smolvla|lerobot-|reference)", line)
    ]
    results = ROOT / "benchmarks" / "results"
    files = sorted(
        [*results.glob("bench/**/bench.md"), *results.glob("batch/**/batch.md"), results / "frozen_products.md"]
    )
    committed = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()[2:]]
    assert rows == [row for row in rows if row in committed]
    assert ("Not measured yet." in TEXT) == (not committed)
    assert set(committed) <= set(rows)
