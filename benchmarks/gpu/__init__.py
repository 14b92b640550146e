"""All checks and measurements on a GPU in one command that fits into ten minutes; see docs/gpu.md."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("vla_pruner") is None:  # the package need not be installed
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
