"""`vla-pruner eval` from its flags."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.evaluation.fakes import find_fake
from vla_pruner import cli
from vla_pruner.errors import VLAPrunerError
from vla_pruner.evaluation import EvalSettings, PolicySource
from vla_pruner.evaluation.command import run_eval
from vla_pruner.simulators import find_suite


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[EvalSettings]:
    """Replace the run by one that only notes its settings."""
    seen: list[EvalSettings] = []

    def note(settings: EvalSettings, _: Any) -> int:
        seen.append(settings)
        return 0

    monkeypatch.setattr("vla_pruner.evaluation.command.run_eval", note)
    return seen


def test_flags_reach_the_settings(asked: list[EvalSettings], tmp_path: Path) -> None:
    text = (
        "eval --policy CKPT --suite libero,metaworld:mt6 --tasks 0,push --preset standard --episodes 7 --first 9 "
        "--seed 3 --method vla-pruner:unseen=carry,fastv --keep .5,64 --layer 2,3 --pruned drop,freeze "
        "--controls again,random --margin 5 --horizon 8 --max-steps 99 --max-errors 4 --shard 2/4 --ray auto "
        "--workers 3 --device cuda --dtype bfloat16 --option unnorm_key=libero_object --option cameras=a,b "
        f"--suite-option assets=/x --out {tmp_path}"
    )
    assert cli.main(text.split()) == 0
    assert asked == [
        EvalSettings(
            policy=PolicySource(
                "CKPT",
                device="cuda",
                dtype="bfloat16",
                options={"unnorm_key": "libero_object", "cameras": ("a", "b")},
            ),
            suites=("libero", "metaworld:mt6"),
            out=tmp_path,
            tasks=("0", "push"),
            preset="standard",
            episodes=7,
            max_steps=99,
            first=9,
            seed=3,
            methods=("vla-pruner:unseen=carry", "fastv"),
            keep=(0.5, 64),
            layer=(2, 3),
            pruned=("drop", "freeze"),
            controls=("again", "random"),
            margin=0.05,
            horizon=8,
            shard=(2, 4),
            max_errors=4,
            suite_options={"assets": "/x"},
            ray="auto",
            workers=3,
        )
    ]


def test_defaults_are_the_settings_own(asked: list[EvalSettings], tmp_path: Path) -> None:
    cli.main(["eval", "--policy", "reference", "--suite", "metaworld:mt6", "--out", str(tmp_path)])
    cli.main(["eval", "--policy", "reference", "--suite", "a", "--out", "x", "--ray", "--controls", "none"])
    assert asked[0] == EvalSettings(PolicySource("reference"), ("metaworld:mt6",), tmp_path)
    assert (asked[1].ray, asked[1].controls) == ("local", ())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--suite metaworld:mt6", "--policy and --suite say what to run"),
        ("--policy reference --suite mars", "There is no suite 'mars'; the suites are libero_spatial"),
        ("--policy reference --suite metaworld:mt6 --keep lots", "'lots' is no list of values"),
        ("--policy reference --suite metaworld:mt6 --keep 1.5", "keep=1.5 was given"),
        ("--policy reference --suite metaworld:mt6 --encoder-keep 1.5", "keep=1.5 was given; of a vision encoder"),
        ("--policy reference --suite metaworld:mt6 --encoder-refresh 4", "--encoder-refresh is for --encoder-keep"),
        ("--policy expert --suite metaworld:mt6 --encoder-keep .5", "--policy is expert, which sees no images"),
        ("--policy reference --suite metaworld:mt6 --shard 5", "'5' is no part such as 2/4"),
        ("--policy reference --suite metaworld:mt6 --shard ²/4", "'²/4' is no part such as 2/4"),
        ("--policy reference --suite metaworld:mt6 --workers 2", "--workers is for --ray; give --ray too"),
        ("--policy reference --suite metaworld:mt6 --method magic", "--method is magic"),
        ("--policy expert --suite metaworld:mt6 --method fastv", "--policy is expert, which sees no images"),
        ("--merge /nowhere/at/all", "holds no evaluation"),
        ("--merge a b --policy reference", "--merge does not read --policy"),
        ("--merge /nowhere/at/all --merge .", "/nowhere/at/all holds no evaluation"),
        ("--policy x --option a=1 --option a=2", "argument --option: a was given twice; give it once"),
        ("--policy x --suite-option a=1 --suite-option a=2", "argument --suite-option: a was given twice"),
    ],
)
def test_wrong_input_is_one_line(flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = cli.main(["eval", *flags.split(), "--out", str(tmp_path / "out")])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert said.startswith("vla-pruner")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--suite", "libero_nowhere"), "libero_nowhere"),
        (("--suite", "fake", "--layer", "40"), "layer=40 was given"),
    ],
)
def test_a_run_that_cannot_begin_leaves_no_folder(
    flags: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"--policy": "reference:autoregressive", "--controls": "none", "--out": str(tmp_path / "run")}
    given = [*flags, *(word for pair in options.items() for word in pair)]
    settings: list[EvalSettings] = []
    monkeypatch.setattr("vla_pruner.evaluation.command.run_eval", lambda one, console: settings.append(one) or 0)
    assert cli.main(["eval", *given]) == 0
    monkeypatch.undo()
    for there in (False, True):
        if there:
            (tmp_path / "run").mkdir()
        with pytest.raises(VLAPrunerError, match=message):
            run_eval(settings[0], Console(quiet=True), find_fake if "fake" in flags else find_suite)
        assert (tmp_path / "run").exists() == there


def test_help_shows_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "10 episodes a task and arm: a look, not for claims" in " ".join(text.split())
    required = ("policy", "suite", "out", "merge")
    for flag in text.split("\n  --")[1:]:
        name = flag.split()[0]
        assert name in required or "(default" in flag, name


def test_the_command_line_starts_without_scipy_and_simulators() -> None:
    check = """
import sys
from contextlib import suppress
from vla_pruner import cli

heavy = {"scipy", "statsmodels", "mujoco", "metaworld", "ray", "libero"}
for command in ([], ["report"], ["serve"], ["demo"], ["audit"], ["bench"], ["eval"], ["calibrate"]):
    with suppress(SystemExit):
        cli.main([*command, "--help"])
    if not command:
        assert "torch" not in sys.modules, "the list of commands is printed at once"
cli.main(["--version"])
sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
