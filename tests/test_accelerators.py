"""Devices of any kind are queried through torch's own names: one stand-in has those of CUDA, another those of MPS."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vla_pruner import accelerators
from vla_pruner.timing import StageTimer

CPU = torch.device("cpu")


class Module:
    """A stand-in for `torch.cuda`, or for the module of another accelerator, which has less."""

    def __init__(self, indexed=True):
        self.states = {0: torch.tensor([1]), 1: torch.tensor([2])}
        self.peak, self.waited = 7, []
        if indexed:
            self.get_rng_state = lambda device: self.states[device.index]
            self.set_rng_state = lambda state, device: self.states.update({device.index: state})
            self.max_memory_allocated = lambda device: self.peak
            self.reset_peak_memory_stats = lambda device: setattr(self, "peak", 0)
            about = SimpleNamespace(name="Card", total_memory=2**34, major=9, minor=0)
            self.get_device_properties = lambda device: about
        else:
            self.get_rng_state = lambda: self.states[0]
            self.set_rng_state = lambda state: self.states.update({0: state})


@pytest.fixture
def use(monkeypatch):
    def stand_for(kind, **options):
        module = Module(**options)
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)
        monkeypatch.setattr(torch.accelerator, "synchronize", module.waited.append)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        return module

    return stand_for


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_an_accelerator_that_tells_all(use, kind):
    module, device = use(kind), torch.device(kind, 1)
    assert [str(one) for one in accelerators.available()] == [f"{kind}:0", f"{kind}:1"]
    assert accelerators.name_of(device) == "Card"
    assert accelerators.described(device) == f"{kind}:1 Card, 16 GiB, compute capability 9.0"
    assert accelerators.peak_memory(device) == 7
    accelerators.forget_peak_memory(device)
    assert accelerators.peak_memory(device) == 0
    with accelerators.generators_put_back([device]):
        module.states[1] = torch.tensor([9])
        assert accelerators.generator_states([device])[1] == 9
    assert module.states[1] == 2
    accelerators.now(device)
    assert module.waited == [device]


def test_an_accelerator_that_tells_little(use):
    module, device = use("mps", indexed=False), torch.device("mps", 0)
    assert accelerators.name_of(device) is None
    assert accelerators.described(device) == "mps:0"
    assert accelerators.peak_memory(device) is None
    accelerators.forget_peak_memory(device)
    with accelerators.generators_put_back([device]):
        module.states[0] = torch.tensor([9])
    assert module.states[0] == 1


def test_the_cpu_has_no_queue_and_a_generator():
    assert not accelerators.is_accelerator(CPU)
    assert accelerators.name_of(CPU) is None
    assert accelerators.peak_memory(CPU) is None
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), accelerators.generators_put_back():
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)
    assert accelerators.accelerators_of([torch.zeros(1)]) == []


def test_stages_wait_for_whatever_accelerator_holds_the_weights(use):
    module, device = use("xpu"), torch.device("xpu", 0)
    part = torch.nn.Identity()
    part.parameters = lambda: iter([SimpleNamespace(device=torch.device("xpu"))])  # pyright: ignore[reportAttributeAccessIssue]
    with StageTimer(None, [(part, "forward", lambda *_: "vision")]) as timer, timer.step():
        part(torch.zeros(1))
    assert set(module.waited) == {device}
    assert len(module.waited) >= 4
