"""Flags that do not go together are refused: none is passed over in silence."""

from __future__ import annotations

import pytest

from vla_pruner import cli
from vla_pruner.simulators.libero_names import check_read

CHECKPOINT = ("--policy", "nowhere")
DRAWN = ("--policy", "openvla", "--random-weights")


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "--suite", "libero_object", "--out", "run"),
        ("calibrate", "--from", "traces"),
        ("serve",),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((*CHECKPOINT, "--size", "full"), "--size is for --random-weights"),
        ((*DRAWN, "--option", "unnorm_key=libero"), "--option is for checkpoints"),
    ],
    ids=["size", "option"],
)
def test_flags_about_weights_that_say_nothing(
    command: tuple[str, ...], flags: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, *flags]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "command", [("calibrate", "--from", "traces"), ("serve", "--port", "0")], ids=lambda command: command[0]
)
def test_a_family_that_is_named_in_place_of_a_checkpoint(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "--policy", "openvla"]) == 2
    assert "Without a checkpoint: --random-weights." in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("command", "unread"),
    [
        (("eval", "--out", "whole", "--merge", "a", "b", "--keep", "0.5", "--policy", "x"), "--policy, --keep"),
        (("eval", "--out", "whole", "--merge", "a", "b", "--option", "unnorm_key=x"), "--option"),
        (("calibrate", "--results", "found.json", "--tolerance", "0.1", "--keep", "0.5"), "--keep"),
        (("calibrate", "--results", "found.json", "--against", "run", "--from", "x", "--camera", "a=b"), "--from"),
    ],
)
def test_flags_that_a_mode_does_not_read(
    command: tuple[str, ...], unread: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(list(command)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"does not read {unread}" in said
    assert "leave" in said


def test_a_mode_with_what_it_reads_goes_on_to_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--out", "whole", "--merge", "a", "b", "--quiet", "--no-color"]) == 2
    assert "does not read" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("suites", "given", "readers"),
    [
        ("libero", "strength=0.5", "strength is read by BASE:camera, BASE:light alone"),
        ("libero_object:background,libero_object_lan", "strength=0.5", "strength is read by BASE:camera, BASE:light"),
        (
            "libero_object,libero_object:light",
            "pro=folder",
            "pro is read by BASE_swap, BASE_object, BASE_lan",
        ),
    ],
)
def test_an_option_that_no_suite_of_the_run_reads(
    suites: str, given: str, readers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "--policy", "expert", "--suite", suites, "--suite-option", given, "--out", "run"]) == 2
    assert readers in " ".join(capsys.readouterr().err.split())


def test_an_option_that_one_suite_of_the_run_reads() -> None:
    names = ("libero_object", "libero_object:camera", "libero_object_swap")
    check_read(("strength", "pro", "seed"), names)
