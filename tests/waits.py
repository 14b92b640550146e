"""A stand-in for an accelerator on a CPU, which detects everything that would make the host wait for the device.

Tensors stay on the CPU and compute as usual. The stand-in notes which of them would be on the device, reports this
device as `tensor.device`, and follows them through every call. A wait is anything that blocks the host on CUDA: reading
numbers (`item`, `tolist`, `bool`, `float`), copies to the host, copies to the device that are not `non_blocking` (a
list that becomes a tensor or an index is one), and sizes that depend on data. Calls other than copies that mix device
and host raise an error.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# A kind of accelerator for which the code has no branch of its own.
DEVICE = torch.device("xpu", 0)
TORCH = str(Path(torch.__file__).parent)
_MARK = "_on_the_stand_in"

GETTERS = {
    torch.Tensor.device.__get__: lambda placed: DEVICE if placed else torch.device("cpu"),  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: lambda placed: not placed,  # type: ignore[attr-defined]
    torch.Tensor.is_xpu.__get__: lambda placed: placed,  # type: ignore[attr-defined]
}
READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "equal",
    "allclose",
    "bincount",
    "_linalg_check_errors",
}
"""Operators that read values on the device, or whose result's size depends on such values."""
CALLS = {
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__complex__",
    "__index__",
    "__contains__",
    "is_nonzero",
    "nonzero",
    "argwhere",
    "masked_select",
    "unique",
    "unique_consecutive",
    "equal",
    "allclose",
    "bincount",
    "inverse",
    "arange",
    "full",
    "linspace",
    "zeros",
    "ones",
    "empty",
    "scalar_tensor",
}
"""Calls that read such values."""


@dataclass(frozen=True)
class Wait:
    """One wait of the host.

    Attributes:
        what: name of the call.
        site: innermost file and line outside of torch.
        stack: all files and lines outside of torch, the innermost first.
    """

    what: str
    site: str
    stack: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.what} at " + " < ".join(self.stack[:6])


class StandIn(TorchFunctionMode):
    """A context that watches the tensors placed on the device, and all tensors that are computed from them.

    Attributes:
        waits: waits of the host so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self._operators = _Operators(self)

    def __enter__(self) -> StandIn:
        super().__enter__()
        self._operators.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._operators.__exit__(*args)
        super().__exit__(*args)

    def place(self, value: Any) -> Any:
        """Place the tensors in a value, or all tensors of a module, on the device."""
        if isinstance(value, nn.Module):
            for module in value.modules():
                for part in (*vars(module).values(), *module._parameters.values(), *module._buffers.values()):
                    self.place(part) if isinstance(part, Tensor) else None
            return value
        for tensor in _tensors(value):
            _mark(tensor, True)
        return value

    def note(self, what: str) -> None:
        """Record a wait of the host, with the place in the code."""
        frame, found = sys._getframe(1), list[str]()
        while frame is not None:
            path = frame.f_code.co_filename
            if path != __file__ and not path.startswith((TORCH, "<")):
                found.append(f"{'/'.join(Path(path).parts[-3:])}:{frame.f_lineno}")
            frame = frame.f_back  # type: ignore[assignment]
        self.waits.append(Wait(what, found[0], tuple(found)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func in GETTERS:
            return GETTERS[func](is_placed(args[0]))
        if name == "__get__" or name == "__set__":
            return _marked(func(*args, **kwargs), is_placed(args[0]))
        if name == "to":
            return self._to(*args, **kwargs)
        if name in ("cpu", "xpu"):
            return self._moved(args[0], name == "xpu", args[0].dtype, bool(kwargs.get("non_blocking")))
        if name == "get_device":
            return DEVICE.index if is_placed(args[0]) else -1
        if name == "copy_":
            blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if is_placed(args[0]) != is_placed(args[1]) and (blocking or is_placed(args[1])) and args[0].numel():
                self.note("copy_")
            return func(*args, **kwargs)
        found = list(_tensors((args, kwargs)))
        placed = any(map(is_placed, found))
        if name in ("numpy", "__array__") and placed:
            raise TypeError("A tensor on the device was to be an array; copy it to the host first.")
        seen, device, goes, copies = len(self.waits), kwargs.get("device"), placed, False
        if device is not None:
            goes = torch.device(device).type == DEVICE.type
            kwargs["device"] = "cpu"
            copies = name in ("tensor", "as_tensor", "new_tensor", "asarray") and goes and not placed
        if name in ("__getitem__", "__setitem__") and is_placed(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(one, list) or _on_host(one) for one in index):
                self.note(f"{name} by a list or by what is on the host")
        elif placed and device is None and name not in ("index_put_", "index_put", "to_dense"):
            for tensor in found:
                if _on_host(tensor):
                    raise RuntimeError(f"{name} was given tensors on the device and on the host.")
        result = func(*args, **kwargs)
        # In inference mode torch's own code bypasses its dispatcher.
        reads = placed and (name in CALLS or name.startswith("linalg_") or (name == "where" and len(args) == 1))
        if (copies and result.numel()) or (reads and len(self.waits) == seen):
            self.note(name)
        return _marked(result, goes)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        goes, dtype, flags = is_placed(tensor), kwargs.get("dtype") or tensor.dtype, []
        for given in (*args, kwargs.get("device"), kwargs.get("other")):
            if isinstance(given, torch.dtype):
                dtype = given
            elif isinstance(given, Tensor):
                goes, dtype = is_placed(given), given.dtype
            elif isinstance(given, bool):
                flags.append(given)
            elif given is not None:
                goes = torch.device(given).type == DEVICE.type
        copy = bool(kwargs.get("copy", flags[1] if len(flags) > 1 else False))
        moved = self._moved(tensor, goes, dtype, bool(kwargs.get("non_blocking", flags[0] if flags else False)))
        return _marked(moved.clone(), goes) if copy and moved is tensor else moved

    def _moved(self, tensor: Tensor, goes: bool, dtype: torch.dtype, non_blocking: bool) -> Tensor:
        if goes == is_placed(tensor):
            return _marked(tensor.to(dtype), goes)
        if tensor.numel() and not (goes and non_blocking):  # an empty tensor needs no copy
            self.note("a copy to the device" if goes else "a copy to the host")
        return _marked(tensor.to(dtype, copy=True), goes)


class _Operators(TorchDispatchMode):
    """Watches the operators that torch's own code runs within a call."""

    def __init__(self, stand_in: StandIn) -> None:
        super().__init__()
        self._stand_in = stand_in

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        placed = any(map(is_placed, _tensors((args, kwargs))))
        name = func.overloadpacket.__name__
        if placed:
            by_mask = name.startswith("index") and any(
                one.dtype in (torch.bool, torch.uint8) for one in _tensors(args[1:2] if len(args) > 1 else ())
            )
            unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
            if name in READS or (by_mask and name in ("index", "index_put", "index_put_")) or unsized:
                self._stand_in.note(name)
        result = func(*args, **kwargs)
        return _marked(result, True) if placed else result


def is_placed(value: Any) -> bool:
    """Return True for a tensor on the device."""
    return isinstance(value, Tensor) and getattr(value, _MARK, False)


def added(attached: list[Wait], untouched: list[Wait]) -> list[Wait]:
    """Return the waits of a control step that the model itself did not have, one for each place and kind."""
    most = Counter((wait.what, wait.site) for wait in untouched)
    more = Counter((wait.what, wait.site) for wait in attached) - most
    return [next(wait for wait in attached if (wait.what, wait.site) == key) for key in more]


def _on_host(value: Any) -> bool:
    """Return True for a host tensor that a call on the device cannot take (single numbers are allowed)."""
    return isinstance(value, Tensor) and value.dim() > 0 and not is_placed(value)


def _mark(tensor: Tensor, placed: bool) -> None:
    setattr(tensor, _MARK, placed)


def _marked(value: Any, placed: bool) -> Any:
    for tensor in _tensors(value):
        _mark(tensor, placed)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
