"""Flags that do not go together are refused: none is passed over in silence."""

from __future__ import annotations

import pytest

from vla_pruner import cli

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
