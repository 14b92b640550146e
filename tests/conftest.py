"""Settings that every test shares."""

import gc
import os
from pathlib import Path

import pytest
import torch

# Tiny tensors on many threads spend their time waiting for each other, most of all beside another process.
torch.set_num_threads(1)
# A compiler makes and keeps so many objects that looking for garbage at Python's own rate takes a sixth of its time.
gc.set_threshold(50_000, 20, 20)

GOLDEN = Path(os.environ.get("VLA_PRUNER_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


def pytest_collection_finish():
    """Hide what the test modules have imported from the garbage collector, which would look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def golden():
    """The folder of the golden vectors; the test is skipped if it is absent."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden vectors at {GOLDEN}; set VLA_PRUNER_GOLDEN to their folder")
    return GOLDEN
