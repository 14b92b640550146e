"""The demo's page in a real browser: it moves, names its parts, and fits a telephone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.demo.conftest import PairEnvironment
from tests.report.browser import LOOKS, Browser, check_look
from tests.report.test_browser import until
from vla_pruner.demo import DemoSettings, run_demo
from vla_pruner.policies.random import random_policy


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    policy: Any = random_policy("reference-chunk")
    settings = DemoSettings(tasks=("reach", "push"), episodes=1, seed=0, out=out, compile=False)
    with pytest.MonkeyPatch.context() as patch, open(os.devnull, "w", encoding="utf-8") as nowhere:
        for busy_cores in ("conditions.busy_cores", "demo.run.busy_cores"):  # whatever else runs beside the tests
            patch.setattr(f"vla_pruner.{busy_cores}", lambda: 0.0)
        assert run_demo(settings, Console(file=nowhere), policy, PairEnvironment) == 0
    return out / "report.html"


@pytest.fixture
def opened(browser: Browser, page: Path) -> Browser:
    browser.screen(1280)
    browser.open(page)
    until(lambda: browser.run("return Number(document.getElementById('hero').dataset.step) >= 0"))
    return browser


def test_it_asks_for_nothing_and_complains_about_nothing(opened: Browser, page: Path) -> None:
    assert opened.requests() == [page.resolve().as_uri()]
    assert opened.complaints() == []


def test_sentence_picture_and_table_come_first(opened: Browser) -> None:
    order = opened.run(
        "return [...document.querySelectorAll('.said, #hero, table, .bars')].map((one) => one.id || one.className)"
    )
    assert order[:4] == ["said", "hero", "short", "bars"]
    assert opened.run("return document.querySelector('.said').textContent").startswith("The recommended setting (")
    assert opened.count(".short tbody tr") == 4
    titles = opened.run("return [...document.querySelectorAll('.short thead th')].map((one) => one.textContent)")
    assert titles == ["arm", "success (95 % interval)", "ms a pruned step", "speed"]


def test_the_picture_moves_shows_both_cameras_and_stops(opened: Browser) -> None:
    step = "return Number(document.getElementById('hero').dataset.step)"
    dimmed = "return Number(document.getElementById('hero').dataset.dimmed)"
    first = opened.run(step)
    until(lambda: opened.run(step) != first)
    until(lambda: opened.run(dimmed) == 96)  # 32 of 128 stay
    assert opened.run("const one = document.getElementById('hero'); return [one.width, one.height]") == [320, 160]
    opened.run("document.getElementById('hero-play').click()")
    assert opened.run("return document.getElementById('hero-play').getAttribute('aria-label')") == "Play the picture"
    stopped = opened.run("return document.getElementById('hero').toDataURL()")
    opened.driver.execute_async_script("setTimeout(arguments[arguments.length - 1], 600)")
    assert opened.run("return document.getElementById('hero').toDataURL()") == stopped


def test_everything_drawn_has_a_name(opened: Browser) -> None:
    assert opened.count("canvas") == 5
    assert opened.count("canvas[role=img][aria-label]:not([aria-label=''])") == 5
    assert opened.count(".bar[role=img][aria-label*='choosing']") == 4
    assert opened.count("th:not([scope])") == 0
    opened.run("const one = document.getElementById('step'); one.value = 4; one.dispatchEvent(new Event('input'))")
    assert opened.run("return document.getElementById('step').getAttribute('aria-valuetext')") == "step 4 of 5"
    label = opened.run("return document.querySelectorAll('.film canvas')[1].getAttribute('aria-label')")
    assert label == "recommended (0.25 freeze, layer 2, last row), step 4 of 5: 32 of 128 tokens live"


def test_it_fits_a_telephone(browser: Browser, page: Path) -> None:
    browser.screen(390)
    browser.open(page)
    assert browser.run("return document.documentElement.scrollWidth") == 390
    assert browser.run("const one = document.querySelector('.short'); return one.offsetWidth <= 390")
    assert browser.complaints() == []


@pytest.mark.parametrize("look", LOOKS)
def test_it_can_be_looked_at(opened: Browser, look: str) -> None:
    check_look(opened, "demo", look, least_height=1200)


def test_it_works_from_the_keyboard(opened: Browser) -> None:
    opened.run("document.getElementById('step').focus()")
    before = opened.run("return Number(document.getElementById('step').value)")
    opened.press("#step", "\ue014" if before < 5 else "\ue012")  # arrow right, or left at the end
    assert opened.run("return Number(document.getElementById('step').value)") != before
    order = (
        "return [...document.querySelectorAll('button, input, select, a[href], summary, [tabindex]')]"
        ".filter((one) => one.checkVisibility()).map((one) => one.tabIndex)"
    )
    assert set(opened.run(order)) == {0}, "everything that can be used is reached in the order of the page"
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert opened.run(outline) != "none", "the focus can be seen"
