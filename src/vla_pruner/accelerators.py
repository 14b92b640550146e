"""What torch says of devices, whatever kind of accelerator they are: their names, their memory, their generators, and
how long what they were given takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor


def is_accelerator(device: torch.device) -> bool:
    """Whether work on it is queued, so that a call that came back need not be done."""
    return device.type not in ("cpu", "meta")


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if is_accelerator(device):
        torch.accelerator.synchronize(device)
    return perf_counter()


def available() -> list[torch.device]:
    """The accelerators that this torch can use here."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    return [] if kind is None else [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]


def accelerators_of(parameters: Iterable[Tensor]) -> list[torch.device]:
    """The accelerators that hold some of these tensors, each once and with its index."""
    found = {one.device for one in parameters if is_accelerator(one.device)}
    return sorted((torch.device(one.type, one.index or 0) for one in found), key=str)


def name_of(device: torch.device) -> str | None:
    """The product's name, as far as torch knows it."""
    about = getattr(torch.get_device_module(device), "get_device_properties", None)
    return None if about is None or not is_accelerator(device) else getattr(about(device), "name", None)


def described(device: torch.device) -> str:
    """An accelerator in words: what it is called, its name, its memory, and on CUDA its compute capability."""
    known = getattr(torch.get_device_module(device), "get_device_properties", None)
    if known is None:
        return str(device)
    about = known(device)
    words = [f"{device} {about.name}", f"{about.total_memory / 2**30:.0f} GiB"]
    if hasattr(about, "major"):
        words.append(f"compute capability {about.major}.{about.minor}")
    return ", ".join(words)


def peak_memory(device: torch.device) -> int | None:
    """Bytes that torch had allocated there at the most since `forget_peak_memory`; None if it does not count them."""
    peak = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return None if peak is None or not is_accelerator(device) else peak(device)


def forget_peak_memory(device: torch.device) -> None:
    """Count the peak from now on, where it is counted at all."""
    forget = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
    if forget is not None and is_accelerator(device):
        forget(device)


def generator_states(devices: Iterable[torch.device] = ()) -> list[Tensor]:
    """Where torch's generators are, that of the CPU and those of accelerators: what draws at random changes it."""
    return [torch.get_rng_state(), *map(_state, devices)]


@contextmanager
def generators_put_back(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Within it draws at random change nothing outside: afterwards the generators are where they were."""
    devices = list(devices)
    before = generator_states(devices)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        for device, state in zip(devices, before[1:], strict=True):
            _put_back(device, state)


def _state(device: torch.device) -> Tensor:
    module: Any = torch.get_device_module(device)
    return module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)


def _put_back(device: torch.device, state: Tensor) -> None:
    module: Any = torch.get_device_module(device)
    module.set_rng_state(state) if device.type == "mps" else module.set_rng_state(state, device)
