"""`EncoderReuse` on the families that run without LeRobot."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import vla_pruner as vp
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


def test_cameras_of_one_call_that_come_and_go_are_encoded_whole():
    """Behind a blank image every patch of a camera's picture is new, however few have their turn."""
    model = cases.pi0("sdpa").build()
    pixels = torch.rand(1, 2, 3, 56, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def act(present: bool) -> torch.Tensor:
        here = 32 if present else 16
        ids = torch.cat([torch.full((1, here), 500), torch.arange(1, 7)[None], torch.zeros(1, 32 - here)], dim=1)
        return model.sample_actions(
            state=torch.ones(1, 32),
            input_ids=ids.long(),
            pixel_values=pixels if present else torch.cat([pixels[:, :1], torch.full_like(pixels[:, 1:], -1.0)], dim=1),
            noise=torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1)),
            attention_mask=(torch.arange(38) < here + 6).long()[None],
            pixel_attention_mask=torch.tensor([[True, present]]),
        )

    expected = {present: act(present) for present in (True, False)}
    with vp.Unpruned().attach(model, encoder=vp.EncoderReuse(keep=0.25)) as session:
        whole = []
        for present in (True, True, False, False, True, True):
            assert torch.allclose(act(present), expected[present], atol=1e-5)
            whole.append(session.encoded == (None,))
    assert whole == [True, False] * 3


def test_images_that_require_a_gradient_have_the_whole_one():
    case = cases.pi0("sdpa")
    model = case.build()
    pixels = torch.rand(1, 2, 3, 56, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = torch.cat([torch.full((1, 32), 500), torch.arange(1, 7)[None]], dim=1)

    def gradient() -> torch.Tensor:
        given = pixels.clone().requires_grad_()
        embeddings = model.model.embed_prefix(ids, given, torch.ones(1, 2, dtype=torch.bool))
        return torch.autograd.grad(embeddings.square().sum(), given)[0]

    expected = gradient()
    with vp.Unpruned().attach(model, encoder=vp.EncoderReuse(keep=0.25)) as session:
        for scene in (0, 1):
            case.step(model, scene, slice(0, 1))
        assert torch.equal(gradient(), expected)
        assert session.encoded == (None,)
        case.step(model, 1, slice(0, 1))
        assert None not in session.encoded
