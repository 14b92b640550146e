"""The text of the page, from folders of every kind; and refusals."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report.folders import SCRIPT, SIDE, STEPS, chance, write_run
from vla_pruner import cli
from vla_pruner.evaluation import merge
from vla_pruner.evaluation.traces import trace_path
from vla_pruner.report.evaluation import render
from vla_pruner.report.films import choose_films, find_traces
from vla_pruner.report.results import read_results
from vla_pruner.report.traced import look


def report(folder: Path, *arguments: str) -> str:
    assert cli.main(["report", str(folder), *arguments]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def films(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="films-data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def text_of(page: str) -> str:
    """Return the visible text, in one line."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page.partition("<body>")[2], flags=re.DOTALL)

    class Texts(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []

        def handle_data(self, data: str) -> None:
            self.found.append(data)

    parser = Texts()
    parser.feed(body)
    return " ".join(" ".join(parser.found).split())


def test_the_verdict_comes_first(traced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = report(traced)
    said = capsys.readouterr().out
    assert "All 4 pruned arms are worse than the unpruned policy by more than 2 points." in said
    assert str(traced / "report.html") in said
    assert re.search(r"11 arms, \d+ kB, nothing is loaded from elsewhere", said)
    text = text_of(page)
    order = [
        "All 4 pruned arms are worse",
        "Asked: does pruning lose 2 percentage points",
        "Not for claims",
        "All arms",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "4 pruned arms, 6 controls and the unpruned policy ran the same episodes in turns: 2 tasks of fake" in text
    assert "initial states 0 to 9 of each, 20 episodes an arm" in text
    assert "Noise floor 0 of 20 Two runs of the unpruned policy agree in 20 of 20 episodes" in text
    assert "Choosing beats drawing as many tokens at random in 0 of 4 arms; in 4 neither is shown" in text
    assert "Freezing or dropping, in 2 settings: freezing solves more in 0, dropping in 0" in text
    assert text.count("against the same dropped: ") == 2
    assert "With black images the policy solves 10 of 20, against 20 of 20" in text
    difference = read_results(traced).methods[0].difference
    assert difference is not None
    assert f"-50 ({100 * difference.low:.1f} to {100 * difference.high:.1f})" in text


def test_nothing_in_it_is_markup_that_should_be_text(traced: Path) -> None:
    page = report(traced)
    assert SCRIPT not in page
    assert "&lt;script&gt;document.title" in page
    assert page.count("<script") == page.count("</script>") == 3
    assert any("<script>" in film["instruction"] for film in films(page))
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page)
    assert "default-src 'none'" in page


def test_it_is_well_formed(traced: Path) -> None:
    void = {"meta", "input", "br", "img", "hr", "link"}

    class Nested(HTMLParser):
        open: list[str]
        ids: list[str]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.ids += [value for name, value in attrs if name == "id" and value]
            if tag not in void:
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Nested()
    parser.open, parser.ids = [], []
    parser.feed(report(traced))
    assert not parser.open
    assert len(parser.ids) == len(set(parser.ids)), "an id is there twice"
    assert "$" not in report(traced).partition("<script>")[0]


def test_the_player_has_what_was_traced(traced: Path) -> None:
    data = films(report(traced))
    assert len(data) == 4
    # Odd starts, which the pruned arms lost, come first, one of each task.
    assert [film["title"].endswith("initial state 1") for film in data] == [True, True, False, False]
    arms = data[0]["arms"]
    assert arms[0]["title"] == "unpruned"
    assert len(arms) == 4
    assert arms[0]["kept"] is None
    dropping = next(arm for arm in arms if arm["title"] == "vla-pruner 0.25 drop K=3 preset=paper")
    assert dropping["fate"] == "drop"
    assert dropping["success"] is False
    assert dropping["total"] == 2 * SIDE * SIDE
    assert dropping["pruned"] == [False] * 3 + [True] * 3
    kept = np.unpackbits(np.frombuffer(base64.b64decode(dropping["kept"][4]), np.uint8), bitorder="little")
    semantic = np.roll(np.arange(1, 33), 4)
    assert set(np.flatnonzero(kept)) == set(np.argsort(-semantic)[:8])
    assert [camera["name"] for camera in dropping["cameras"]] == ["front", "wrist"]
    assert [camera["grid"] for camera in dropping["cameras"]] == [[0, 4, 4], [16, 4, 4]]
    assert all(len(camera["frames"]) == STEPS for camera in dropping["cameras"])
    shades = np.frombuffer(base64.b64decode(dropping["maps"]["semantic"][4]), np.uint8)
    assert shades.argmax() == semantic.argmax()
    assert shades.max() == 255


def test_episodes_are_chosen_by_name(traced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = films(report(traced, "--episodes", "reach:0,1:1:blank image"))
    assert [film["title"] for film in data] == ["reach, initial state 0", f"{SCRIPT}, initial state 1"]
    assert [arm["title"] for arm in data[1]["arms"]] == ["unpruned", "blank image"]
    assert data[1]["arms"][1]["maps"] is None
    assert cli.main(["report", str(traced), "--episodes", "reach:7"]) == 2
    assert "--episodes names 'reach:7', and no such episode was traced" in capsys.readouterr().err


def test_lost_pairs_come_first_and_tasks_take_turns(tmp_path: Path) -> None:
    write_run(tmp_path / "run", traced=3, episodes=3, tasks=("a", "b", "c"))
    results = read_results(tmp_path / "run")
    chosen = choose_films(results, find_traces(results))
    assert [(film.unit.task, film.unit.initial_state) for film in chosen] == [("a", 1), ("b", 1), ("c", 1), ("a", 0)]


def test_without_traces_it_says_how_to_get_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    page = report(tmp_path / "run")
    assert "give the eval command again with --trace 1 and a new --out" in text_of(page)
    assert films(page) == []
    assert 'id="overlap"' not in page
    assert cli.main(["report", str(tmp_path / "run"), "--episodes", "reach"]) == 2
    assert "has no traces; give eval --trace 1 first" in capsys.readouterr().err


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    write_run(
        tmp_path / "run", episodes=3, planned=60, outcome=lambda arm, unit: None if unit.initial_state == 2 else True
    )
    text = text_of(report(tmp_path / "run"))
    assert "The run is not finished: up to 114 of 120 episodes an arm are left" in text
    assert "44 of 1,320 episodes are finished" in text
    assert "22 episodes crashed" in text
    assert f"OSError: {SCRIPT}" in text


def test_a_run_that_has_only_begun_is_no_error(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder, episodes=1, planned=5)
    lines = (folder / "episodes.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "episodes.jsonl").write_bytes(lines[0] + lines[1][:40])  # a kill in the second episode
    text = text_of(report(folder))
    assert "no pair yet" in text
    assert "1 of 110 episodes are finished" in text
    assert "Noise floor - No pair of unpruned episodes is finished yet." in text
    assert "Random choice - No pair with tokens drawn at random is finished yet." in text
    assert "Blank image - No pair with blank images is finished yet." in text
    arms = [json.loads(line)["arm"] for line in lines[:11]]
    paired = lines[: 1 + next(place for place, arm in enumerate(arms) if arm.startswith("random"))]
    (folder / "episodes.jsonl").write_bytes(b"".join(paired))
    text = text_of(report(folder))
    assert "at random in 0 of 1 arm; in 1 neither is shown; 3 more arms without a finished pair" in text


def test_a_shard_and_a_merged_folder(tmp_path: Path) -> None:
    for number in (1, 2):
        write_run(tmp_path / str(number), shard=(number, 2), traced=1)
    assert ", shard 1 of 2 alone," in text_of(report(tmp_path / "1"))
    merge([tmp_path / "1", tmp_path / "2"], tmp_path / "all")
    page = report(tmp_path / "all")
    assert "20 episodes an arm" in text_of(page)
    assert len(films(page)) == 2


def test_one_arm_or_none(tmp_path: Path) -> None:
    write_run(tmp_path / "one", keep=(0.25,), pruned=("freeze",), controls=(), outcome=lambda *_: True, episodes=60)
    text = text_of(report(tmp_path / "one"))
    assert (
        "vla-pruner 0.25 freeze K=3 preset=paper may or may not be worse" in text or "preset=paper is not worse" in text
    )
    assert "Not run: --controls again" in text
    assert "Not run: --controls random" in text
    assert "Not run: --controls blank" in text
    assert "Not for claims" not in text
    write_run(tmp_path / "none", methods=("none",), keep=(), pruned=(), controls=("again",))
    assert "The unpruned policy solved 20 of 20 episodes; nothing was pruned." in text_of(report(tmp_path / "none"))


def test_every_arm_is_in_the_table_with_its_figures(tmp_path: Path) -> None:
    settings = write_run(tmp_path / "run", methods=("vla-pruner", "fastv"), outcome=chance, suites=("fake", "other"))
    results = read_results(tmp_path / "run")
    page = render(results, look(results))
    text = text_of(page)
    for arm in settings.arms():
        assert f'data-arm="{arm.key}"' in page
    for one in results.summary.arms:
        assert f"{one.success.successes}/{one.success.total}" in text
        assert f"{100 * one.success.low:.1f}".removesuffix(".0") in text
    assert page.count('data-group="') == 3  # two methods and the controls
    assert "By suite" in text


def test_other_programs_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder)
    assert "do not quote the milliseconds" not in report(folder)
    content = json.loads((folder / "run.json").read_text())
    content["conditions"][0]["busy_cores_before"] = 1.4
    (folder / "run.json").write_text(json.dumps(content))
    assert "do not quote the milliseconds" in report(folder)


def test_a_damaged_trace_is_left_out_and_named(
    traced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(traced, folder)
    results = read_results(folder)
    key = next(key for key in find_traces(results) if key[1] == "unpruned" and key[0].initial_state == 1)
    trace_path(folder, *key).write_bytes(b"PK not a trace")
    page = report(folder)
    assert "is damaged" in text_of(page)
    assert len(films(page)) == 4
    assert "mean over control steps and then over 3 episodes" in text_of(page)
    said = capsys.readouterr().out.splitlines()
    path = trace_path(folder, *key)
    assert [line for line in said if "Left out" in line] == [
        f"Left out: The trace {path} is damaged (it is no whole .npz file). Its record is whole: delete the trace, or "
        "restore it from a copy."
    ]


def test_of_many_damaged_traces_the_terminal_names_few(
    traced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(traced, folder)
    for path in find_traces(read_results(folder)).values():
        path.write_bytes(b"PK not a trace")
    page = text_of(report(folder))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Left out: ")]
    assert len(said) == 4
    assert said[3] == f"Left out: {page.count('is damaged') - 3} more damaged traces, which the report names."


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "does not exist; give the --out of vla-pruner eval."),
        (lambda folder: folder.write_text("x"), "is no folder; give the --out"),
        (lambda folder: folder.mkdir(), "holds no evaluation (run.json: No such file or directory)"),
        (lambda folder: spoil(folder, "run.json", b'{"format": '), "run.json is damaged (Expecting value"),
        (lambda folder: spoil(folder, "run.json", b"[1]"), "is no run of this version of vla-pruner eval (it names"),
        (lambda folder: spoil(folder, "run.json", b'{"format": "x"}'), "of vla-pruner eval (its format is 'x', and"),
        (lambda folder: spoil(folder, "episodes.jsonl", b"{}\n"), "Line 1 of "),
        (lambda folder: spoil(folder, "episodes.jsonl", b""), "holds no finished episode yet"),
    ],
)
def test_what_is_no_evaluation_is_refused_in_one_line(
    make: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "run")
    assert cli.main(["report", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "report.html").exists()


def spoil(folder: Path, name: str, content: bytes) -> None:
    write_run(folder)
    (folder / name).write_bytes(content)


def test_a_file_that_cannot_be_written_is_refused(traced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(traced), "--out", str(traced / "no" / "x.html")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert cli.main(["report", str(traced), "--out", str(traced)]) == 2
    assert "which is a folder; give a file in it" in capsys.readouterr().err
    assert cli.main(["report", str(traced), "--out", "/dev/full"]) == 2
    assert "/dev/full, which cannot be written (No space left on device)" in capsys.readouterr().err


def test_without_pillow_it_names_the_extra(
    traced: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert cli.main(["report", str(traced), "--out", str(traced / "x.html")]) == 2
    assert "pip install 'vla-pruner[eval]'" in capsys.readouterr().err


def test_images_are_bounded(traced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vla_pruner.report.films.MOST_BYTES", 100_000)
    page = report(traced)
    frames = [
        frame for film in films(page) for arm in film["arms"] for one in arm["cameras"] for frame in one["frames"]
    ]
    assert sum(map(len, frames)) < 1.1 * 100_000
    assert "control steps, so that the page stays small" in text_of(page)
    step = films(page)[0]["arms"][0]["steps"]
    assert len(step) < STEPS
    assert step[1] - step[0] == step[1]
