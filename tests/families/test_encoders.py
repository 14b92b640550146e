"""`EncoderReuse` on the families that run without LeRobot."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.families import cases
from tests.families.encoders import CHECKS, check_equal_images, check_reference, parts_of

CASES = (cases.chunk(), cases.reference(), cases.pi0("sdpa"), cases.pi0("eager"))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_encoder(case, check):
    CHECKS[check](case)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_layers_that_are_given_a_mask(backend):
    """Each chosen patch attends to what its own row of the mask lets it."""
    plain = cases.pi0(backend)
    mask = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 3

    def build() -> Any:
        model = plain.build()
        for layer in parts_of(plain, model).layers:
            layer.register_forward_pre_hook(lambda _, args: (args[0], mask))
        return model

    case = dataclasses.replace(plain, build=build)
    assert (case.step(build(), 0, slice(0, 2)) - plain.step(plain.build(), 0, slice(0, 2))).abs().max() > 1e-3
    check_equal_images(case)
    check_reference(case, pruned="drop")
