"""`python -m benchmarks.gpu`: its plan, its limits, its files, and a dry run of everything."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.plan import COMPILING, PLAN, TEN_MINUTES, Bar, Item, chosen, seconds, told
from benchmarks.gpu.table import COMMITTED, DOCUMENT, MET, rewritten, section
from vla_pruner.benching.arms import arms_of
from vla_pruner.benching.settings import BenchSettings
from vla_pruner.plugins import class_at
from vla_pruner.registry import row_named

ROOT = Path(__file__).parents[2]
ITEM = Item("oft", "something", limit=60)


def command(code: str) -> gpu.Command:
    """Return the command of a process that runs `code`, in which `add(**fields)` writes results."""
    head = "import json, sys, time; file = sys.argv[1]\ndef add(**f): open(file, 'w').write(json.dumps(f))\n"
    return lambda item, file: [sys.executable, "-c", head + code, str(file)]


def one(tmp_path: Path, code: str, **options: Any) -> dict[str, Any]:
    """Run an item whose process runs `code`, and return the content of its file."""
    run = gpu.Run(tmp_path, command=command(code), **options)
    run.run([ITEM], again=True)
    return json.loads(run.file_of(ITEM).read_text())


def test_the_limits_fit_into_ten_minutes() -> None:
    anywhere = tuple(item for item in PLAN if item.needs is None)
    assert seconds(anywhere, {}) <= TEN_MINUTES
    text = told(PLAN, {"oft": 77})
    words = [line.split() for line in text.splitlines()]
    assert ["oft", "77", "s"] in [line[:3] for line in words]
    assert words[-1] == ["sum", f"{seconds(PLAN, {'oft': 77})}", "s", "of", "at", "most", f"{TEN_MINUTES}"]


def test_every_job_is_a_benchmark_that_can_be_asked_for_and_every_bar_one_of_its_figures() -> None:
    for item in PLAN:
        if item.missing is not None:
            continue
        for dry in (False, True):
            arms = {}
            for job in item.jobs:
                settings = job.settings(dry)
                settings = BenchSettings(model=job.model, **settings)
                assert settings.device == ("cpu" if dry else "cuda")
                arms[job.name] = [arm.name for arm in arms_of(settings)]
            for bar in item.bars:
                assert bar.arm in arms[bar.job]


def test_a_dry_run_is_as_the_real_one_but_for_sizes_repeats_and_the_backend() -> None:
    smaller = {
        "device",
        "dtype",
        "iters",
        "size",
        "threads",
        "layers",
        "decode_tokens",
        "denoise_steps",
        "batch",
        "keep",
    }
    for item in PLAN:
        for job in item.jobs:
            if item.missing is None:
                real, dry = job.settings(False), job.settings(True)
                differ = {name for name in real | dry if real.get(name) != dry.get(name)}
                assert differ <= smaller | {"compile"}, item.name
                assert bool(real["compile"]) == bool(dry["compile"])
                # Several robots stay several, and the bar's arm stays.
                assert (dry["batch"] > 1) == (real.get("batch", 1) > 1)
                assert set(dry["keep"]) <= set(real["keep"])


def test_policies_that_compile_are_measured_compiled() -> None:
    """A family that learns to compile must not stay eager here."""
    for item in PLAN:
        for job in item.jobs:
            row = row_named(job.model)
            if item.missing is None and row is not None and class_at(row.family).compilable:
                assert any(other.options.get("compile") for other in item.jobs if other.model == job.model), item.name


def test_what_an_item_found_is_written_with_its_end(tmp_path: Path) -> None:
    found = one(tmp_path, "add(tests=[1]); sys.exit('no such kernel')")
    assert (found["status"], found["reason"], found["tests"]) == ("failed", "no such kernel", [1])
    found = one(tmp_path, "add(tests=[2])")
    assert (found["status"], found["reason"], found["tests"]) == ("done", None, [2])
    summary = json.loads((tmp_path / "gpu.json").read_text())
    assert [item["item"] for item in summary["items"]] == ["oft"]
    assert (summary["format"], summary["dry"]) == (gpu.FORMAT, False)


def test_a_process_that_hangs_is_killed_with_what_it_started_and_keeps_what_it_found(tmp_path: Path) -> None:
    alive, script = tmp_path / "alive", tmp_path / "grandchild.py"
    script.write_text(
        f"import time\nfrom pathlib import Path\nalive = Path({str(alive)!r})\n"
        "alive.write_text('begun')\ntime.sleep(6)\nalive.write_text('went on')\n"
    )
    code = (
        "import os, subprocess\n"
        f"subprocess.Popen([sys.executable, {str(script)!r}])\n"
        f"while not os.path.exists({str(alive)!r}): time.sleep(.02)\n"
        "add(jobs=[])\ntime.sleep(600)\n"
    )
    found = one(tmp_path, code, limits={"oft": 4})
    assert found["status"] == "stopped at its limit"
    assert found["jobs"] == []
    assert found["seconds"] < 60
    time.sleep(4)
    assert alive.read_text() == "begun"


def test_an_item_that_is_there_does_not_run_again(tmp_path: Path) -> None:
    run = gpu.Run(tmp_path, command=command("add(number=1)"))
    run.run([ITEM])
    again = gpu.Run(tmp_path, command=command("add(number=2)"))
    assert again.run([ITEM])["items"][0]["number"] == 1
    assert again.run([ITEM], again=True)["items"][0]["number"] == 2


def test_when_the_time_of_the_run_is_over_nothing_more_begins(tmp_path: Path) -> None:
    found = one(tmp_path, "add(number=1)", budget=0)
    assert (found["status"], "number" in found) == ("stopped at its limit", False)


def test_what_is_not_here_says_so(tmp_path: Path) -> None:
    absent = Item("pi05", "something", 60, needs="no_such_module", bars=(Bar("a bar", "x", "y", "p50", at_most=1),))
    found = gpu.Run(tmp_path).run([absent])["items"][0]
    assert (found["status"], found["reason"]) == ("not here", "no_such_module is not installed")
    assert found["bars"] == [{"says": "a bar", "found": None, "met": None}]


def test_bars_are_held_against_the_figures() -> None:
    arm = {"name": "pruned", "speed": {"value": 1.9}, "milliseconds": {"p50": 11.0}}
    found = {"jobs": [{"name": "dropped", "report": {"arms": [arm]}}]}

    def met(**bar: Any) -> bool | None:
        item = Item("x", "x", 1, bars=(Bar("says", "dropped", "pruned", **bar),))
        return gpu.judged(item, found, "NVIDIA H100 80GB HBM3")[0]["met"]

    assert met(figure="speed", at_least=2.0) is False
    assert met(figure="speed", at_least=1.9) is True
    assert met(figure="p50", at_most=12.0) is True
    assert met(figure="p50", at_most=10.0) is False
    assert met(figure="p50", at_most=12.0, device="H200") is None
    assert gpu.judged(PLAN[2], found, None)[0]["found"] is None


def test_flags_that_make_no_sense_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps({"dry": True}))
    (tmp_path / "file").write_text("")
    for flags, says in (
        (["--only", "oftt"], "'oftt' is no item; there are correctness, "),
        (["--limit", "oft"], "--limit is oft; it is NAME=SECONDS"),
        (["--limit", "oft=0"], "--limit is oft=0; it is NAME=SECONDS"),
        (["--limit", "oftt=9"], "'oftt' is no item"),
        *((["--budget", budget, "--dry"], "it is a number of seconds above 0") for budget in ("0", "-5", "nan", "inf")),
        (["--out", str(tmp_path / "file"), "--dry"], "which is a file; give a folder."),
        ([], "holds a dry run, and this is none; give another folder."),
    ):
        assert gpu.main(["--out", str(tmp_path), *flags]) == 2
        assert says in capsys.readouterr().err
    assert [item.name for item in chosen(("pi0", "oft"), ("pi0",))] == ["oft"]


@pytest.mark.parametrize("held", ["", "[]", '{"dry": tr', "\udc80"])
@pytest.mark.parametrize("name", ["gpu.json", "items/oft.json"])
def test_a_damaged_file_of_an_earlier_run_is_named_before_anything_runs(
    name: str, held: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(held.encode(errors="surrogateescape"))
    assert gpu.main(["--out", str(tmp_path), "--dry", "--only", "oft"]) == 2
    assert f"{file} cannot be read; move it away" in capsys.readouterr().err
    assert file.read_bytes() == held.encode(errors="surrogateescape")


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "torch finds no CUDA device here; --dry" in capsys.readouterr().err


def test_the_document_is_current() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == rewritten(text), "run: python -m benchmarks.gpu.table"
    assert ("No GPU has run this yet." in text) == (not list(COMMITTED.glob("*/gpu.json")))


def test_nothing_but_what_the_document_names_is_imported(tmp_path: Path) -> None:
    """The command runs without the other packages that vla-pruner can use."""
    absent = ("rich", "scipy", "statsmodels", "PIL", "websockets", "msgpack", "mujoco", "gymnasium", "sentencepiece")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
        "from benchmarks.gpu import __main__, child, table\n"
        f"sys.exit(child.main(['openvla', {str(tmp_path / 'found.json')!r}, '--dry', '--compile-only', 'one']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "found.json").read_text())["compiled"][0]["arms"]


def test_a_dry_run_goes_through_all_of_it(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.gpu.forked", "--out", str(tmp_path), "--dry"]
    done = subprocess.run(words, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    found = json.loads((tmp_path / "gpu.json").read_text())
    states = {item["item"]: (item["status"], item["reason"]) for item in found["items"]}
    assert done.returncode == 0, (states, done.stdout, done.stderr)
    assert list(states) == [item.name for item in PLAN]
    for item, written in zip(PLAN, found["items"], strict=True):
        if item.missing is not None:
            assert written["status"] == "not here"
            continue
        assert written["status"] == "done"
        assert written["conditions"]["versions"]["torch"]
        assert [job["name"] for job in written.get("jobs", [])] == [job.name for job in item.jobs]
        for job in written.get("jobs", []):
            for arm in job["report"]["arms"]:
                assert arm["milliseconds"].keys() >= {"p50", "p90", "p99"}
                assert arm["stages"].keys() >= {"vision", "prefill", "pruning", "decode", "other"}
                assert arm["roofline"]["total"] > 0
                assert arm["reached"] > 0
                assert arm["memory"]["bytes"]
        for bar in written["bars"]:
            # Tiny sizes on a CPU are compared with no bar.
            assert bar["found"] > 0
            assert bar["met"] is None
            assert f"{bar['says']}: {bar['found']:.2f}, {MET[None]}" in done.stdout
    by_name = {item["item"]: item for item in found["items"]}
    assert {test["outcome"] for test in by_name["correctness"]["tests"]} == {"passed"}
    assert by_name[COMPILING]["processes"][0]["jobs"][0]["arms"]["unpruned"]["graphs"] > 0
    assert all(form["forms"] for form in by_name["choosing"]["forms"])
    # The document's tables can be made from it.
    found["conditions"]["device_name"] = "a GPU"
    text = section(found)
    assert f"| oft, dropped | {PLAN[2].bars[0].arm} |" in text
    assert all(f"| {item.name} | not here: {item.missing} |" in text for item in PLAN if item.missing)


def _environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
