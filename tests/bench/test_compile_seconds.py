"""`python -m benchmarks.compile_seconds`: two processes a policy, and what it says of those that cannot be measured."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compile_seconds
from benchmarks.compile_seconds import CACHES, DRY, FORMAT, POLICIES, main


def test_a_dry_run_goes_through_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--dry", "--threads", "1"]) == 0
    record = json.loads((tmp_path / "compile_seconds.json").read_text())
    assert (record["format"], record["backend"], record["conditions"]["threads"]) == (FORMAT, "eager", 1)
    (policy,) = record["policies"]
    assert (policy["name"], policy["status"]) == (DRY[0], "done")
    for process in ("first", "second"):
        found = policy[process]
        assert found["seconds"] == pytest.approx(sum(found["steps"]))
        assert found["programs"] == found["graphs"] == 3, "the prompt's embeddings, and the rest unpruned and pruned"
    table = (tmp_path / "compile_seconds.md").read_text()
    assert table.splitlines()[-1] == capsys.readouterr().out.splitlines()[-1]
    assert [cell.strip() for cell in table.splitlines()[-1].split("|")[1:4]] == ["reference", "3", "3"]


def answers(monkeypatch: pytest.MonkeyPatch, *given: Any) -> list[dict[str, Any]]:
    """Make processes answer with these (exit code, output) or errors; return the environments that they got."""
    left, seen = list(given), []

    def process(words: list[str], env: dict[str, str], **_: Any) -> Any:
        seen.append({name: env[name] for name in CACHES} | {"files": [*Path(env[CACHES[0]]).parent.iterdir()]})
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        Path(env[CACHES[0]]).mkdir(exist_ok=True)
        return subprocess.CompletedProcess(words, answer[0], answer[1], "")

    monkeypatch.setattr(compile_seconds.subprocess, "run", process)
    return seen


def test_the_second_process_finds_what_the_first_left(monkeypatch: pytest.MonkeyPatch) -> None:
    one = json.dumps({"seconds": 1.0})
    seen = answers(monkeypatch, (0, one), (0, one), (0, one), (0, one))
    for _ in range(2):
        assert compile_seconds.both("pi0", "inductor", None, 9)["status"] == "done"
    first, second, third, _ = seen
    assert [bool(one["files"]) for one in seen] == [False, True, False, True]
    assert {name: first[name] for name in CACHES} == {name: second[name] for name in CACHES}
    assert first[CACHES[0]] != third[CACHES[0]]


@pytest.mark.parametrize(
    ("answer", "says", "code"),
    [
        ((3, "lerobot is not installed.\n"), "not here: lerobot is not installed.", 0),
        ((1, "Traceback\nRuntimeError: no compiler\n"), "failed: RuntimeError: no compiler", 1),
        ((-9, ""), "failed: exit code -9", 1),
        (subprocess.TimeoutExpired("x", 5), "its first process took more than 5 s", 1),
    ],
)
def test_what_cannot_be_measured_says_so(
    answer: Any, says: str, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compile_seconds, "machine_conditions", lambda _: {})
    answers(monkeypatch, answer)
    assert main(["--out", str(tmp_path), "--only", "pi0", "--limit", "5"]) == code
    assert (tmp_path / "compile_seconds.md").read_text().splitlines()[-1].startswith(f"| pi0 | {says} |")


def test_flags_that_are_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for flags, says in (
        ([], "--out is missing"),
        (["--out", str(tmp_path / "file")], "file"),
        (["--out", str(tmp_path), "--threads", "0"], "--threads is a whole number"),
        (["--out", str(tmp_path), "--limit", "nan"], "--limit a number of seconds"),
        (["--out", str(tmp_path), "--dry", "--only", "pi0"], "--dry runs one policy, without inductor"),
        (["--out", str(tmp_path), "--dry", "--backend", "eager"], "leave --only and --backend out"),
    ):
        assert main(flags) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--only", "pi0,pi9"])
    assert "'pi9' is none of reference" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = " ".join(capsys.readouterr().out.split())
    assert all(name in listed for name in POLICIES)


def test_a_policy_that_cannot_be_built_is_not_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vla_pruner.families.lerobot_common import metadata

    version = metadata.version

    def absent(name: str) -> str:
        if name == "lerobot":
            raise metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert main(["--child", "lerobot-pi0"]) == compile_seconds.NOT_HERE
    assert capsys.readouterr().out.startswith("lerobot is not installed.")


def test_every_policy_with_random_weights_is_measured() -> None:
    assert {"reference", "openvla", "openvla-oft", "pi0", "lerobot-smolvla", "lerobot-groot"} <= set(POLICIES)
