"""Names, memory, random generators and timing of devices, for any kind of accelerator that torch knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor


def is_accelerator(device: torch.device) -> bool:
    """Return True if work on the device is queued, so that a call may return before its work is done."""
    return device.type not in ("cpu", "meta")


def now(device: torch.device) -> float:
    """Wait until the device has done all work that is queued on it, then return the time in seconds."""
    if is_accelerator(device):
        torch.accelerator.synchronize(device)
    return perf_counter()


def available() -> list[torch.device]:
    """Return the accelerators that this build of torch can use on this machine."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    return [] if kind is None else [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]


def accelerators_of(parameters: Iterable[Tensor]) -> list[torch.device]:
    """Return the accelerators that hold any of these tensors, each once and with its index."""
    found = {one.device for one in parameters if is_accelerator(one.device)}
    return sorted((torch.device(one.type, one.index or 0) for one in found), key=str)


def name_of(device: torch.device) -> str | None:
    """Return the product name of an accelerator; None if torch does not know it."""
    about = getattr(torch.get_device_module(device), "get_device_properties", None)
    return None if about is None or not is_accelerator(device) else getattr(about(device), "name", None)


def described(device: torch.device) -> str:
    """Describe an accelerator in words: its torch name, its product name, its memory and, on CUDA, its compute
    capability.
    """
    known = getattr(torch.get_device_module(device), "get_device_properties", None)
    if known is None:
        return str(device)
    about = known(device)
    words = [f"{device} {about.name}", f"{about.total_memory / 2**30:.0f} GiB"]
    if hasattr(about, "major"):
        words.append(f"compute capability {about.major}.{about.minor}")
    return ", ".join(words)


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that torch had allocated on the device since `forget_peak_memory`; None if it does not
    count them.
    """
    peak = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return None if peak is None or not is_accelerator(device) else peak(device)


def forget_peak_memory(device: torch.device) -> None:
    """Restart the count of peak memory, if torch counts it on this device."""
    forget = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
    if forget is not None and is_accelerator(device):
        forget(device)


def generator_states(devices: Iterable[torch.device] = ()) -> list[Tensor]:
    """Return the states of torch's random generators: the CPU's first, then those of the accelerators."""
    return [torch.get_rng_state(), *map(_state, devices)]


@contextmanager
def generators_put_back(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Restore the states of torch's random generators at the end of the block."""
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
