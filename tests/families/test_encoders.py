"""`EncoderReuse` on the families that run without LeRobot."""

from __future__ import annotations

import pytest

from tests.families import cases
from tests.families.encoders import CHECKS

CASES = (cases.chunk(), cases.reference(), cases.pi0("sdpa"), cases.pi0("eager"))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_encoder(case, check):
    CHECKS[check](case)
