"""LeRobot's own tests: they skip where lerobot is not installed (make test-lerobot installs it)."""

from importlib import metadata
from pathlib import Path

import pytest

HERE = Path(__file__).parent
try:
    metadata.version("lerobot")
except metadata.PackageNotFoundError:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.lerobot)
