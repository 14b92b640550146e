"""The example distribution, installed into a temporary folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins.distributions import install_example
from vla_pruner import families, plugins


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path; whatever was imported from it is forgotten again."""
    folder, before = tmp_path / "site", set(sys.modules)
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).is_relative_to(folder):
            del sys.modules[name]
    for cache in (plugins._plugins, plugins._source, families._loaded):
        cache.cache_clear()


@pytest.fixture
def example(site: Path) -> Path:
    install_example(site)
    return site
