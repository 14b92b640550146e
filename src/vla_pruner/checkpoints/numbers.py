"""Numbers in files: a size is a count in a sane range, a statistic is finite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vla_pruner.checkpoints.files import AGAIN, shown
from vla_pruner.checks import is_number
from vla_pruner.errors import CheckpointError

MOST = 2**24
"""The largest size that is accepted; no published policy has one as large."""


def check_counts(path: Path, values: Mapping[str, Any], *names: str, least: int = 1, most: int = MOST) -> None:
    """Refuse settings that are no counts. Absent ones are passed over, and None too.

    Raises:
        CheckpointError: one is no int from `least` to `most`.
    """
    for name in names:
        value = values.get(name)
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise CheckpointError(
                f"{path} has {name} {shown(repr(value))}; it must be an int from {least} to {most}. {AGAIN}"
            )


def check_positive(path: Path, values: Mapping[str, Any], *names: str) -> None:
    """Refuse settings that are no finite numbers above 0. Absent ones are passed over.

    Raises:
        CheckpointError: naming one.
    """
    for name in names:
        value = values.get(name, 1)
        if not is_number(value) or value <= 0:
            raise CheckpointError(
                f"{path} has {name} {shown(repr(value))}; it must be a finite number above 0. {AGAIN}"
            )


def finite_row(path: Path, what: str, values: Any) -> np.ndarray:
    """Return a list of numbers as (n,) float64.

    Args:
        path: the file, for the message.
        what: their name, for the message.
        values: the value in the file.

    Raises:
        CheckpointError: it is no flat list of finite numbers, or empty.
    """
    if not isinstance(values, (list, tuple)) or not values or not all(is_number(value) for value in values):
        raise CheckpointError(
            f"{path} has {what} {shown(repr(values))}; it must be a list of finite numbers (no NaN, no infinity, no "
            f"text). {AGAIN}"
        )
    return np.asarray(values, dtype=np.float64)


def finite_action(action: np.ndarray, module: nn.Module) -> np.ndarray:
    """Return `action` if all of it is finite.

    Raises:
        CheckpointError: it is not; the network's inputs are finite, so the fault is in the network.
    """
    if not np.isfinite(action).all():
        raise no_action(module)
    return action


def no_action(module: nn.Module) -> CheckpointError:
    """Return the error of a network that gives numbers that are not finite.

    Args:
        module: the part that computed them, for its dtype.
    """
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    advice = "float16 overflows beyond 65504: load the policy with dtype=torch.bfloat16 or torch.float32. "
    return CheckpointError(
        f"The policy gave numbers that are not finite (NaN or infinity) in {dtype}, though its inputs are finite, so "
        f"there is no action. {advice if dtype == 'float16' else ''}If weights were changed, they may have diverged; "
        "else the checkpoint is damaged: download it again."
    )
