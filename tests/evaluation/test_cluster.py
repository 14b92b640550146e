"""Units on a local Ray cluster: the same records as in one process, also when workers die."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.evaluation.fakes import find_fake, settings
from tests.evaluation.test_run import facts, run
from vla_pruner.evaluation import EvaluationError, read_records, read_trace, traces_of
from vla_pruner.evaluation import cluster as clusters
from vla_pruner.evaluation.command import run_eval
from vla_pruner.evaluation.records import EPISODES
from vla_pruner.evaluation.run import begin, open_records, recipe_of

ray: Any = pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture(scope="module", autouse=True)
def _ended() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _cluster(_ended: None) -> None:
    if not ray.is_initialized():
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)


def unordered(folder: Path) -> list[str]:
    """The records without times and without their order, which on several workers is that of their ends."""
    return sorted(json.dumps(record, sort_keys=True, default=str) for record in facts(folder))


def test_two_workers_give_the_records_and_traces_of_one_process(tmp_path: Path) -> None:
    """One of three episodes is traced: the workers send its trace to the process that writes."""
    run(settings(tmp_path / "here", trace=1))
    code, said = run(settings(tmp_path / "there", trace=1, ray="local", workers=2))
    assert code == 0
    assert "6 episodes an arm, 2 tasks" in said
    assert unordered(tmp_path / "there") == unordered(tmp_path / "here")
    here, there = traces_of(tmp_path / "here"), traces_of(tmp_path / "there")
    assert len(here) == 6
    assert set(there) == set(here)
    for key, path in here.items():
        assert np.array_equal(read_trace(there[key]).actions, read_trace(path).actions)
    code, said = run(settings(tmp_path / "there", trace=1, ray="local", workers=1))
    assert "18 of 18 episodes are done" in said, "and what is done there is done here"
    assert run(settings(tmp_path / "there", trace=1, episodes=4))[0] == 0


def test_a_worker_that_is_killed_loses_and_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pause = {"pause": 0.05}
    run(settings(tmp_path / "here", episodes=6, suite_options=pause))
    asked = settings(tmp_path / "there", episodes=6, suite_options=pause)
    lost: list[Any] = []
    with (
        clusters.Cluster(recipe_of(asked, find_fake), "local", 2) as cluster,
        open_records(asked.out) as file,
    ):
        discard = cluster._discard
        monkeypatch.setattr(cluster, "_discard", lambda actor: (lost.append(actor), discard(actor)))
        pids = [ray.get(actor.__ray_call__.remote(lambda worker: os.getpid())) for actor in cluster.workers]
        begun = begin(asked, cluster.described, file)
        for count, _ in enumerate(cluster.run(begun, file, 0), 1):
            if count in (4, 13):  # while units are running on it or on the other
                os.kill(pids.pop(), signal.SIGKILL)
        assert begun.left() == []
        assert len(lost) == 2, "units were lost with each, and ran again on another"
    assert len(read_records(tmp_path / "there" / EPISODES)) == 36
    assert unordered(tmp_path / "there") == unordered(tmp_path / "here")


def test_a_worker_that_dies_in_its_own_step_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "died"
    run(settings(tmp_path / "here"))
    code, _ = run(settings(tmp_path / "there", "dying", options={"file": str(file)}, ray="local", workers=1))
    assert file.exists()
    assert code == 0
    strip = [{**json.loads(record), "run": ""} for record in unordered(tmp_path / "there")]
    assert strip == [{**json.loads(record), "run": ""} for record in unordered(tmp_path / "here")]


def test_a_unit_that_kills_every_worker_is_a_crash(tmp_path: Path) -> None:
    asked = settings(tmp_path / "out", "dying", episodes=1, ray="local", workers=1)
    code, said = run(asked)
    assert code == 1
    assert "3 workers died on it" in said
    records = read_records(tmp_path / "out" / EPISODES)
    crashed = [record for record in records if record.crashed]
    assert len(records) == 6
    assert {record.unit.task for record in crashed} == {"push"}
    assert all(record.success is None for record in crashed)


def test_refusals_of_workers_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="There is no suite 'mars'"):
        run(settings(tmp_path / "a", suites=("mars",), ray="local", workers=1))
    with pytest.raises(EvaluationError, match="--workers is 99, but the cluster has 2 cores"):
        run(settings(tmp_path / "b", ray="local", workers=99))
    with pytest.raises(EvaluationError, match=r"'fastv 0\.25 drop K=3' does not fit this policy"):
        run(settings(tmp_path / "c", "tiny", methods=("fastv",), ray="local", workers=1))


def test_a_cluster_that_is_none_is_one_line(tmp_path: Path) -> None:
    """The last one here, since it ends the cluster."""
    ray.shutdown()
    with pytest.raises(EvaluationError, match="--ray is auto, where no Ray cluster answers"):
        run_eval(settings(tmp_path, ray="auto"), Console(quiet=True), find_fake)
