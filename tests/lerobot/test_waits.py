"""No control step of a session makes the host wait for the device if LeRobot's policy does not; see
`tests/families/waits.py`.
"""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

import torch

import vla_pruner as vp
from tests.families.waits import COMPILED, FATES, FEW, check_no_wait
from tests.lerobot import test_eo1, test_matrix
from tests.lerobot.test_matrix import case, molmoact2, pi0_fast
from tests.lerobot.tiny import KINDS
from tests.pairwise import pairwise

# Importing the compiler raises a warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

OTHERS = {str(one): one for one in (pi0_fast(), molmoact2(), test_eo1.CASE)}
"""Families whose calls the stand-in for a device can follow, beside those of `KINDS`."""


@pytest.fixture(autouse=True)
def able(monkeypatch):
    """Give the stand-in device, which does not exist, the 64 bits that LeRobot asks torch about."""
    monkeypatch.setattr(torch.xpu, "get_device_capability", lambda *_: {"has_fp64": True})


@pytest.mark.parametrize(("kind", "method", "pruned", "compiled"), pairwise(KINDS, FEW, FATES, COMPILED))
def test_no_wait(kind, method, pruned, compiled):
    check_no_wait(case(kind), method, pruned, compiled)


@pytest.mark.parametrize("kind", KINDS)
def test_no_wait_with_reused_patches(kind):
    check_no_wait(case(kind), "VLA-Pruner", encoder=vp.EncoderReuse(keep=0.25))


@pytest.mark.parametrize(("family", "method", "pruned"), pairwise(list(OTHERS), list(FEW), FATES))
def test_no_wait_of_further_families(family, method, pruned, monkeypatch):
    # MolmoAct2 draws its noise itself, on the device.
    monkeypatch.setattr(test_matrix, "drawn_as", lambda _: contextlib.nullcontext())
    check_no_wait(OTHERS[family], method, pruned)
