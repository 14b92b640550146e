"""Runs survive kills, cut lines, full disks, damaged and doubled records, two runs at once, and merging."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.evaluation.fakes import settings
from tests.evaluation.test_run import facts, run
from vla_pruner.evaluation import EvaluationError, merge, read_records
from vla_pruner.evaluation.command import run_merge
from vla_pruner.evaluation.manifest import FORMAT, Manifest
from vla_pruner.evaluation.records import EPISODES, Record, RecordFile, latest, write_json
from vla_pruner.evaluation.records import FORMAT as FORMAT_OF_RECORDS

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from tests.evaluation.fakes import settings
from tests.evaluation.test_run import run
sys.exit(run(settings(Path(sys.argv[1]), episodes=8, suite_options={"pause": 0.02}))[0])
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], env=environment, cwd=ROOT)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(settings(whole, episodes=8, suite_options={"pause": 0.02}))[0] == 0
    process = start(killed)
    deadline = time.monotonic() + 120
    while not (killed / EPISODES).exists() or (killed / EPISODES).read_bytes().count(b"\n") < 5:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    done = read_records(killed / EPISODES)
    assert 5 <= len(done) < 48
    assert not (killed / "eval_info.json").exists()
    assert start(killed).wait(120) == 0
    assert read_records(killed / EPISODES)[: len(done)] == done, "what was finished stays"
    assert facts(killed) == facts(whole)
    before, after = (json.loads((folder / "eval_info.json").read_text())["arms"] for folder in (whole, killed))
    assert [arm["overall"]["pc_success"] for arm in before.values()] == [
        arm["overall"]["pc_success"] for arm in after.values()
    ]


def test_a_cut_line_is_noticed_and_gone(tmp_path: Path) -> None:
    run(settings(tmp_path, episodes=1))
    content = (tmp_path / EPISODES).read_bytes()
    for cut in (1, 30, 200):
        (tmp_path / EPISODES).write_bytes(content[:-cut])
        with RecordFile(tmp_path / EPISODES) as file:
            assert (len(file.records), file.torn > 0) == (5, True)
        assert (tmp_path / EPISODES).read_bytes() == content[: content[:-1].rfind(b"\n") + 1]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda line: line[:40] + b"\x00\x00" + line[42:], "JSON|control character|Expecting"),
        (lambda line: b"", "Expecting value"),
        (lambda line: b"[1]", "it holds no record"),
        (lambda line: line.replace(b'"success": ', b'"success": 1'), "delimiter"),
        (
            lambda line: line.replace(b": true", b": 1").replace(b": false", b": 0"),
            "success is [01], not true",
        ),
        (lambda line: line.replace(b'"steps"', b'"stepz"'), "the fields steps are missing"),
        (lambda line: line.replace(b'"format": 1', b'"format": 2'), "its format is 2, and this version .* reads 1"),
        (lambda line: line.replace(b'"format": 1', b'"format": true'), "its format is True"),
        (lambda line: line.replace(b'"termination": "', b'"termination": "x'), "its termination is"),
    ],
)
def test_a_damaged_line_is_named_and_nothing_is_changed(
    tmp_path: Path, damage: Callable[[bytes], bytes], why: str
) -> None:
    run(settings(tmp_path, episodes=1))
    lines = (tmp_path / EPISODES).read_bytes().split(b"\n")
    lines[2] = damage(lines[2])
    (tmp_path / EPISODES).write_bytes(b"\n".join(lines))
    with pytest.raises(EvaluationError, match=f"(?s)Line 3 of .*episodes.jsonl is damaged .*({why})") as refused:
        run(settings(tmp_path, episodes=1))
    assert "\n" not in str(refused.value)
    assert (tmp_path / EPISODES).read_bytes() == b"\n".join(lines)


def published() -> list[Path]:
    return sorted((ROOT / "benchmarks" / "results").rglob(f"{EPISODES}*"))


@pytest.mark.parametrize("path", published(), ids=lambda path: path.parent.name)
def test_the_runs_published_so_far_are_read(path: Path) -> None:
    content = path.read_bytes()
    lines = (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines()[:1000]
    assert lines
    for line in lines:
        record = Record.from_line(line)
        again = json.loads(record.to_line())
        assert again["format"] == FORMAT_OF_RECORDS
        # Older records do not say their format.
        assert {"format": FORMAT_OF_RECORDS, **json.loads(line)}.items() <= again.items()
    manifest = Manifest.read(path.parent)
    assert {Record.from_line(line).run for line in lines} == {manifest.run}


def test_fields_of_later_versions_are_kept_and_those_of_none_have_their_default(tmp_path: Path) -> None:
    run(settings(tmp_path, episodes=1))
    line = json.loads((tmp_path / EPISODES).read_bytes().splitlines()[0])
    record = Record.from_line(json.dumps({**line, "weather": ["rain"], "others": 1}).encode())
    assert record.others == {"weather": ["rain"], "others": 1}
    assert json.loads(record.to_line()) == {**line, "weather": ["rain"], "others": 1}
    older = {name: value for name, value in line.items() if name not in ("format", "versions", "worker", "seconds")}
    record = Record.from_line(json.dumps(older).encode())
    assert (record.versions, record.worker, record.seconds) == ({}, "", 0.0)


def test_a_run_with_records_of_an_earlier_and_a_later_version_goes_on(tmp_path: Path) -> None:
    run(settings(tmp_path, episodes=1))
    lines = [json.loads(line) for line in (tmp_path / EPISODES).read_bytes().splitlines()]
    del lines[0]["format"]
    lines[1]["weather"] = "rain"
    (tmp_path / EPISODES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(settings(tmp_path, episodes=2))[0] == 0
    records = read_records(tmp_path / EPISODES)
    assert len(records) == 12
    assert records[1].others == {"weather": "rain"}


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    asked = settings(tmp_path)
    run(settings(tmp_path / "whole"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # Room for some records, and for a part of the next one.
        resource.setrlimit(resource.RLIMIT_FSIZE, (7000, hard))
        with pytest.raises(EvaluationError, match=r"the disk is full.*are safe: make room and give the same") as full:
            run(asked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    content = (tmp_path / EPISODES).read_bytes()
    assert content.endswith(b"\n"), "no part of a record is left"
    count = len(read_records(tmp_path / EPISODES))
    assert 0 < count < 18
    assert f"The {count} episodes before are safe" in str(full.value)
    code, said = run(asked)
    assert code == 0
    assert "cut off" not in said
    assert facts(tmp_path) == facts(tmp_path / "whole")


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(EvaluationError, match=r"a.json cannot be written .the disk is full."):
            write_json(tmp_path / "a.json", {"a": "x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    with RecordFile(tmp_path / EPISODES), pytest.raises(EvaluationError, match="Another run is writing"):
        RecordFile(tmp_path / EPISODES)
    RecordFile(tmp_path / EPISODES).close()


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EvaluationError, match="cannot be made"):
        run(settings(tmp_path / "file" / "out"))
    run(settings(tmp_path / "out", episodes=1))
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(EvaluationError, match=r"holds 6 episodes, but .*run.json is missing"):
        run(settings(tmp_path / "out", episodes=1))
    (tmp_path / "out" / "run.json").write_text('{"format": ')
    with pytest.raises(EvaluationError, match=r"run.json is damaged"):
        run(settings(tmp_path / "out", episodes=1))
    (tmp_path / "out" / "run.json").write_text(json.dumps({"format": FORMAT, "identity": {}}))
    with pytest.raises(EvaluationError, match=r"run.json is damaged \(plan is missing\)"):
        run(settings(tmp_path / "out", episodes=1))


@pytest.mark.parametrize("content", ["[]", "{}", '"x"', "null", '{"format": ["?"]}', '{"format": "vla-pruner eval 9"}'])
def test_a_run_of_another_program_is_named_before_anything_is_made(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"is no run of this version .*give the --out of one, or a new folder"):
        run(settings(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == content


def test_a_record_counts_once(tmp_path: Path) -> None:
    run(settings(tmp_path, episodes=1))
    content = (tmp_path / EPISODES).read_bytes()
    (tmp_path / EPISODES).write_bytes(content + content.splitlines(keepends=True)[1])
    with pytest.raises(EvaluationError, match="holds two records of unpruned-again on fake task 0"):
        run(settings(tmp_path, episodes=1))


def test_a_finished_episode_outlives_its_crashes(tmp_path: Path) -> None:
    run(settings(tmp_path, episodes=1))
    done = read_records(tmp_path / EPISODES)[0]
    crashed = type(done)(**{**vars(done), "success": None, "termination": "error"})
    for order in ([done, crashed], [crashed, done], [crashed, done, crashed], [crashed, crashed, done]):
        assert latest(order, "here") == {done.key: done}
    assert latest([crashed, crashed], "here") == {done.key: crashed}


def test_shards_merge_into_the_whole(tmp_path: Path) -> None:
    run(settings(tmp_path / "whole"))
    for number in (1, 2):
        run(settings(tmp_path / str(number), shard=(number, 2)))
    merged = merge([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    assert len(merged.records) == 18
    whole = {json.dumps(record, sort_keys=True, default=str) for record in facts(tmp_path / "whole")}
    assert {json.dumps(record, sort_keys=True, default=str) for record in facts(tmp_path / "merged")} == whole
    code, said = run(settings(tmp_path / "merged"))
    assert code == 0
    assert "18 of 18 episodes are done" in said


@pytest.mark.parametrize("file", ["episodes.jsonl.new", "run.json.new"])
def test_a_merge_that_met_a_full_disk_is_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    run(settings(tmp_path / "whole", episodes=1))
    opened = Path.open

    def full(path: Path, *args: Any, **options: Any) -> Any:
        if path == tmp_path / "merged" / file:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(EvaluationError, match=r"the disk is full.*make room and give the same command again"):
            merge([tmp_path / "whole"], tmp_path / "merged")
    assert list((tmp_path / "merged").iterdir()) == []
    assert merge([tmp_path / "whole"], tmp_path / "merged").left() == []


def test_suites_and_further_initial_states_merge(tmp_path: Path) -> None:
    run(settings(tmp_path / "a", episodes=2))
    run(settings(tmp_path / "b", episodes=1, first=2))
    assert merge([tmp_path / "b", tmp_path / "a"], tmp_path / "ab").left() == []
    run(settings(tmp_path / "c", suites=("other",)))
    both = merge([tmp_path / "ab", tmp_path / "c"], tmp_path / "abc")
    assert both.left() == []
    assert {task.suite for task in both.manifest.plan.tasks} == {"fake", "other"}
    run(settings(tmp_path / "d", episodes=1, first=7))
    with pytest.raises(EvaluationError, match="initial states 0 to 1, 7 to 7, which do not add up"):
        merge([tmp_path / "a", tmp_path / "d"], tmp_path / "ad")


def test_a_merge_that_extends_a_run_says_so_as_a_run_extended_in_place_does(tmp_path: Path) -> None:
    run(settings(tmp_path / "place", episodes=2))
    _, place = run(settings(tmp_path / "place", episodes=3))
    (told,) = (line for line in place.splitlines() if "after a first look (at 2 a task)" in line)
    run(settings(tmp_path / "a", episodes=2))
    for number in (1, 2):
        run(settings(tmp_path / f"b{number}", episodes=1, first=2, shard=(number, 2)))
    run(settings(tmp_path / "c", episodes=1, first=3))
    folders = [tmp_path / name for name in ("b2", "a", "b1")]
    assert merge(folders, tmp_path / "ab").manifest == Manifest.read(tmp_path / "place")
    said = io.StringIO()
    run_merge(folders, tmp_path / "again", Console(file=said, width=200, highlight=False))
    assert told in said.getvalue().splitlines()
    for more in ([tmp_path / "ab", tmp_path / "c"], [*folders, tmp_path / "c"]):
        assert merge(more, tmp_path / f"{len(more)}").manifest.extended == (2, 3)
    assert merge(folders[::2], tmp_path / "b").manifest.extended == ()


def test_a_part_merges_and_is_completed(tmp_path: Path) -> None:
    run(settings(tmp_path / "1", shard=(1, 2)))
    merged = merge([tmp_path / "1"], tmp_path / "merged")
    assert sum(len(arms) for _, arms in merged.left()) == 9
    assert run(settings(tmp_path / "merged"))[0] == 0
    run(settings(tmp_path / "whole"))
    key = lambda record: json.dumps(record, sort_keys=True, default=str)  # noqa: E731
    assert sorted(facts(tmp_path / "merged"), key=key) == sorted(facts(tmp_path / "whole"), key=key)


def test_what_does_not_belong_together_is_not_merged(tmp_path: Path) -> None:
    run(settings(tmp_path / "a", episodes=1))
    run(settings(tmp_path / "again", episodes=1))
    run(settings(tmp_path / "seed", episodes=1, seed=1))
    with pytest.raises(EvaluationError, match="holds two records of unpruned on fake task 0"):
        merge([tmp_path / "a", tmp_path / "again"], tmp_path / "out")
    with pytest.raises(EvaluationError, match=r"was run with other settings than .*seed: 0, not 1"):
        merge([tmp_path / "a", tmp_path / "seed"], tmp_path / "out")
    with pytest.raises(EvaluationError, match="names a folder twice"):
        merge([tmp_path / "a", tmp_path / "again" / ".." / "a"], tmp_path / "out")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    for nowhere in ("nowhere", "round"):
        with pytest.raises(EvaluationError, match="holds no evaluation"):
            merge([tmp_path / "a", tmp_path / nowhere], tmp_path / "out")
    with pytest.raises(EvaluationError, match="holds an evaluation already"):
        merge([tmp_path / "a"], tmp_path / "again")
    assert not (tmp_path / "out").exists()
    lines = (tmp_path / "seed" / EPISODES).read_bytes()
    (tmp_path / "a" / EPISODES).write_bytes(lines)
    with pytest.raises(EvaluationError, match="from a run with other settings"):
        run(settings(tmp_path / "a", episodes=1))


def test_versions_that_differ_are_not_merged(tmp_path: Path) -> None:
    run(settings(tmp_path / "1", shard=(1, 2)))
    run(settings(tmp_path / "2", shard=(2, 2)))
    changed = (tmp_path / "2" / EPISODES).read_text().replace('"fake-simulator": "1"', '"fake-simulator": "2"')
    (tmp_path / "2" / EPISODES).write_text(changed)
    with pytest.raises(EvaluationError, match=r"different versions .fake-simulator 1 and 2."):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "out")
