"""LeRobot's own tests: they skip if lerobot is not installed (make test-lerobot installs it)."""

from importlib import metadata
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    try:
        metadata.version("lerobot")
        # LeRobot's MolmoAct2 requests a check that transformers no longer makes.
        quiet = pytest.mark.filterwarnings("ignore:.*rope_config_validation:FutureWarning")
        marks = [pytest.mark.lerobot, quiet]
    except metadata.PackageNotFoundError:
        reason = "lerobot is not installed; make test-lerobot installs it"
        marks = [pytest.mark.lerobot, pytest.mark.skip(reason=reason)]
    for item in items:
        if HERE in item.path.parents:
            for mark in marks:
                item.add_marker(mark)
