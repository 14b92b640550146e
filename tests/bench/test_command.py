"""`vla-pruner bench`: the report, the files, and flags that make no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench.conftest import LLAMA
from vla_pruner.benching.settings import BenchSettings
from vla_pruner.cli import main
from vla_pruner.errors import CheckpointError, OptionError, VLAPrunerError

pytestmark = pytest.mark.usefixtures("quick")


def test_the_report_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--keep", "0.25,32", "--pruned", "freeze", "--iters", "3", "--out", str(tmp_path)]
    assert main(["bench", "--model", "pi0", "--size", "tiny", "--denoise-steps", "2", "--json", "-", *flags]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report == json.loads((tmp_path / "bench.json").read_text())

    names = [
        "unpruned",
        "vla-pruner 0.25 freeze K=3 semantic_queries=last",
        "vla-pruner 32 freeze K=3 semantic_queries=last",
    ]
    assert [arm["name"] for arm in report["arms"]] == names
    assert [arm["kept"] for arm in report["arms"]] == [192, 48, 32]
    assert len(report["order"]) == 2  # three steps of each arm, two in each turn
    conditions = report["conditions"]
    assert {"python", "torch", "transformers"} <= set(conditions["versions"])
    assert (conditions["device"], conditions["dtype"], conditions["attention"]) == ("cpu", "float32", "sdpa")
    for name in ("device_name", "threads", "load_average_before", "load_average_after", "busy_cores_before", "git"):
        assert name in conditions
    assert report["settings"]["keep"] == [0.25, 32]
    assert report["shape"]["denoise_steps"] == 2
    assert report["acting"] == "denoise"
    assert report["prepare_ms"] > 0
    assert 0 < report["reachable_share"]["3"] < 1
    assert report["peaks"] == {"measured_flops": 1e11, "measured_bandwidth": 1e10, "data_sheet": None}
    for arm in report["arms"]:
        times = arm["milliseconds"]
        assert len(times["samples"]) == 4
        assert min(times["samples"]) <= times["p50"] <= times["p90"] <= times["p99"] <= max(times["samples"])
        assert arm["flops"]["agree"]
        assert arm["roofline"]["total"] == pytest.approx(sum(arm["roofline"].values()) / 2)
        assert arm["reached"] == pytest.approx(arm["roofline"]["total"] / times["p50"])
        assert arm["memory"]["bytes"] > 0
        assert "resident" in arm["memory"]["kind"]
        if arm["name"] == "unpruned":
            assert arm["speed"] is arm["method"] is arm["ceiling"] is None
        else:
            assert arm["speed"]["rounds"] == 2
            assert arm["speed"]["low"] is None  # two rounds have no interval
            assert arm["method"].startswith("VLAPruner(")
            assert arm["ceiling"] > 1
            assert arm["why"].startswith("The prompt's FLOPs fall to")

    rows = (tmp_path / "bench.md").read_text().splitlines()
    assert len(rows) == 2 + len(names)
    assert all(row.count("|") == rows[0].count("|") for row in rows)
    assert [row.split("|")[2].strip() for row in rows[2:]] == names
    assert "ms a step, p50" in printed.err
    assert "Warning: 2 rounds are too few for an interval" in " ".join(printed.err.split())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "gpt"], "neither a folder nor one of reference, reference-chunk, openvla"),
        (["--model", "llama:64"], "it is llama:HIDDEN,LAYERS"),
        (["--model", "llama:²,4"], "it is llama:HIDDEN,LAYERS"),
        (["--model", "llama:64,4,3"], "does not divide into 3 heads"),
        (["--method", "magic"], "--method is magic; it is one of action-and-diversity"),
        (["--keep", "1.5"], "keep=1.5 was given"),
        (["--keep", "a,b"], "no list of values"),
        (["--keep", ","], "--keep names nothing"),
        (["--model", "pi0", "--size", "tiny", "--layer", "0"], "layer=0 was given"),
        (["--layer", "6"], "the decoder has 6 layers"),
        (["--pruned", "drop,melt"], "--pruned is melt; it is drop, freeze or reuse"),
        (["--pruned", "reuse"], "vla-pruner can only drop or freeze"),
        (["--method", "vla-cache", "--pruned", "drop"], "vla-cache can only reuse"),
        (["--method", "vla-cache"], "it is not known where DecoderLM has them"),
        (["--method", "vla-pruner:speed=2"], "has the option 'speed=2'; vla-pruner takes"),
        (["--method", "text-query:gate=3"], "in a benchmark no arm moves"),
        (["--encoder-keep", "1.5"], "keep=1.5 was given; of a vision encoder"),
        (["--encoder-keep", ","], "--encoder-keep names nothing"),
        (["--encoder-keep", "0.5"], "DecoderLM does not say where the patches of its vision encoder are"),
        (
            ["--model", "reference", "--encoder-keep", "0.5", "--compile"],
            "--encoder-keep does not go with --compile",
        ),
        (["--option", "unnorm_key=x"], "--option does not apply to llama"),
        (["--model", "openvla-7b", "--option", "unnorm_key=x"], "--option does not apply to openvla-7b; leave it out"),
        (["--batch", "0"], "--batch is 0; it is a whole number of 1 or more"),
        (["--prompt-tokens", "256"], "give 258 or more"),
        (["--denoise-steps", "4"], "--denoise-steps does not apply to llama"),
        (["--size", "tiny"], "--size does not apply to llama"),
        (["--model", "reference", "--layers", "3"], "--layers does not apply to reference"),
        (["--model", "reference", "--cameras", "2"], "--cameras does not apply to reference"),
        (["--model", "openvla-oft", "--decode-tokens", "7"], "--decode-tokens does not apply to openvla-oft"),
        (["--model", "openvla-7b", "--size", "tiny", "--cameras", "4"], "OpenVLA has one to 3"),
        (["--device", "warp"], "--device is warp, which torch cannot use here"),
        (["--json", "/no/such/folder/x.json"], "there is no such folder"),
        (["--out", __file__], "which cannot be written to (it is a file); give a folder"),
        (["--out", f"{__file__}/sub"], "which cannot be written to (Not a directory); give a folder"),
        (["--out", "/proc/sub"], "--out is /proc/sub, which cannot be written to"),
        (["--json", f"{__file__}/x.json"], "there is no such folder"),
    ],
)
def test_flags_that_make_no_sense(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = flags if "--model" in flags else ["--model", LLAMA, *flags]
    try:
        code: Any = main(["bench", *given])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    printed = capsys.readouterr()
    assert said in " ".join(printed.err.split())
    assert printed.out == ""


def test_a_checkpoint_has_its_own_sizes(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--layers does not apply to a checkpoint"):
        BenchSettings(str(tmp_path), layers=3)


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_name_on_the_hub_is_loaded_as_every_command_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    asked: list[str] = []

    def fetch(name: str, **_: Any) -> str:
        asked.append(name)
        raise OSError("there is no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert main(["bench", "--model", "owner/policy"]) == 2
    assert asked == ["owner/policy"]
    assert "owner/policy is no folder here and could not be fetched" in capsys.readouterr().err


def test_options_of_a_checkpoint_are_those_of_load_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vla_pruner.benching import policies

    asked: list[dict[str, Any]] = []

    def load(name: str, device: Any, dtype: Any, **options: Any) -> None:
        asked.append(options)
        raise CheckpointError(f"{name} was not loaded")

    monkeypatch.setattr(policies, "load_policy", load)
    words = ["--option", "unnorm_key=bridge_orig", "--option", "cameras=image,wrist_image"]
    assert main(["bench", "--model", str(tmp_path), *words]) == 2
    assert asked == [{"unnorm_key": "bridge_orig", "cameras": ("image", "wrist_image")}]
    assert f"{tmp_path} was not loaded" in capsys.readouterr().err
    kept = BenchSettings(str(tmp_path), options={**asked[0], "horizon": 8, "tokenizer": object}).to_json()["options"]
    assert json.loads(json.dumps(kept)) == {
        "unnorm_key": "bridge_orig",
        "cameras": ["image", "wrist_image"],
        "horizon": 8,
        "tokenizer": "<class 'object'>",
    }


def test_lerobot_s_policies_need_lerobot() -> None:
    from importlib.util import find_spec

    if find_spec("lerobot") is not None:
        pytest.skip("lerobot is installed")
    from vla_pruner.benching import bench

    with pytest.raises(VLAPrunerError, match="lerobot is not installed"):
        bench("pi05", size="tiny")


def test_sizes_that_are_left_out_are_llama_s() -> None:
    size = BenchSettings("llama:1024,16").llama()
    assert (size.hidden, size.layers, size.heads, size.intermediate, size.vocabulary) == (1024, 16, 16, 2816, 32064)
    size = BenchSettings("llama:4096,32").llama()
    assert (size.heads, size.intermediate) == (32, 11008)
    assert BenchSettings("llama:64,4,2,100,50", layers=2, layer=1).llama().layers == 2
    assert BenchSettings("llama:64,4,2,100,50").llama().vocabulary == 50


def test_a_json_file_that_cannot_be_written_is_told_first(tmp_path, capsys):
    assert main(["bench", "--model", "llama:64,4", "--json", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "which is a folder" in error
    assert len(error.splitlines()) == 1


def test_a_narrow_terminal_breaks_no_word_of_the_table(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arms = ["--keep", "0.5,0.25,0.125", "--pruned", "drop,freeze", "--layer", "1"]
    assert main(["bench", "--model", "llama:64,3", "--iters", "2", *arms]) == 0
    table = capsys.readouterr().out.split("AMD")[0].split("2 rounds")[0]
    lines = [line for line in table.splitlines() if not line.startswith(("vla-pruner ", "Warning"))]
    assert sum(line.split().count("vla-pruner") for line in lines) == 6
    assert sum(line.startswith(" visual tokens") for line in lines) == 3  # three tables


def test_a_log_tells_how_far_a_long_benchmark_is(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from vla_pruner import terminal
    from vla_pruner.benching import command

    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(command, "LogLines", lambda *all: terminal.LogLines(*all, clock=lambda: float(next(clock))))
    assert main(["bench", "--model", "llama:64,4", "--iters", "6"]) == 0
    assert "2 of 5 rounds, 40 s; about 1 min left" in capsys.readouterr().out
