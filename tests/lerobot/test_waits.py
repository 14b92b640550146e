"""No control step of a session makes the host wait for the device where LeRobot's policy does not."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

from tests.families.waits import COMPILED, FATES, FEW, check_no_wait
from tests.lerobot.test_matrix import case
from tests.lerobot.tiny import KINDS
from tests.pairwise import pairwise

# Importing the compiler warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def able(monkeypatch):
    """LeRobot asks whether the device, which is not there, has 64 bits."""
    monkeypatch.setattr(torch.xpu, "get_device_capability", lambda *_: {"has_fp64": True})


@pytest.mark.parametrize(("kind", "method", "pruned", "compiled"), pairwise(KINDS, FEW, FATES, COMPILED))
def test_no_wait(kind, method, pruned, compiled):
    check_no_wait(case(kind), method, pruned, compiled)
