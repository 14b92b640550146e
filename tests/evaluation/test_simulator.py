"""The reference policy in Meta-World, through the command line: the wiring, not the success."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vla_pruner import cli
from vla_pruner.evaluation import read_records
from vla_pruner.evaluation.records import EPISODES
from vla_pruner.simulators import metaworld

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module", autouse=True)
def _simulator() -> None:
    try:
        metaworld.MetaWorldEnv("push", 32).close()
    except metaworld.SimulatorUnavailable as error:
        pytest.skip(str(error))


def test_the_reference_policy_runs_a_smoke_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "eval --policy reference:autoregressive --suite metaworld:mt4 --preset smoke --max-steps 5 --out"
    assert cli.main([*flags.split(), str(tmp_path)]) == 0
    records = {record.arm: record for record in read_records(tmp_path / EPISODES)}
    assert len(records) == 5
    pruned = records["vla-pruner-0.25-drop-K3"]
    assert (pruned.visual_tokens, pruned.kept_tokens, pruned.pruned_steps, pruned.steps) == (196, [49, 49], 2, 5)
    assert set(pruned.versions) >= {"torch", "transformers", "metaworld", "mujoco", "renderer"}
    first, again = records["unpruned"], records["unpruned-again"]
    assert (first.steps, first.success) == (again.steps, again.success)
    info = json.loads((tmp_path / "eval_info.json").read_text())
    assert info["per_task"][0]["task_group"] == "metaworld:mt4"
    assert "Not for claims" in capsys.readouterr().out
    assert (tmp_path / "table.md").is_file()


def test_the_expert_succeeds_where_nothing_fails(tmp_path: Path) -> None:
    for policy, solved in (("expert", True), ("nothing", False)):
        flags = f"eval --policy {policy} --suite metaworld:mt6 --tasks push,drawer-open --episodes 1 --controls none"
        assert cli.main([*flags.split(), "--out", str(tmp_path / policy)]) == 0
        records = read_records(tmp_path / policy / EPISODES)
        assert [record.success for record in records] == [solved, solved]
