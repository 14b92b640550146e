"""The reference policy in Meta-World, through the command line: the wiring, not the success."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vla_pruner import cli
from vla_pruner.evaluation import read_records
from vla_pruner.evaluation.records import EPISODES
from vla_pruner.models.chunk import ChunkPolicy, save_chunk_policy
from vla_pruner.policies.random import draw_weights, random_policy
from vla_pruner.simulators import metaworld

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module", autouse=True)
def _simulator() -> None:
    try:
        metaworld.MetaWorldEnv("push", 32).close()
    except metaworld.SimulatorUnavailable as error:
        pytest.skip(str(error))


def test_the_reference_policy_runs_a_smoke_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "eval --policy reference:autoregressive --suite metaworld:mt4 --preset smoke --max-steps 20 --out"
    assert cli.main([*flags.split(), str(tmp_path)]) == 0
    records = {record.arm: record for record in read_records(tmp_path / EPISODES)}
    assert len(records) == 5
    pruned = records["vla-pruner-0.25-freeze-K3-semantic_querieslast"]
    assert (pruned.visual_tokens, pruned.kept_tokens, pruned.pruned_steps, pruned.steps) == (196, [49, 49], 2, 20)
    assert pruned.control_steps == 5
    assert set(pruned.versions) >= {"torch", "transformers", "metaworld", "mujoco", "renderer"}
    first, again = records["unpruned"], records["unpruned-again"]
    assert (first.steps, first.success) == (again.steps, again.success)
    info = json.loads((tmp_path / "eval_info.json").read_text())
    assert info["per_task"][0]["task_group"] == "metaworld:mt4"
    assert "Not for claims" in capsys.readouterr().out
    assert (tmp_path / "table.md").is_file()


def test_the_two_camera_policy_is_evaluated_and_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny: Any = random_policy("reference-chunk")
    policy = ChunkPolicy(replace(tiny.config, image_size=128)).eval()
    draw_weights(policy, seed=0)
    save_chunk_policy(policy, tmp_path / "weights")
    out = tmp_path / "run"
    flags = "--suite metaworld:mt4 --preset smoke --max-steps 24 --layer 2 --pruned freeze --trace 1 --out"
    assert cli.main(["eval", "--policy", str(tmp_path / "weights"), *flags.split(), str(out)]) == 0
    records = {record.arm: record for record in read_records(out / EPISODES)}
    pruned = records["vla-pruner-0.25-freeze-K2-semantic_querieslast"]
    assert (pruned.visual_tokens, pruned.kept_tokens) == (512, [128, 128])
    assert (pruned.steps, pruned.control_steps, pruned.pruned_steps) == (24, 6, 3)
    first, again = records["unpruned"], records["unpruned-again"]
    assert (first.steps, first.success) == (again.steps, again.success)
    capsys.readouterr()
    asked = f"calibrate --policy {tmp_path / 'weights'} --from {out} --method fastv --keep .5 --max-steps 2 --json -"
    assert cli.main(asked.split()) == 0
    moved = {arm["key"]: arm["moved"]["value"] for arm in json.loads(capsys.readouterr().out)["arms"]}
    assert moved["unpruned-again"] == 0.0
    assert moved["fastv-0.5-drop-K3"] > 0.0


def test_the_expert_succeeds_where_nothing_fails(tmp_path: Path) -> None:
    for policy, solved in (("expert", True), ("nothing", False)):
        flags = f"eval --policy {policy} --suite metaworld:mt6 --tasks push,drawer-open --episodes 1 --controls none"
        assert cli.main([*flags.split(), "--out", str(tmp_path / policy)]) == 0
        records = read_records(tmp_path / policy / EPISODES)
        assert [record.success for record in records] == [solved, solved]
