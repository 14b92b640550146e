"""The stand-in for an accelerator sees every kind of wait, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.waits import DEVICE, StandIn, added, is_placed

WAITS = {
    "item": lambda x: x[0, 0].item(),
    "bool": lambda x: bool((x > 0).any()),
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x.argmax()),
    "an index": lambda x: [1, 2, 3][x.argmax().clamp(0, 2)],
    "if": lambda x: 1 if x.sum() > 0 else 2,
    "in": lambda x: 3 in x,
    "tolist": lambda x: x.tolist(),
    "to the host": lambda x: x.to("cpu"),
    "cpu": lambda x: x.cpu(),
    "into a host tensor": lambda x: torch.zeros(2, 3).copy_(x),
    "from a list": lambda x: torch.tensor([1, 2], device=x.device),
    "from an array": lambda x: torch.as_tensor(np.zeros(2), device=x.device),
    "to the device": lambda x: torch.zeros(2).to(x.device),
    "to where another is": lambda x: torch.zeros(2).to(x),
    "by a list": lambda x: x[:, [0, 1]],
    "by a host index": lambda x: x[torch.tensor([0, 1])],
    "by a mask": lambda x: x[x > 0],
    "nonzero": lambda x: torch.nonzero(x),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: torch.masked_select(x, x > 0),
    "unique": lambda x: torch.unique(x),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x),
    "repeats": lambda x: torch.repeat_interleave(x[0], torch.ones_like(x[0]).long()),
    "a size": lambda x: torch.arange(x.argmax()),
    "inverse": lambda x: torch.linalg.inv(x[:, :2]),
}
NONE = {
    "arithmetic": lambda x: (x @ x.T).softmax(-1).sum() + torch.ones(2, 2, device=x.device),
    "a number": lambda x: x + torch.tensor(2.0),
    "made there": lambda x: torch.arange(3, device=x.device) + torch.full((3,), 2, device=x.device),
    "non-blocking": lambda x: x + torch.zeros(2, 3).to(x.device, non_blocking=True),
    "slices": lambda x: x[0, 1:] + x[..., None][:, 0, 0][0],
    "ids": lambda x: x.gather(1, x.argsort(dim=1)[:, :2]).scatter(1, x.argmin(1, keepdim=True), True),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "a shape": lambda x: torch.zeros(x.shape[0], int(x.shape[1]), device=x.device).to(x.dtype),
    "on the host": lambda x: torch.zeros(3)[torch.tensor([True, False, True])].tolist(),
    "nothing": lambda x: (torch.tensor([], device=x.device), torch.zeros(0).to(x), x[:0].cpu()),
    "in a loop": lambda x: [row.sum() for row in x],
    "another type": lambda x: x.to(torch.float64).to(DEVICE).type_as(x),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", WAITS)
def test_a_wait_is_seen(kind, mode):
    with StandIn() as stand_in, mode():
        WAITS[kind](stand_in.place(torch.arange(6.0).reshape(2, 3) + torch.eye(2, 3)))
    assert stand_in.waits
    assert "test_waits.py" in str(stand_in.waits[0])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", NONE)
def test_what_is_none_is_not(kind, mode):
    with StandIn() as stand_in, mode():
        NONE[kind](stand_in.place(torch.arange(6.0).reshape(2, 3)))
    assert not stand_in.waits, str(stand_in.waits[0])


def test_where_tensors_are():
    with StandIn() as stand_in:
        there = stand_in.place(torch.ones(2, 3))
        assert there.device == DEVICE
        assert not there.is_cpu
        for made in (there + 1, there[0], there.view(-1), torch.zeros_like(there), torch.cat([there, there])):
            assert made.device == DEVICE
        for made in (there.cpu(), torch.zeros_like(there, device="cpu"), torch.zeros(3)):
            assert made.device.type == "cpu"
            assert not is_placed(made)
        module = stand_in.place(torch.nn.Linear(3, 3))
        assert next(module.parameters()).device == DEVICE
        with pytest.raises(RuntimeError, match="on the device and on the host"):
            module(torch.ones(2, 3))
        with pytest.raises(TypeError, match="copy it to the host"):
            there.numpy()


def test_a_wait_is_the_sessions_if_the_model_did_not_have_it():
    def step(times):
        with StandIn() as stand_in:
            x = stand_in.place(torch.ones(2))
            for _ in range(times):
                x.sum().item()
        return stand_in.waits

    assert added(step(2), step(2)) == []
    assert [wait.what for wait in added(step(3), step(2))] == ["_local_scalar_dense"]
    assert added(step(1), step(2)) == []
