"""The study of docs/study.md: its phases are commands that `eval` understands, and its differences are as they say."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import study
from benchmarks.study import PHASES
from benchmarks.study_contrasts import CONTRASTS, OF_PHASE, Contrast, difference, outcomes, table
from tests.evaluation.fakes import settings
from tests.evaluation.test_run import run
from vla_pruner import cli
from vla_pruner.evaluation import EvalSettings


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> dict[str, EvalSettings]:
    seen: list[EvalSettings] = []
    monkeypatch.setattr("vla_pruner.evaluation.command.run_eval", lambda asked, _: seen.append(asked) or 0)
    for phase, flags in PHASES.items():
        assert cli.main(["eval", *flags, "--out", phase]) == 0
    return dict(zip(PHASES, seen, strict=True))


def test_the_phases_are_what_the_document_says(phases: dict[str, EvalSettings]) -> None:
    grid = phases["grid"].arms()
    assert len(grid) == 81
    by_kind = {kind: len(list(of)) for kind, of in itertools.groupby(arm.kind for arm in grid)}
    assert by_kind == {"baseline": 1, "method": 72, "again": 1, "random": 6, "blank": 1}
    # The arms differ in the choice of tokens, not in how long it is delayed.
    assert {
        arm.method.warmup_steps for arm in grid if hasattr(arm.method, "warmup_steps") and arm.kind != "method"
    } == {3}
    assert phases["options"].first == phases["grid"].first == 0
    assert {settings.margin for settings in phases.values()} == {0.05}
    assert not {arm.key for arm in phases["options"].arms()[1:]} & {arm.key for arm in grid}


def test_every_contrast_has_its_arms_in_the_grid(phases: dict[str, EvalSettings]) -> None:
    known = {study.named(arm.title)[0] for arm in phases["grid"].arms() if arm.kind in ("method", "random")}
    assert len(known) == 13
    for one in CONTRASTS:
        assert {one.arm, one.base} <= known | {"drop", "freeze"}
    others = {study.named(arm.title)[0] for arm in phases["options"].arms()[1:]}
    assert {"vla-pruner K=1", "vla-pruner window=1"} <= others


@pytest.mark.parametrize("phase", ["chunk-grid", "libero-grid", "chunk-vendors", "libero-vendors"])
def test_every_contrast_of_a_two_camera_policy_has_its_arms(phases: dict[str, EvalSettings], phase: str) -> None:
    layer = study.layer_of(phase)
    known = {study.named(arm.title, layer)[0] for arm in phases[phase].arms() if arm.kind in ("method", "random")}
    assert known >= {side for one in OF_PHASE[phase] for side in (one.arm, one.base)} - {"drop", "freeze"}
    assert not [name for name in known if "K=" in name]


@pytest.mark.parametrize("phase", ["chunk-encoder", "libero-encoder"])
def test_arms_that_differ_in_the_encoder_alone_have_names_of_their_own(
    phases: dict[str, EvalSettings], phase: str
) -> None:
    arms = [arm for arm in phases[phase].arms() if arm.kind == "method"]
    assert len({study.named(arm.title, study.layer_of(phase)) for arm in arms}) == len(arms) == 5


def test_confirmations_of_both_two_camera_policies_share_their_settings(phases: dict[str, EvalSettings]) -> None:
    meta_world, libero = ({arm.key for arm in phases[f"{name}-confirm"].arms()} for name in ("chunk", "libero"))
    assert libero < meta_world
    assert phases["chunk-confirm"].first >= phases["chunk-grid"].episodes


def published(folder: Path, solved: dict[str, list[bool | None]]) -> Path:
    """A phase with these arms, by title; episodes of two tasks in turn."""
    arms = [{"key": title.replace(" ", "-"), "title": title, "kind": kind_of(title)} for title in solved]
    (folder / "summary.json").write_text(json.dumps({"summary": {"arms": arms}}))
    with gzip.open(folder / "episodes.jsonl.gz", "wt") as file:
        for arm in arms:
            for number, success in enumerate(solved[arm["title"]]):
                record: dict[str, Any] = {"arm": arm["key"], "task": "ab"[number % 2], "initial_state": number // 2}
                file.write(json.dumps({**record, "success": success}) + "\n")
    return folder


def test_what_was_published_goes_on_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(PHASES, "toy", ("--policy", "nothing", "--suite", "fake"))
    assert study.main(["resume", "toy", "--out", str(tmp_path / "other")]) == 2
    assert "holds nothing to resume" in capsys.readouterr().err
    part = tmp_path / "toy-1"
    run(settings(part, "nothing"))
    lines = (part / "episodes.jsonl").read_bytes().splitlines(keepends=True)
    (part / "episodes.jsonl").write_bytes(b"".join(lines[:5]))
    assert study.main(["publish", "toy", "--out", str(tmp_path)]) == 0
    kept = {file.name for file in (tmp_path / "results" / "toy").iterdir()}
    assert kept == {"run.json", "table.md", "summary.json", "report.html", "episodes.jsonl.gz"}
    assert study.main(["resume", "toy", "--out", str(tmp_path / "other")]) == 0
    assert (tmp_path / "other" / "toy-1" / "episodes.jsonl").read_bytes() == b"".join(lines[:5])
    code, said = run(settings(tmp_path / "other" / "toy-1", "nothing"))
    assert code == 0
    assert "5 of 12 episodes are done" in said
    assert study.main(["resume", "toy", "--out", str(tmp_path / "other")]) == 2


def test_what_is_published_is_whole_and_never_less_than_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(PHASES, "toy", ("--policy", "nothing", "--suite", "fake"))
    records, target = tmp_path / "toy-1" / "episodes.jsonl", tmp_path / "results" / "toy"
    publish = ["publish", "toy", "--out", str(tmp_path)]
    assert study.main(["table", "toy"]) == 2
    assert "holds nothing yet" in capsys.readouterr().err
    run(settings(tmp_path / "toy-1", "nothing"))
    lines = records.read_bytes().splitlines(keepends=True)
    records.write_bytes(b"".join(lines[:11]))
    assert study.main(publish) == 0
    assert "holds toy but for 1 episode that did not run." in capsys.readouterr().out.replace("\n", " ")
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    records.write_bytes(b"".join(lines[2:]))
    assert study.main(publish) == 2
    assert "holds 2 episodes of this run that the parts lack" in capsys.readouterr().err
    monkeypatch.setattr(study.gzip, "GzipFile", lambda *_, **__: 1 / 0)
    records.write_bytes(b"".join(lines))
    with pytest.raises(ZeroDivisionError):
        study.main(publish)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before


def test_damaged_records_are_resumed_from_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part without its records would begin the run anew."""
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(PHASES, "toy", ("--policy", "nothing", "--suite", "fake"))
    run(settings(tmp_path / "toy-1", "nothing"))
    assert study.main(["publish", "toy", "--out", str(tmp_path)]) == 0
    packed = tmp_path / "results" / "toy" / "episodes.jsonl.gz"
    for content in (packed.read_bytes()[:50], None):
        packed.unlink() if content is None else packed.write_bytes(content)
        assert study.main(["resume", "toy", "--out", str(tmp_path / "other")]) == 2
        assert "cannot be read" in capsys.readouterr().err
        assert not (tmp_path / "other" / "toy-1").exists()


def kind_of(title: str) -> str:
    return {"unpruned": "baseline", "random": "random"}.get(title.split(" ")[0], "method")


def test_differences_are_over_all_budgets_or_one(tmp_path: Path) -> None:
    found = outcomes(
        published(
            tmp_path,
            {
                "unpruned": [True] * 8,
                "fastv 0.5 drop K=3 warmup_steps=3": [True] * 8,
                "fastv 0.25 drop K=3 warmup_steps=3": [True, True, False, False, True, True, None, False],
                "fastv 0.25 freeze K=3 warmup_steps=3": [True] * 8,
                "random 0.5 drop K=3 after 3": [True] * 4 + [False] * 4,
                "random 0.25 drop K=3 after 3": [False] * 8,
            },
        )
    )
    assert set(found) == {"fastv", "random"}
    one = Contrast("?", "fastv", "random")
    small = difference(one, found, 0.95, "0.25 ")
    assert small is not None
    assert small.pairs == 7, "an episode that crashed is in no pair"
    assert small.value == pytest.approx(4 / 7)
    every = difference(one, found, 0.95)
    assert every is not None
    # Of the settings that both have: .25 drop and .5 drop.
    assert every.value == pytest.approx(((4 - 0) / 2 + (7 - 4) / 2) / 7)
    assert every.low < every.value < every.high
    wider = difference(one, found, 0.999)
    assert wider is not None
    assert wider.low < every.low
    fates = difference(Contrast("?", "freeze", "drop"), found, 0.95)
    assert fates is not None
    assert fates.value == pytest.approx(3 / 7), "of fastv alone: drawing is no method"
    assert difference(one, found, 0.95, "0.125 ") is None
    same = difference(Contrast("?", "fastv", "fastv"), found, 0.95)
    assert same is not None
    assert same.low < same.value == 0.0 < same.high, "episodes that never differ are no proof that none would"
    row = {"question": "?", "arm": "a", "base": "b", "all": vars(small), "0.5": None, "0.25": None, "0.125": None}
    assert "| ? | a - b | +57.1 (" in table([row])


def test_tables_have_only_the_columns_that_a_phase_ran() -> None:
    arm = {"title": "dart 0.25 freeze K=2", "kind": "method", "difference": {"pairs": 0, "value": None}}
    assert study.table({"arms": [arm]}, "2").splitlines()[0] == "| method | freeze 0.25 |"
    row = {"question": "?", "arm": "a", "base": "b", "all": None, "0.25": None}
    assert table([row]).splitlines()[0] == "| question | difference | all budgets | .25 |"
