"""Settings that every test shares."""

import os
from pathlib import Path

import pytest
import torch

# Tiny tensors on many threads spend their time waiting for each other, most of all beside another process.
torch.set_num_threads(1)

GOLDEN = Path(os.environ.get("VLA_PRUNER_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


@pytest.fixture
def golden():
    """The folder of the golden vectors; the test is skipped if it is absent."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden vectors at {GOLDEN}; set VLA_PRUNER_GOLDEN to their folder")
    return GOLDEN
