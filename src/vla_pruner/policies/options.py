"""Options that every loader takes: impossible ones are refused before a checkpoint is read."""

from __future__ import annotations

import torch

from vla_pruner.errors import OptionError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def usable_device(device: str | torch.device, flag: str | None = None) -> torch.device:
    """Return the device of this name.

    Args:
        device: as torch names it.
        flag: of the command line that named it.

    Raises:
        OptionError: there is no such device, or this torch cannot use it; the message says why.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        there = ["'cpu'"]
        if torch.cuda.is_available():
            there += [f"'cuda:{index}'" for index in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            there.append("'mps'")
        given = f"device={str(device)!r} was given" if flag is None else f"{flag} is {device}"
        raise OptionError(f"{given}, which torch cannot use here ({reason}); there is {', '.join(there)}.") from error
    return found


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype of weights that is meant; None stays None.

    Args:
        dtype: a floating point dtype of torch, or its name.

    Raises:
        OptionError: it is none of "float32", "bfloat16", "float16" and "float64".
    """
    if dtype is None:
        return None
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise OptionError(
            f"dtype={dtype!r} was given; weights are one of {', '.join(map(repr, _DTYPES))}, as that name or as "
            "torch's dtype."
        )
    return found
