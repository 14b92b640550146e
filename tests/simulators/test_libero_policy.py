"""The policy that ships for LIBERO-Object, in LIBERO itself (`make test-libero`): the commands of docs/libero.md, with
episodes that end after a few control steps.
"""

from __future__ import annotations

import json
import re

import pytest

from vla_pruner import cli
from vla_pruner.evaluation import read_records
from vla_pruner.evaluation.recipes import RECIPES
from vla_pruner.evaluation.records import EPISODES
from vla_pruner.policies.reference import reference_policy
from vla_pruner.simulators import SimulatorUnavailable, find_suite
from vla_pruner.simulators.libero_names import MAX_STEPS

pytestmark = pytest.mark.sim

POLICY, SUITE = "reference:libero-object", "libero_object"
LOOKS = 5
"""Of which the method's warm-up leaves three unpruned; four actions are carried out after each."""
STEPS = 4 * LOOKS


@pytest.fixture(scope="module", autouse=True)
def _libero():
    try:
        find_suite(f"{SUITE}_swap")
    except SimulatorUnavailable as missing:
        pytest.skip(str(missing))


def evaluated(out, *flags):
    """Run an evaluation of one episode of the first task; return its records by suite and arm."""
    given = ["--policy", POLICY, "--tasks", "0", "--episodes", "1", "--max-steps", str(STEPS), "--out", str(out)]
    assert cli.main(["eval", *given, *flags]) == 0
    return {(record.unit.suite, record.arm): record for record in read_records(out / EPISODES)}


def test_the_demo_counts_its_tasks_as_the_suite_does():
    config = reference_policy(POLICY.removeprefix("reference:")).config
    assert [task for task, _ in config.tasks] == [task.name for task in find_suite(SUITE).tasks]


def test_one_command_compares_freezing_with_dropping(tmp_path, capsys):
    """All that it reports is there: every budget and layer, dropped and frozen, paired, and a verdict on each."""
    pytest.importorskip("statsmodels", reason="the extra eval is not installed: make test-libero")
    records = evaluated(tmp_path, "--suite", SUITE, "--recipe", "freeze-vs-drop")
    recipe = RECIPES["freeze-vs-drop"]
    arms = {
        f"vla-pruner-{keep}-{fate}-K{layer}-semantic_querieslast": round(512 * keep)
        for keep in recipe.keep
        for fate in recipe.pruned
        for layer in recipe.layer
    }
    assert len(arms) == 8
    assert set(records) == {(SUITE, arm) for arm in (*arms, "unpruned", "unpruned-again")}
    for arm, kept in arms.items():
        record = records[SUITE, arm]
        assert (record.visual_tokens, record.kept_tokens) == (512, [kept, kept]), arm
        assert (record.control_steps, record.pruned_steps, record.steps) == (LOOKS, LOOKS - 3, STEPS), arm
    said = " ".join(capsys.readouterr().out.split())
    for keep in recipe.keep:
        for layer in recipe.layer:
            dropped, frozen = (
                f"vla-pruner {keep} {fate} K={layer} semantic_queries=last" for fate in ("drop", "freeze")
            )
            assert f"- {dropped}: inconclusive, 0 points (" in said
            assert f"- {frozen} against the same dropped: 0 points (" in said
    assert "in 4 settings: freezing solves more in 0, dropping in 0, and no difference is shown in 4." in said
    assert "Noise floor: two runs of the unpruned policy agree in 1 of 1 episode" in said
    assert "The unpruned policy solved nothing, so nothing can be said about pruning it." in said
    assert "Not for claims" in said
    summary = json.loads((tmp_path / "eval_info.json").read_text())["summary"]
    assert {arm["verdict"]["word"] for arm in summary["arms"] if arm["kind"] == "method"} == {"inconclusive"}


def test_the_policy_runs_where_the_scene_is_new_and_says_where_it_cannot(tmp_path, capsys):
    suites = (f"{SUITE}_swap", f"{SUITE}:camera")
    flags = ("--method", "none", "--controls", "none")
    records = evaluated(tmp_path / "new", "--suite", ",".join(suites), *flags)
    assert [(suite, arm) for suite, arm in records] == [(suite, "unpruned") for suite in suites]
    swap, camera = records.values()
    assert "LIBERO-PRO" in swap.versions["perturbation"]
    assert "strength 1" in camera.versions["perturbation"]
    capsys.readouterr()
    out = tmp_path / "refused"
    for suite, message in (
        ([f"{SUITE}_lan"], "of 10 of 10 tasks, .* trained on libero_object_lan. Task 0: .* on: grab, put, into"),
        ([SUITE, "--suite-option", "image_size=224"], "224 x 224 pixels. The policy sees square images of 128 pixels"),
    ):
        assert cli.main(["eval", "--policy", POLICY, "--suite", *suite, *flags, "--out", str(out)]) == 2
        assert re.search(message, capsys.readouterr().err)
        assert not out.exists()


def test_the_demo_shows_the_policy_on_one_task(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MAX_STEPS, SUITE, STEPS)
    task = "pick_up_the_milk_and_place_it_in_the_basket"
    flags = ["--suite", SUITE, "--tasks", task, "--episodes", "1", "--out", str(tmp_path)]
    assert cli.main(["demo", *flags]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [episode["steps"] for episode in results["episodes"]] == [LOOKS] * 4
    assert [episode["pruned_steps"] for episode in results["episodes"]] == [0, LOOKS - 3, LOOKS - 3, LOOKS]
    assert results["conditions"]["suite"] == SUITE
    assert (tmp_path / "report.html").is_file()
    assert "recommended" in capsys.readouterr().out
