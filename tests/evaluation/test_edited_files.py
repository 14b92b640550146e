"""Run folders that people edited, or that were cut: one sentence that names the file, and no page with a hole in it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.report.folders import write_run
from vla_pruner.evaluation import EvaluationError
from vla_pruner.evaluation.manifest import MANIFEST, Manifest, run_of
from vla_pruner.evaluation.records import EPISODES, read_records
from vla_pruner.evaluation.traces import read_trace
from vla_pruner.report.command import run_report

Json = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", episodes=2, keep=(0.25,), pruned=("drop",), traced=1, tasks=("reach", "push"))
    return tmp_path / "run"


def edit(folder: Path, change: Callable[[Json], Any]) -> None:
    """Edit run.json, and make its hash and the records fit again."""
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    with suppress(TypeError, AttributeError, KeyError):  # no identity, which is told before its hash is compared
        content["run"] = run_of(content["identity"])
    (folder / MANIFEST).write_text(json.dumps(content))
    lines = [json.loads(line) | {"run": content["run"]} for line in (folder / EPISODES).read_text().splitlines()]
    (folder / EPISODES).write_text("".join(json.dumps(line) + "\n" for line in lines))


def report(folder: Path) -> tuple[str, str]:
    """Return the page and the output, on a terminal that takes UTF-8 and nothing else."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    run_report(folder, None, (), Console(file=out, width=300))
    out.flush()
    out.seek(0)
    return (folder / "report.html").read_text(encoding="utf-8"), out.read()


def identity(**changes: Any) -> Callable[[Json], Any]:
    return lambda content: content["identity"].update(changes)


def arm(**changes: Any) -> Callable[[Json], Any]:
    return lambda content: content["identity"]["arms"][1].update(changes)


def options(**changes: Any) -> Callable[[Json], Any]:
    return lambda content: content["identity"]["arms"][1]["options"].update(changes)


def plan(**changes: Any) -> Callable[[Json], Any]:
    return lambda content: content["plan"].update(changes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (identity(arms=[]), "its arms do not begin with the unpruned policy"),
        (identity(arms=None), "arms is None, not a list"),
        (identity(arms=[1]), r"arms\[0\] is 1, not an object"),
        (lambda content: content["identity"].pop("arms"), "arms is missing"),
        (lambda content: content["identity"]["arms"].pop(0), "its arms do not begin with the unpruned policy"),
        (lambda content: content["identity"]["arms"].append(content["identity"]["arms"][0]), "have one key"),
        (lambda content: content["identity"]["arms"][1].pop("title"), "title is missing"),
        (arm(title=5), "title is 5, not text"),
        (arm(title=" "), "an arm has an empty title"),
        (arm(key="a\ud800"), "key is '.*', which is no text"),
        (arm(random=[]), r"random is \[\], not text"),
        (arm(options=[]), r"options is \[\], not an object"),
        (arm(options={}), "method is missing"),
        (options(keep="0.25"), "keep is '0.25', not a finite number"),
        (options(own=[5]), r"own\[0\] is 5, not text"),
        (options(encoder_keep=0), "encoder_keep or encoder_refresh is out of its range: keep=0 was given"),
        (options(layer=2), "the arm 'vla-pruner 0.25 drop K=3.*' has the options of 'vla-pruner 0.25 drop K=2.*'"),
        (arm(title="vla-pruner", options=None), "the arm 'vla-pruner' has no options, and its title does not tell"),
        (identity(margin=-0.02), "margin is -0.02, not a fraction between 0 and 1"),
        (identity(margin="2"), "margin is '2', not a finite number"),
        (identity(margin=1.0), "margin is 1, not a fraction"),
        (identity(max_steps=0), "max_steps is 0, not 1 or more"),
        (identity(weights=None), "weights is None, not text"),
        (plan(tasks=[]), "plan selects no episode"),
        (plan(episodes=0), "plan selects no episode"),
        (plan(episodes="9"), "episodes is '9', not a whole number"),
        (plan(shard=[3, 2]), "plan has the shard 3 of 2"),
        (plan(shard=[1]), "shard has 1 values, not 2"),
        (lambda content: content["plan"]["tasks"][0].update(max_steps=0), "and 0 steps"),
        (lambda content: content.update(extended=[None]), r"extended\[0\] is None"),
        (lambda content: content.update(conditions=[[]]), r"conditions\[0\] is \[\], not an object"),
        (lambda content: content["conditions"][0].update(busy_cores_before="1"), "busy_cores_before is '1'"),
        (lambda content: content["conditions"][0].update(threads=[]), r"threads is \[\]"),
        (lambda content: content.update(for_claims=None), "for_claims is None, not true or false"),
    ],
)
def test_an_edited_run_is_one_sentence(folder: Path, change: Callable[[Json], Any], told: str) -> None:
    edit(folder, change)
    with pytest.raises(EvaluationError, match=rf"run.json is damaged \(.*{told}"):
        Manifest.read(folder)
    with pytest.raises(EvaluationError, match=r"run.json is damaged"):
        report(folder)


def test_more_episodes_than_memory_holds_are_refused(folder: Path) -> None:
    edit(folder, plan(episodes=10**7))
    with pytest.raises(
        EvaluationError, match="10,000,000 episodes of 2 tasks are asked for, and an evaluation has at most"
    ):
        report(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 10**400}, "steps is too large"),
        ({"steps": -1}, "its steps is too small"),
        ({"latency_ms": [None]}, "latency_ms"),
        ({"latency_ms": [-1.0]}, "its latency_ms is too small"),
        ({"kept_tokens": [1]}, r"its kept_tokens are \[1\]"),
        ({"versions": {"x": 1}}, "versions.x is 1, not text"),
        ({"task_id": -1}, "its task_id is -1, not 0 or more"),
        ({"task": "a\ud800"}, "task is .* a lone surrogate"),
        ({"success": None}, "its success is None, and its termination"),
        ({"termination": "error", "success": None, "error": None}, "its termination is 'error', and its error None"),
        ({"termination": "error", "success": None, "error": {}}, "its error lacks a type, a message"),
        ({"attempt": 0}, "its attempt is too small"),
        ({"sum_reward": 10**400}, "sum_reward is inf"),
    ],
)
def test_an_edited_record_is_one_sentence(folder: Path, changes: Json, told: str) -> None:
    path = folder / EPISODES
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(lines[0]) | changes), *lines[1:]]) + "\n")
    with pytest.raises(EvaluationError, match=rf"Line 1 of .*episodes.jsonl is damaged \(.*{told}"):
        read_records(path)


def test_text_of_strangers_is_shown_as_it_is(folder: Path) -> None:
    hostile = "[/x] [bold]<script>alert(7)</script>\x1b[2J"
    edit(folder, lambda content: content["conditions"][0].update(policy=hostile))
    edit(folder, arm(title=f"{hostile} 0.25 drop K=3"))
    edit(folder, options(method=hostile, own=[]))
    page, printed = report(folder)
    assert "<script>alert(7)" not in page
    assert r"[/x] [bold]<script>alert(7)</script>\x1b[2J" in printed


def test_what_earlier_versions_wrote_of_others_exceptions_is_read(folder: Path) -> None:
    path = folder / EPISODES
    lines = path.read_text().splitlines()
    error = {"type": "OSError", "message": "bad \ud800[/x]", "where": "x.py:1 f"}
    crashed = json.loads(lines[0]) | {"termination": "error", "success": None, "error": error}
    path.write_text("\n".join([json.dumps(crashed), *lines[1:]]) + "\n")
    assert r"bad \ud800[/x]" in report(folder)[0]
    edit(folder, lambda content: content["conditions"][0].update(command="eval \udc80"))
    with pytest.raises(EvaluationError, match=r"command is 'eval .udc80', which is no text"):
        report(folder)


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    change(arrays)
    np.savez_compressed(path, **arrays)


def about(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda arrays: arrays.update(about=np.array(json.dumps(json.loads(str(arrays["about"])) | changes)))


TRACES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda a: a.update({name: array[:0] for name, array in a.items() if array.ndim}), "it holds no control step"),
    (lambda a: a.update(actions=np.array([["x"]] * 6)), "its actions are <U1 of 2 dimensions"),
    (lambda a: a.update(actions=np.zeros((6, 0, 4), np.float32)), "its actions have the shape"),
    (lambda a: a.update(noise_seeds=np.zeros(6, np.int64) - 5), "its noise_seeds are int64"),
    (lambda a: a.update(steps=np.arange(6)[::-1].copy()), "its steps go backwards"),
    (lambda a: a.update({"images/front": np.zeros((6, 8, 8, 3))}), "its images/front are float64"),
    (lambda a: a.update({"images/front": np.zeros((6, 8, 8, 4), np.uint8)}), "no pictures of red, green and blue"),
    (lambda a: a.update(evil=np.zeros(6)), "it holds 'evil', which no trace has"),
    (lambda a: a.pop("steps"), "'steps' is missing"),
    (about(camera_tokens={"front": 10**9}), r"its cameras have \[1000000000\] visual tokens"),
    (about(camera_tokens={"front": -4, "wrist": 36}), r"its cameras have \[-4, 36\] visual tokens"),
    (about(camera_tokens=[]), r"camera_tokens is \[\], not an object"),
    (about(success="yes"), "success is 'yes', not true or false"),
    (about(unit={}), "the fields .* of unit are missing"),
    (lambda a: a.update(about=np.array("[" * 100_000)), "it is nested too deeply"),
    (lambda a: a.update(about=np.array("[]")), r"what it says of itself is \[\], not an object"),
]


@pytest.mark.parametrize(("change", "told"), TRACES, ids=[told[:30] for _, told in TRACES])
def test_an_edited_trace_is_one_sentence_and_left_out(folder: Path, change: Callable[[Json], Any], told: str) -> None:
    path = sorted((folder / "traces").glob("*-unpruned-????????.npz"))[0]
    rewrite(path, change)
    with pytest.raises(EvaluationError, match=rf"The trace .* is damaged \(.*{told}"):
        read_trace(path)
    assert "Left out: The trace" in report(folder)[1]


def test_the_trace_of_another_episode_is_left_out(folder: Path) -> None:
    first, second = sorted((folder / "traces").glob("*-unpruned-????????.npz"))[:2]
    first.write_bytes(second.read_bytes())
    assert read_trace(first).unit.task == "push"
    assert "is damaged (it is of 'unpruned' on fake task 1 (push)" in report(folder)[1]


def test_an_array_that_says_to_be_larger_than_its_file_takes_no_memory(folder: Path) -> None:
    path = sorted((folder / "traces").glob("*.npz"))[0]
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }" % 2**40
    with zipfile.ZipFile(path, "a") as archive:
        padded = header.ljust(117) + b"\n"
        archive.writestr(
            "images/x.npy", b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + b"\0" * 100
        )
    with pytest.raises(EvaluationError, match=r"images/x.npy is an array of \(1099511627776,\) uint8 in 228 bytes"):
        read_trace(path)
