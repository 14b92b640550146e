"""The package's own arithmetic is float32, whatever the model around it runs in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def own_arithmetic(function: Callable[P, R]) -> Callable[P, R]:
    """Make `function` run outside of autograd and of `torch.autocast`.

    Under autocast a product of float32 tensors is bfloat16: scores would be rounded, and their ties and their largest
    numbers others.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), _without_autocast("cpu"), _without_autocast(_ACCELERATOR):
            return function(*args, **kwargs)

    return run


def autocast_on(device: torch.device) -> torch.dtype | None:
    """Return the type of `torch.autocast` for a device; None if it is off, as it is within `own_arithmetic`."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _accelerator() -> str:
    """Return the type of accelerator that torch was built for."""
    found = torch.accelerator.current_accelerator(check_available=False)
    return "cuda" if found is None else found.type


# Looked up once, because compiled code cannot look it up.
_ACCELERATOR = _accelerator()


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    # Entering and leaving autocast costs more than a check that it is off.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
