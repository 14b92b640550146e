"""A headless Chromium that reports a page's requests, errors and looks."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
"""The folder in which a test run leaves its screenshots, for people; not in git."""
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1280,900",
)


class Browser:
    """One page after another, with what they did."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path) -> None:
        """Load a file."""
        self.complaints()
        self.requests()
        self.driver.get(page.resolve().as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """Return the result of a script."""
        return self.driver.execute_script(script, *arguments)

    def count(self, selector: str) -> int:
        """Return the number of elements."""
        return self.run("return document.querySelectorAll(arguments[0]).length", selector)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since the last call."""
        return [f"{one['level']}: {one['message']}" for one in self.driver.get_log("browser") if one["level"] != "INFO"]

    def requests(self) -> list[str]:
        """Return the addresses requested since the last call, images in the page itself left out."""
        found = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                parameters = message["params"]
                url = parameters.get("request", parameters)["url"]
                if not url.startswith("data:image/"):
                    found.append(url)
        return found

    def screen(self, width: int, *, dark: bool = False, print_media: bool = False) -> None:
        """Set the width in pixels, the colours and the medium."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        media = {"features": features, "media": "print" if print_media else ""}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def press(self, selector: str, key: str) -> None:
        """A key, as a user presses it while an element has the focus."""
        from selenium.webdriver.common.by import By

        self.driver.find_element(By.CSS_SELECTOR, selector).send_keys(key)

    def screenshot(self, name: str) -> bytes:
        """The whole page as a PNG, also written to `SCREENSHOTS` under this name."""
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        asked = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        content = base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", asked)["data"])
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        (SCREENSHOTS / f"{name}.png").write_bytes(content)
        return content


LOOKS = {
    "wide": (1280, False, False),
    "wide-dark": (1280, True, False),
    "telephone": (390, False, False),
    "telephone-dark": (390, True, False),
    "print": (800, True, True),
}
"""The width in pixels, whether the colours are dark, and whether the page is printed, of everything a page must fit."""


def check_look(browser: Browser, page: str, look: str, least_height: int) -> None:
    """Take a screenshot of the open page as `look` of `LOOKS` has it, and checks its size and its colours."""
    from PIL import Image

    width, dark, paper = LOOKS[look]
    browser.screen(width, dark=dark, print_media=paper)
    content = browser.screenshot(f"{page}-{look}")
    image = np.asarray(Image.open(io.BytesIO(content)).convert("L"), dtype=float)
    assert image.shape[1] == width, "nothing sticks out to the right"
    assert image.shape[0] > least_height
    is_dark = dark and not paper
    assert (np.median(image) < 60) == is_dark
    assert (np.median(image) > 200) == (not is_dark)
    assert image.std() > 15


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Yield a browser with an empty profile; skip the test if there is none."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("Chromium and its driver are not installed: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
