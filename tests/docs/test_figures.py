"""Figures of the documentation are those of committed files, and each page agrees with the page that it quotes."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

import vla_pruner as vp
from tests.docs.pages import ROOT, page
from vla_pruner.evaluation.verdict import points

RESULTS = ROOT / "benchmarks" / "results"


def test_counted_flops_are_those_of_the_committed_file() -> None:
    text = page("models.md")
    assert (RESULTS / "family_flops.md").read_text(encoding="utf-8").strip() in text
    from benchmarks.family_flops import FAMILIES, result, table

    counted = json.loads((RESULTS / "family_flops.json").read_text(encoding="utf-8"))["families"]
    assert counted == {name: result(family) for name, family in FAMILIES.items()}
    assert table(counted) in text


def test_counted_flops_of_the_encoder_are_those_of_the_committed_file() -> None:
    from benchmarks.encoder_flops import NAMES, result, table
    from benchmarks.family_flops import FAMILIES

    counted = json.loads((RESULTS / "encoder_flops.json").read_text(encoding="utf-8"))["families"]
    assert counted == {name: result(FAMILIES[name].step) for name in NAMES}
    assert table(counted) in page("methods.md")
    assert table(counted) == (RESULTS / "encoder_flops.md").read_text(encoding="utf-8").strip()


@pytest.mark.parametrize(
    ("name", "families"),
    [("start-openvla-oft.md", ["OpenVLA-OFT"]), ("start-lerobot.md", ["pi0", "pi0.5", "SmolVLA"])],
)
def test_what_to_expect_is_what_was_counted(name: str, families: list[str]) -> None:
    counted = (RESULTS / "family_flops.md").read_text(encoding="utf-8").splitlines()
    rows = {line.split("|")[1].strip(): line for line in counted}
    expected = " ".join(page(name).split("## What to expect")[1].split())
    for family in families:
        left = rows[family].split("|")[3].split("/")[1].strip()
        assert left in expected, (family, left)


def test_the_demo_page_has_the_committed_run() -> None:
    run = RESULTS / "demo"
    if not (run / "results.json").is_file():
        pytest.skip("no demo run is committed")
    text = page("demo.md")
    assert (run / "table.md").read_text(encoding="utf-8").strip() in text
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert not results["interrupted"]
    assert not results["machine_was_busy"]
    assert results["conditions"]["processor"] in text
    assert f"{results['paired_episodes']} paired episodes" in text
    before, after = results["compiled"]["unpruned_ms"]
    assert f"{before:.1f} ms uncompiled and {after:.1f} compiled" in text
    if before < after:  # the table's speeds are then not against the faster baseline, which both pages have to say
        recommended = next(arm for arm in results["arms"] if arm["arm"] == "recommended")
        pace = recommended["milliseconds_pruned_steps"]["p50"]
        assert f"the compiled, recommended step is about {before / pace:.1f}x as fast" in " ".join(text.split())
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        assert f"(uncompiled, its step took {before:.1f} ms)" in readme
    for arm in results["arms"]:
        assert arm["title"] in text
        assert f"{arm['success']['successes']}/{arm['success']['total']}" in text


def test_every_option_of_the_method_is_in_the_table() -> None:
    table = page("how-it-works.md").split("## Options of `VLAPruner`")[1].split("##")[0]
    for field in dataclasses.fields(vp.VLAPruner):
        assert f"`{field.name}`" in table


def test_advice_is_the_study_s() -> None:
    study = page("study.md")
    confirmed = [
        line.split("|")[1:-1]
        for line in page("choosing.md").splitlines()
        if re.match(r"\| `\w+` [\d.]+ (drop|f)", line)
    ]
    assert len(confirmed) == 4
    for arm, difference, verdict in confirmed:
        method, keep, fate = arm.strip().replace("`", "").split()
        key = {"VLAPruner": "vla-pruner", "ActionOnly": "action-only"}[method]
        (row,) = [line for line in study.splitlines() if line.startswith(f"| {key} {keep} {fate} K=3")]
        assert [cell.strip() for cell in row.split("|")[3:-1]] == [difference.strip(), verdict.strip()]
    told = " ".join(study.split())
    for name, sentence in (
        ("choosing.md", r"correlation of (\.\d+) with the loss of success, and of (\.\d+) within one keep and fate"),
        ("how-it-works.md", r"keep (16\.6) points more success .* \((11\.3 to 21\.6)"),
    ):
        found = re.search(sentence, " ".join(page(name).split()))
        assert found is not None, name
        for figure in found.groups():
            assert figure in told


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(page(f"api/{name}.md") for name in ("attaching", "methods", "policies", "measuring", "errors"))
    errors = {name for name in vp.__all__ if name.endswith("Error")}
    assert "::: vla_pruner.errors" in text
    for name in set(vp.__all__) - errors:
        assert re.search(rf"^::: vla_pruner\.[\w.]+\.{name}$", text, re.MULTILINE), name


@pytest.mark.parametrize("phase", ["chunk-confirm", "libero-confirm"])
def test_what_is_confirmed_is_in_the_committed_tables(phase: str) -> None:
    study, choosing = (page(name) for name in ("study.md", "choosing.md"))
    found = json.loads((RESULTS / "study" / phase / "summary.json").read_text(encoding="utf-8"))["summary"]
    baseline, *methods = [arm for arm in found["arms"] if arm["kind"] in ("baseline", "method")]
    assert f"| unpruned | {baseline['success']['successes']}/{baseline['success']['total']} | | |" in study
    assert found["margin"] == 0.05
    assert methods
    for arm in methods:
        solved, difference = arm["success"], arm["difference"]
        value, low, high = (points(difference[name]) for name in ("value", "low", "high"))
        told = f"{value} ({low} to {high})"
        assert f"| {solved['successes']}/{solved['total']} | {told} | {arm['verdict']['word']} |" in study, arm["title"]
        assert f"| {told}, {arm['verdict']['word']} |" in choosing, arm["title"]


@pytest.mark.parametrize(
    ("phase", "named"), [("chunk-confirm", ["coffee-push"]), ("libero-confirm", ["butter", "orange_juice"])]
)
def test_where_the_gain_lies_is_counted(phase: str, named: list[str]) -> None:
    found = json.loads((RESULTS / "study" / phase / "summary.json").read_text(encoding="utf-8"))["summary"]
    unpruned, pruned = (arm["by_task"] for arm in found["arms"][:2])
    study = " ".join(page("study.md").split())
    told = re.search(r"What is gained is gained in one task of each: .*?\. -", study)
    assert told is not None
    of = [next(task for task in unpruned if name in task) for name in named]
    for task in of:
        assert f"from {unpruned[task][0]} to {pruned[task][0]}" in told.group()
    rest = [task for task in unpruned if task not in of]
    before, after = (sum(by[task][0] for task in rest) for by in (unpruned, pruned))
    assert f"others from {before} to {after} of {sum(unpruned[task][1] for task in rest)}" in told.group()


def test_the_compiled_step_is_compared_with_the_faster_baseline() -> None:
    told = " ".join(page("study.md").split())
    ratios = []
    for name in ("metaworld", "libero-object"):
        folder = RESULTS / "bench" / f"{name}-cpu-2-threads"
        eager, compiled = (
            {row.split("|")[2].strip(): float(row.split("|")[4]) for row in file.read_text().splitlines()[2:]}
            for file in (folder / "bench.md", folder.with_name(f"{folder.name}-compiled") / "bench.md")
        )
        assert f"{eager['unpruned']:.1f} and {compiled['unpruned']:.1f}" in told
        frozen = compiled["vla-pruner 0.25 freeze K=2 semantic_queries=last"]
        ratios.append(f"{min(eager['unpruned'], compiled['unpruned']) / frozen:.2f}x")
    assert f"the compiled step at .25 is {' and '.join(ratios)} as fast" in told
