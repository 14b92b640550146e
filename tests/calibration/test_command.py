"""`vla-pruner calibrate` from its flags to its file."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.calibration.fakes import STEPS, made_up_folder
from tests.evaluation.fakes import FakeSource, settings
from tests.evaluation.test_run import run
from vla_pruner import cli
from vla_pruner.calibration import CalibrateSettings, Calibration, CalibrationError
from vla_pruner.calibration.agreement import arms_of, read_eval_info
from vla_pruner.calibration.command import run_calibrate
from vla_pruner.calibration.replay import replay
from vla_pruner.evaluation import PolicySource
from vla_pruner.evaluation.policies import fingerprint
from vla_pruner.methods import VLACache
from vla_pruner.models.reference import load_autoregressive_policy

OPTION = re.compile(r"\w+=[^,()]+")


def calibrated(**asked: Any) -> str:
    said = io.StringIO()
    assert run_calibrate(CalibrateSettings(**asked), Console(file=said, width=200, highlight=False)) == 0
    return said.getvalue()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of the tiny policy with traces."""
    folder = tmp_path_factory.mktemp("evaluated")
    asked = settings(
        folder,
        "tiny",
        methods=("vla-pruner:window=1:preset=paper", "fastv"),
        keep=(0.5, 0.125),
        layer=(1,),
        controls=("random",),
        trace=2,
    )
    assert run(asked)[0] == 0
    return folder


def ranked(folder: Path, copy: Path) -> Path:
    """Six episodes of a policy that was never trained lose nothing; here every arm loses more than the one before."""
    content = json.loads((folder / "eval_info.json").read_text())
    for place, arm in enumerate(content["summary"]["arms"][1:]):
        arm["difference"]["value"] = -place / 10
    copy.write_text(json.dumps(content))
    return copy


def test_an_evaluations_own_arms_are_calibrated_and_compared(evaluated: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    against = (ranked(evaluated, tmp_path / "eval_info.json"),)
    said = calibrated(policy=FakeSource("tiny"), source=evaluated, against=against, tolerance=9.0, json=str(file))
    content = json.loads(file.read_text())
    arms = [arm["key"] for arm in content["arms"]]
    assert arms[:3] == [
        "unpruned",
        "vla-pruner-0.5-drop-K1-window1-presetpaper",
        "vla-pruner-0.125-drop-K1-window1-presetpaper",
    ]
    assert len(arms) == 1 + 4 + 4
    assert len(content["episodes"]) == 4
    assert content["against_recorded"] == pytest.approx(0.0, abs=1e-6)
    assert content["arms"][1]["pruned_steps"] == content["arms"][1]["steps"] - 4, "the first step of each episode"
    assert content["conditions"]["recorded_weights"] == content["weights"]
    assert {"command", "versions", "processor", "busy_cores_after"} <= set(content["conditions"])
    assert content["verdict"][0].startswith("No setting is chosen: a choice needs 8 episodes")
    assert content["within_tolerance"] == []
    pairs = content["agreement"]["arms"]
    assert {pair["key"] for pair in pairs} == set(arms[1:])
    assert "4 recorded episodes" in said
    assert [pair["loss"] for pair in pairs] == pytest.approx([place / 10 for place in range(8)])
    again = calibrated(results=file, against=against, tolerance=9.0)
    assert again.splitlines()[-2:] == said.splitlines()[-2:], "from the file the same is said"
    assert Calibration.read(file).baseline.p50_ms > 0


@pytest.mark.parametrize(("pruned", "differ"), [(None, True), (("freeze",), False)])
def test_methods_of_different_fates_are_told(tmp_path: Path, pruned: tuple[str, ...] | None, differ: bool) -> None:
    asked = CalibrateSettings(
        policy=FakeSource("tiny"), source=tmp_path, methods=("vla-pruner", "fastv"), pruned=pruned, controls=()
    )
    said = io.StringIO()
    with pytest.raises(CalibrationError):  # the folder holds no recordings
        run_calibrate(asked, Console(file=said, width=200, highlight=False))
    told = "differ in the fate of the other tokens, too (vla-pruner freeze, fastv drop); --pruned chooses it for all."
    assert (told in said.getvalue()) == differ


def test_flags_reach_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[CalibrateSettings] = []
    monkeypatch.setattr("vla_pruner.calibration.command.run_calibrate", lambda asked, _: seen.append(asked) or 0)
    text = (
        "calibrate --policy CKPT --from data --tolerance .1 --against a --against b --json c.json "
        "--method fastv,divprune "
        "--keep .5,64 --layer 2,3 --pruned drop,freeze --controls none --tasks x,y --episodes 3 --every 2 "
        "--max-steps 9 --camera l=left --camera r=right --seed 4 --device cuda --dtype bfloat16 --option unnorm_key=k"
    )
    assert cli.main(text.split()) == 0
    assert seen == [
        CalibrateSettings(
            policy=PolicySource("CKPT", device="cuda", dtype="bfloat16", options={"unnorm_key": "k"}),
            source=Path("data"),
            methods=("fastv", "divprune"),
            keep=(0.5, 64),
            layer=(2, 3),
            pruned=("drop", "freeze"),
            controls=(),
            tasks=("x", "y"),
            episodes=3,
            every=2,
            max_steps=9,
            cameras={"l": "left", "r": "right"},
            seed=4,
            tolerance=0.1,
            against=(Path("a"), Path("b")),
            json="c.json",
        )
    ]
    assert [arm.kind for arm in CalibrateSettings(policy=PolicySource("x"), source=Path("y")).arms()] == [
        "method",
        "again",
        "random",
        "blank",
    ]


def test_a_method_that_reuses_tokens_has_its_own_keep_and_fate() -> None:
    base: dict[str, Any] = {"policy": PolicySource("x"), "source": Path("y"), "controls": ()}
    cache, fastv = CalibrateSettings(**base, methods=("vla-cache", "fastv")).arms()
    made: Any = cache.method
    assert made == VLACache(layer=3)
    assert "reuse" in cache.title
    assert fastv.title == "fastv 0.25 drop K=3"
    (asked,) = CalibrateSettings(**base, methods=("vla-cache",), keep=(0.5,), pruned=("reuse",)).arms()
    assert asked.method == VLACache(keep=0.5, layer=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--policy reference", "--policy and --from say what to replay"),
        ("--policy reference --from nowhere", "There is no folder nowhere; --from is the --out of an evaluation"),
        ("--policy reference --from EMPTY", "holds no traces of the unpruned policy and no LeRobot dataset"),
        ("--policy reference --from EMPTY --method magic", "--method is magic"),
        ("--policy reference --from EMPTY --pruned melt", "--pruned is melt"),
        ("--policy reference --from EMPTY --method none --encoder-keep .5", "so --encoder-keep would be of no effect"),
        ("--policy reference --from EMPTY --tolerance 0", "--tolerance is 0"),
        ("--policy reference --from EMPTY --every 0", "--every is 0; it is a whole number of 1 or more"),
        ("--policy reference --from EMPTY --against EMPTY", "eval_info.json cannot be read"),
        ("--policy reference --from EMPTY --json EMPTY", "which is a folder"),
        ("--policy nothing --from EMPTY", "--policy is nothing, which sees no images"),
        ("--policy missing/checkpoint/x --from EMPTY", "missing/checkpoint/x"),
        ("--results x.json", "--results is read for --tolerance or --against"),
        ("--results x.json --tolerance 1", "x.json cannot be read"),
        ("--results x.json --policy reference", "--results does not read --policy"),
        ("--policy reference --from EMPTY --camera a=b --camera a=c", "argument --camera: a was given twice"),
        ("--policy reference --from EMPTY --camera left", "'left' is not POLICY=DATASET"),
    ],
)
def test_what_cannot_be_is_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    try:
        code = cli.main(["calibrate", *text.split()])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_no_shared_arm_is_known_before_anything_runs(evaluated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeSource, "load", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(CalibrationError, match="shares no pruning arm with"):
        calibrated(policy=FakeSource("tiny"), source=evaluated, against=(evaluated,), methods=("divprune",))


def test_few_shared_arms_are_calibrated_without_a_correlation(evaluated: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"methods": ("fastv",), "keep": (0.5,), "layer": (1,), "controls": (), "max_steps": 2}
    file = tmp_path / "c.json"
    said = calibrated(policy=FakeSource("tiny"), source=evaluated, against=(evaluated,), json=str(file), **asked)
    assert "closed-loop loss" in said
    assert "There is no rank correlation with the loss in closed loop: it needs 4 arms" in said
    agreed = json.loads(file.read_text())["agreement"]
    assert agreed["correlation"] is None
    assert agreed["why"] in said
    assert [pair["key"] for pair in agreed["arms"]] == ["fastv-0.5-drop-K1"]


def test_the_reference_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, on images that were made up; standard output is the report's, whatever a policy prints."""

    def print_and_replay(*args: Any) -> Any:
        print("a library has something to say")
        return replay(*args)

    monkeypatch.setattr("vla_pruner.calibration.command.replay", print_and_replay)
    text = ("open the door",) * STEPS
    made_up_folder(tmp_path / "e", states=2, tasks=1, size=112, instructions=text)
    command = f"calibrate --policy reference:autoregressive --from {tmp_path / 'e'} --method fastv --keep .5,.05"
    command += " --max-steps 2 --json -"
    assert cli.main(command.split()) == 0
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert "2 recorded episodes, 4 control steps" in captured.err
    moved = {arm["key"]: arm["moved"]["value"] for arm in content["arms"]}
    assert moved["unpruned-again"] == 0.0
    assert 0.0 < moved["fastv-0.5-drop-K3"] < moved["fastv-0.05-drop-K3"]
    assert content["weights"] == fingerprint(load_autoregressive_policy())
    assert np.isfinite(content["scale"]).all()


@pytest.mark.parametrize("name", ["study/options", "study/confirm", "study/chunk-vendors"])
def test_arms_from_before_there_was_another_default_are_made_anew_as_they_were(name: str) -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / name
    if not folder.is_dir():
        pytest.skip("the committed results are not in this tree")
    recorded = [arm for arm in read_eval_info(folder)["run"]["identity"]["arms"] if arm["kind"] == "method"]
    made = {arm.key: arm for arm in arms_of([folder]) if arm.kind == "method"}
    assert list(made) == [arm["key"] for arm in recorded]
    for arm in recorded:
        assert set(OPTION.findall(arm["method"])) <= set(OPTION.findall(repr(made[arm["key"]].method)))
        assert made[arm["key"]].title == arm["title"]
