"""No control step of a session makes the host wait where LeRobot's own policy does not: see `tests/families/waits.py`.

These are the families whose calls the stand-in for a device can follow.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

from tests.families.waits import FATES, FEW, check_no_wait
from tests.lerobot import test_eo1, test_matrix
from tests.lerobot.test_matrix import case, molmoact2, pi0_fast
from tests.pairwise import pairwise

FAMILIES = {str(one): one for one in (case("pi0"), case("smolvla"), pi0_fast(), molmoact2(), test_eo1.CASE)}


@pytest.mark.parametrize(("family", "method", "pruned"), pairwise(list(FAMILIES), list(FEW), FATES))
def test_no_wait(family, method, pruned, monkeypatch):
    # LeRobot asks the device that is stood in for what it can do.
    monkeypatch.setattr(torch.xpu, "get_device_capability", lambda *_: {"has_fp64": True})
    # MolmoAct2 draws its noise itself, on the device.
    monkeypatch.setattr(test_matrix, "drawn_as", lambda _: contextlib.nullcontext())
    check_no_wait(FAMILIES[family], method, pruned)
