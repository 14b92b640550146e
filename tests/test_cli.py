"""The command line: help, exit codes, and one line on stderr for wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils.logging import is_progress_bar_enabled

import vla_pruner as vp
from vla_pruner import cli
from vla_pruner.auditing.report import AuditReport, Check
from vla_pruner.demo import DemoError, DemoSettings
from vla_pruner.simulators.metaworld import SimulatorUnavailable


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[DemoSettings]:
    """Replace the demo by one that only notes its settings."""
    seen: list[DemoSettings] = []

    def note(settings: DemoSettings, _: Any) -> int:
        seen.append(settings)
        return 0

    monkeypatch.setattr("vla_pruner.demo.run_demo", note)
    return seen


def test_flags_reach_the_demo(asked: list[DemoSettings], tmp_path: Path) -> None:
    flags = [
        "--tasks",
        "reach, push",
        "--episodes",
        "3",
        "--keep",
        ".5",
        "--seed",
        "9",
        "--out",
        str(tmp_path),
        "--quick",
    ]
    assert cli.main(["demo", *flags]) == 0
    assert asked == [
        DemoSettings(tasks=("reach", "push"), episodes=3, keep=0.5, seed=9, out=tmp_path, quick=True, weights=None)
    ]


def test_defaults_are_the_settings_own(asked: list[DemoSettings]) -> None:
    assert cli.main(["demo"]) == 0
    assert asked == [DemoSettings()]


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("demo", "tasks episodes keep seed out quick weights compile"),
        (
            "audit",
            "random-weights size method keep layer pruned device dtype seed instruction option details json",
        ),
    ],
)
def test_help_shows_every_flag_with_its_default(command: str, flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in (f"--{name}" for name in flags.split()):
        described = text.split(f"\n  {flag}", 1)[1]
        assert "(default" in described.split("\n  --")[0], flag


@pytest.mark.parametrize(
    "flags",
    [
        ["demo", "--episodes", "many"],
        ["demo", "--keep"],
        ["demo", "--nonsense"],
        ["demo", "--keep", "x"],
        ["audit"],
        ["audit", "x", "--keep", "half"],
        ["audit", "x", "--size", "huge"],
        ["audit", "x", "--option", "y"],
        ["fly"],
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--help" in error


def test_an_unknown_flag_names_the_help_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    for given, named in (
        (["serve", "--policy", "x", "--encoder-keep", ".5"], "vla-pruner serve"),
        (["report", "x", "y"], "vla-pruner report"),
        (["--nonsense"], "vla-pruner"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(given)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{named}: unrecognized arguments: ")
        assert error.endswith(f"; see {named} --help\n")


@pytest.mark.parametrize("command", [["audit", "x"], ["bench", "--model", "pi0"]])
def test_a_wrong_keep_is_told_what_keep_means(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("abc", "1/2", "²"):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, "--keep", wrong])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert "argument --keep: " in error
        assert f"{wrong!r} is neither a fraction of the visual tokens, such as 0.25, nor a number" in error
        assert "_keep" not in error


@pytest.mark.parametrize("command", ["", "demo", "audit", "bench", "eval", "report", "calibrate", "serve", "env"])
@pytest.mark.parametrize("columns", [80, 200])
def test_help_fits_the_terminal(
    columns: int, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= min(columns, 120)
    if command == "eval":  # parts that a blank line separates in a help text are on lines of their own
        presets = [line.split(":")[0].strip() for line in lines if line.startswith(24 * " ")]
        assert {"smoke", "quick", "standard", "freeze-vs-drop"} <= set(presets)
    assert not [line for line in lines if line.endswith("-") and " --" not in line]  # no name is split


def test_no_command_is_the_help_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    both = capsys.readouterr()
    assert both.out == ""
    assert both.err.startswith("usage: vla-pruner")
    for name in ("demo", "audit", "bench"):
        assert f"\n    {name} " in both.err


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"vla-pruner {vp.__version__}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
    ]


@pytest.mark.parametrize(
    ("enabled", "environment", "shown"), [(True, None, False), (False, None, False), (True, False, True)]
)
def test_weights_load_without_a_progress_bar_and_downloads_with_theirs(
    enabled: bool, environment: bool | None, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", enabled)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", environment)
    inside: list[tuple[bool, bool]] = []

    def look(*_: Any) -> int:
        inside.append((is_progress_bar_enabled(), are_progress_bars_disabled()))
        raise DemoError("no")

    monkeypatch.setattr("vla_pruner.demo.run_demo", look)
    assert cli.main(["demo"]) == 2
    assert inside == [(shown, False)]
    assert is_progress_bar_enabled() is enabled, "as it was, though the command failed"


@pytest.mark.parametrize(
    "error",
    [
        DemoError("Unknown task fly;\n the policy knows: reach."),
        SimulatorUnavailable("MuJoCo cannot draw", "apt-get install libegl1"),
    ],
)
def test_errors_on_purpose_are_one_line_and_exit_code_2(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> int:
        raise error

    monkeypatch.setattr("vla_pruner.demo.run_demo", fail)
    monkeypatch.setattr("sys.unraisablehook", sys.unraisablehook)
    assert cli.main(["demo"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("vla-pruner: ")


def test_ctrl_c_outside_of_the_demo_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("vla_pruner.demo.run_demo", interrupt)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


@pytest.mark.parametrize("module", ["vla_pruner", "vla_pruner.cli"])
def test_the_command_is_installed_and_refuses_for_real(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", module, "demo", "--keep", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "vla-pruner: --keep is 2.0; it is a fraction of the visual tokens, above 0 and up to 1."
    ]


AUDIT = ["audit", "reference", "--random-weights"]


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Replace the audit by one that notes its arguments, and finds a failure if 9 tokens are kept."""
    seen: list[tuple[Any, Any]] = []

    def note(policy: Any, method: Any, *, instruction: Any, seed: int, progress: Any) -> AuditReport:
        seen.append((policy, method))
        print("a library has something to say")
        checks = (
            Check("images", method.keep != 9, "black - white 0.5", "what this means"),
            Check("scenes", None, "", "not asked"),
        )
        for check in checks:
            progress(check)
        return AuditReport(type(policy).__name__, repr(method), {"seconds": 0.1, "seed": seed}, checks)

    monkeypatch.setattr("vla_pruner.auditing.command.audit", note)
    return seen


def test_audit_flags_reach_the_audit(audited: list[tuple[Any, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--method", "random", "--keep", "8", "--layer", "2", "--pruned", "freeze", "--dtype", "bfloat16"]
    assert cli.main([*AUDIT, *flags]) == 0
    ((policy, method),) = audited
    assert method == vp.RandomKeep(keep=8, layer=2, pruned="freeze")
    assert policy.dtype == torch.bfloat16
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["ok", "images", "black", "-", "white", "0.5"]
    assert lines[2].split() == ["skip", "scenes", "not", "asked"]
    assert lines[3].startswith("All 1 checks passed, 1 skipped, in 0.1 s: ReferencePolicy with RandomKeep(")


def test_audit_defaults_are_the_methods_own(audited: list[tuple[Any, Any]]) -> None:
    assert cli.main(AUDIT) == 0
    assert audited[0][1] == vp.VLAPruner()


def test_a_failed_check_is_exit_code_1(audited: list[tuple[Any, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*AUDIT, "--keep", "9"]) == 1
    text = capsys.readouterr().out
    assert "FAIL images" in text
    assert "what this means" in text
    assert "1 of 1 checks failed, 1 skipped, in 0.1 s: images." in text


def test_audit_report(audited: list[tuple[Any, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert cli.main([*AUDIT, "--keep", "9", "--json", str(file)]) == 1
    report = json.loads(file.read_text())
    assert (report["model"], report["random_weights"], report["size"]) == ("reference", True, "tiny")
    assert report["passed"] is False
    assert report["checks"][0]["figure"] == "black - white 0.5"
    capsys.readouterr()
    assert cli.main([*AUDIT, "--json", "-"]) == 0
    both = capsys.readouterr()
    assert json.loads(both.out)["passed"] is True, "nothing else is on standard output"
    assert "All 1 checks passed" in both.err


def test_audit_options_of_a_checkpoint(audited: list[tuple[Any, Any]], golden: Path) -> None:
    folder = str(golden / "transformers_pi0_tiny")
    assert cli.main(["audit", folder, "--option", "cameras=left, right", "--option", "attn_implementation=eager"]) == 0
    assert audited[0][0].cameras == ("left", "right")
    assert audited[0][0].module.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["openvla"], "Without a checkpoint: --random-weights."),
        (["gpt", "--random-weights"], "with random weights there are reference, reference-chunk"),
        (["reference", "--size", "tiny"], "--size is for --random-weights"),
        ([*AUDIT[1:], "--option", "a=b"], "--option is for checkpoints"),
        ([*AUDIT[1:], "--keep", "2.0"], "keep=2.0 was given"),
        ([*AUDIT[1:], "--layer", "6"], "the decoder has 6 layers"),
        ([*AUDIT[1:], "--device", "abacus"], "--device is abacus"),
        ([*AUDIT[1:], "--json", "no/such/folder/x.json"], "no such folder"),
        ([*AUDIT[1:], "--json", "."], "--json is ., which is a folder"),
        ([*AUDIT[1:], "--json", ""], "--json is empty, which is a folder"),
        ([*AUDIT[1:], "--json", "x" * 300], "cannot be written (File name too long)"),
        ([*AUDIT[1:], "--seed", "-1"], "seed=-1 was given; it is an int from 0"),
        (["reference", "--seed", "-1"], "seed=-1 was given; it is an int from 0"),
        ([*AUDIT[1:], "--seed", "99999999999999999999"], "it is an int from 0 to 4294967295"),
        ([*AUDIT[1:], "--instruction", ""], "The instruction is empty"),
        ([*AUDIT[1:], "--instruction", " "], "The instruction is empty"),
        ([*AUDIT[1:], "--instruction", "juggle"], "words it was never trained on: juggle"),
    ],
)
def test_audit_refusals_are_one_line_and_exit_code_2(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["audit", *flags]) == 2
    both = capsys.readouterr()
    assert both.out == ""
    assert both.err.count("\n") == 1
    assert both.err.startswith("vla-pruner: ")
    assert message in both.err


@pytest.mark.parametrize("file", ["folder", "unwritable.json"])
def test_the_report_can_be_written_or_nothing_runs(
    file: str, audited: list[tuple[Any, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "unwritable.json").touch(mode=0o400)
    real = Path.open

    def open_as_a_user(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if path.name == "unwritable.json" and mode != "r":  # root may write files that are read-only
            raise PermissionError(13, "Permission denied")
        return real(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", open_as_a_user)
    assert cli.main([*AUDIT, "--json", str(tmp_path / file)]) == 2
    assert audited == []


def test_looking_whether_a_report_can_be_written_changes_nothing(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("an older report")
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "new.json")
    for file in ("old.json", "new.json", "link.json"):
        assert cli.main(["audit", "nowhere", "--json", str(tmp_path / file)]) == 2
    assert sorted(tmp_path.iterdir()) == [link, old]
    assert old.read_text() == "an older report"
    assert link.is_symlink()


def test_a_disk_that_is_full_at_the_end_is_one_line(
    audited: list[tuple[Any, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    assert cli.main([*AUDIT, "--json", "/dev/full"]) == 2
    assert len(audited) == 1, "a device is not opened before"
    assert "cannot be written (No space left on device)" in capsys.readouterr().err


def test_names_of_random_weights_are_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", "gpt", "--random-weights"]) == 2
    listed = capsys.readouterr().err.strip().rstrip(".").split("there are ")[1].split(", ")
    assert "lerobot-smolvla" in listed
    assert "smolvla" not in listed
    with pytest.raises(SystemExit):
        cli.main(["audit", "--help"])
    assert f"{', '.join(listed[:-1])} or {listed[-1]}" in " ".join(capsys.readouterr().out.split())


def test_the_other_name_of_smolvla_is_understood(
    audited: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vla_pruner.policies import lerobot_random, random

    monkeypatch.setattr(lerobot_random, "random_smolvla", random.random_reference)
    assert cli.main(["audit", "smolvla", "--random-weights"]) == 0
    assert len(audited) == 1


def test_the_audit_for_real(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*AUDIT, "--method", "random", "--details"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "ok vision towers 1 x 1 images a step" in text
    assert "ceiling for every method" in text
    assert "All 12 checks passed, 2 skipped" in text


ANY = {
    "demo": ["demo"],
    "audit": ["audit", "reference"],
    "bench": ["bench", "--model", "llama:64,6"],
    "eval": ["eval", "--policy", "reference", "--suite", "metaworld:mt8", "--out", "folder"],
    "report": ["report", "folder"],
    "calibrate": ["calibrate", "--policy", "reference", "--from", "folder"],
    "serve": ["serve", "--policy", "reference"],
}
RUNS = {
    "demo": "vla_pruner.demo.run_demo",
    "audit": "vla_pruner.auditing.command.run_audit",
    "bench": "vla_pruner.benching.command._run",
    "eval": "vla_pruner.evaluation.command.run_eval",
    "report": "vla_pruner.report.command.run_report",
    "calibrate": "vla_pruner.calibration.command.run_calibrate",
    "serve": "vla_pruner.serving.command._check_installed",
}


@pytest.mark.parametrize("command", list(ANY))
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "a/b"), "a/b cannot be used (No such file or directory)."),
        (OSError(28, "No space left on device"), "A file or a connection cannot be used (No space left on device)."),
        (OSError(18, "Invalid cross-device link", "a", None, "b"), "a to b cannot be used (Invalid"),
        (ConnectionError("the hub hung up"), "A file or a connection cannot be used (the hub hung up)."),
    ],
)
def test_whatever_the_system_refuses_is_one_line(
    command: str, error: OSError, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(RUNS[command], fail)
    assert cli.main(ANY[command]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"vla-pruner: {said}")
    assert printed.count("\n") == 1


def test_a_reader_that_has_gone_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(RUNS["audit"], fail)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    assert cli.main(ANY["audit"]) == 1
    assert capsys.readouterr().err == ""
