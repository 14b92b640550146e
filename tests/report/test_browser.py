"""The page in a real browser: it draws, plays, sorts, asks for nothing and complains about nothing."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.report.browser import LOOKS, Browser, check_look
from tests.report.folders import STEPS, chance, write_run
from vla_pruner import cli

PLAYER = "#films-player canvas[data-panel={}]"


@pytest.fixture(scope="module")
def page(traced: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert cli.main(["report", str(traced), "--out", str(out)]) == 0
    return out


@pytest.fixture
def opened(browser: Browser, page: Path) -> Browser:
    browser.screen(1280)
    browser.open(page)
    until(lambda: browser.run(f"return Number(document.querySelector('{PLAYER.format('arm')}').dataset.dropped) >= 0"))
    return browser


def until(true: Callable[[], object]) -> None:
    for _ in range(200):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it never happened")


def picture(browser: Browser, panel: str) -> str:
    return browser.run(f"return document.querySelector('{PLAYER.format(panel)}').toDataURL()")


def fact(browser: Browser, panel: str, name: str) -> int:
    return int(browser.run(f"return document.querySelector('{PLAYER.format(panel)}').dataset[arguments[0]]", name))


def place(browser: Browser, step: int) -> None:
    browser.run(
        "const one = document.getElementById('film-step'); one.value = arguments[0];"
        "one.dispatchEvent(new Event('input'))",
        step,
    )


def test_it_asks_for_nothing_and_complains_about_nothing(opened: Browser, page: Path) -> None:
    assert opened.requests() == [page.resolve().as_uri()]
    assert opened.complaints() == []
    assert opened.driver.title != "owned"
    assert opened.run("return document.body.textContent.includes(\"<script>document.title='owned'\")")


def test_a_request_and_an_error_would_be_noticed(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://127.0.0.1:9/x.png'><script>nothing.there</script>")
    browser.open(bad)
    assert "http://127.0.0.1:9/x.png" in browser.requests()
    assert any("nothing is not defined" in one for one in browser.complaints())


def test_the_plots_have_marks(opened: Browser) -> None:
    assert opened.count(".verdicts .row .badge") == 4
    assert opened.count(".verdicts .strip .whisker") == 8  # four arms, four random controls
    assert opened.count("#keep svg.plot .point path.mark") == 9  # and unpruned
    assert opened.count("#keep svg.plot .reference.base") == 1
    assert opened.count("#latency svg.plot .point path.mark") == 5
    assert opened.count("#overlap svg.plot .course") == 6
    assert opened.run("return document.querySelector('#keep svg.plot').textContent.includes('visual tokens kept, %')")
    sizes = opened.run(
        "return [...document.querySelectorAll('svg.plot, svg.strip')].filter((one) => one.checkVisibility())"
        ".map((one) => Math.min(one.getBoundingClientRect().width, one.getBoundingClientRect().height))"
    )
    rows = (
        "return [...document.querySelectorAll('.forest .row')].filter((one) => one.checkVisibility())"
        ".map((one) => one.getBoundingClientRect().height)"
    )
    assert max(opened.run(rows)) < 90
    assert len(sizes) >= 9
    assert min(sizes) > 15


def test_the_slider_moves_the_frame_and_what_is_dimmed(opened: Browser) -> None:
    place(opened, 0)
    assert fact(opened, "arm", "dropped") == 0
    first, semantic = picture(opened, "arm"), picture(opened, "semantic")
    place(opened, 4)
    assert fact(opened, "arm", "step") == 4
    assert fact(opened, "arm", "dropped") > 0
    dimmed = picture(opened, "arm")
    assert dimmed != first
    assert picture(opened, "semantic") != semantic
    assert "control step 4" in opened.run("return document.getElementById('film-where').textContent")
    opened.run("document.getElementById('film-dim').click()")
    plain = picture(opened, "arm")
    assert pixels(plain).mean() > 1.5 * pixels(dimmed).mean()
    opened.run("document.getElementById('film-dim').click()")
    assert picture(opened, "arm") == dimmed


def pixels(address: str) -> np.ndarray:
    import base64

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("L"), dtype=float)


def test_keys_move_it_and_play_ends_at_the_end(opened: Browser) -> None:
    place(opened, 1)
    opened.press("#film-step", "\ue014")  # arrow right
    assert fact(opened, "arm", "step") == 2
    opened.press("#film-step", "\ue011")  # home
    assert fact(opened, "arm", "step") == 0
    opened.press("#films-player", " ")
    until(lambda: fact(opened, "arm", "step") == STEPS)
    text = opened.run("return document.querySelector('#films-player').textContent")
    assert "after its last control step" in text
    assert opened.run("return document.getElementById('film-play').textContent") == "Play"


def test_other_arms_and_episodes_can_be_chosen(opened: Browser) -> None:
    assert opened.count("#film option") == 4
    change = (
        "const one = document.getElementById(arguments[0]); one.selectedIndex = arguments[1];"
        "one.dispatchEvent(new Event('change'))"
    )
    told = "return document.getElementById('film-told').textContent"
    opened.run(change, "film", 1)
    before = opened.run(told)
    opened.run(change, "film", 2)
    assert opened.run(told) != before
    opened.run(change, "film-arm", 0)
    assert opened.count(PLAYER.format("base")) == 0
    assert opened.count(PLAYER.format("agreement")) == 2  # of each camera
    assert opened.complaints() == []


def test_the_table_is_sorted_folded_and_one_forest_is_shown(opened: Browser) -> None:
    rows = (
        "return [...document.querySelectorAll('#arms-table tr[data-arm]')].filter((one) => one.checkVisibility())"
        ".map((one) => one.dataset.arm)"
    )
    home = opened.run(rows)
    click = "document.querySelectorAll('#arms-table thead button')[arguments[0]].click()"
    opened.run(click, 10)  # median milliseconds, the highest first
    down = opened.run(rows)
    opened.run(click, 10)
    up = opened.run(rows)
    assert down != up
    assert sorted(down) == sorted(up) == sorted(home)
    assert down[1:5] == up[1:5][::-1]
    opened.run("document.querySelector('#arms-table .section button').click()")
    assert len(opened.run(rows)) == len(home) - 4
    shown = "return [...document.querySelectorAll('.forest.tasks')].filter((one) => one.checkVisibility()).length"
    assert opened.run(shown) == 1
    before = opened.run("return document.querySelector('.forest.tasks.shown').dataset.arm")
    opened.run("document.querySelector('[data-step=\"1\"]').click()")
    assert opened.run(shown) == 1
    assert opened.run("return document.querySelector('.forest.tasks.shown').dataset.arm") != before


@pytest.mark.parametrize("look", LOOKS)
def test_it_can_be_looked_at(opened: Browser, look: str) -> None:
    check_look(opened, "report", look, least_height=2500)


def test_seventy_arms_stay_readable(browser: Browser, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    names = ["vla-pruner", "vla-pruner:semantic_queries=last", "action-only", "score-fusion", "fastv", "sparsevlm"]
    names += ["semantic-only", "text-query", "divprune", "max-min-diversity", "max-min-diversity:metric=euclidean"]
    write_run(folder, methods=names, keep=(0.5, 0.25, 0.125), episodes=3, outcome=chance)
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").stat().st_size < 2_000_000
    browser.screen(1280)
    browser.open(folder / "report.html")
    assert browser.complaints() == []
    assert browser.count(".verdicts .group") == 9
    assert browser.count(".verdicts .group[open]") == 1
    assert browser.run("return document.body.scrollHeight") < 10_000
    browser.run("document.getElementById('unfold').click()")
    assert browser.count(".verdicts .group[open]") == 9
    visible = (
        "return [...document.querySelectorAll('#arms-table tr[data-arm]')].filter((x) => x.checkVisibility()).length"
    )
    assert browser.run(visible) > 66
    browser.run(
        "const one = document.getElementById('filter'); one.value = 'fastv 0.25'; one.dispatchEvent(new Event('input'))"
    )
    assert browser.run(visible) == 2
    browser.screen(390)
    assert browser.run("return document.documentElement.scrollWidth") == 390
