"""Fixtures of the report's tests: folders, written once, and a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.browser import Browser, chromium
from tests.report.folders import write_run


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 tasks and 10 starts, two of them traced; one task has a name that is a script."""
    folder = tmp_path_factory.mktemp("traced") / "run"
    write_run(folder, traced=2)
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found
