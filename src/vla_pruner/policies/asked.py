"""The policy that a command line asks for: a checkpoint's, or one with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vla_pruner.errors import CheckpointError, UnsupportedModelError
from vla_pruner.policies.base import Policy
from vla_pruner.policies.loading import load_policy
from vla_pruner.policies.options import as_dtype, usable_device
from vla_pruner.policies.random import random_policy
from vla_pruner.registry import row_named


def asked_policy(
    name: str,
    *,
    random_weights: bool,
    size: str | None,
    device: str,
    dtype: str | None,
    options: Mapping[str, Any],
    seed: int = 0,
) -> Policy:
    """Return the policy of the flags that `flags.add_weights` adds.

    Args:
        name: as of `load_policy`; with random weights as of `random_policy`.
        random_weights: whether weights are drawn.
        size: of random weights; None: "tiny".
        device: as torch names it.
        dtype: of the weights, by torch's name; None: the checkpoint's, and float32 of random weights.
        options: for `load_policy`.
        seed: of random weights.

    Raises:
        VLAPrunerError: as of `load_policy` and `random_policy`; the message names flags.
    """
    usable_device(device, "--device")
    if random_weights:
        return random_policy(name, size or "tiny", device, as_dtype(dtype) or torch.float32, seed)
    try:
        return load_policy(name, device, dtype, **options)
    except CheckpointError as error:
        row = row_named(name)
        if row is not None and row.random is not None:
            raise CheckpointError(f"{error} Without a checkpoint: --random-weights.") from error
        raise
    except NotImplementedError as error:
        raise UnsupportedModelError(f"{name} asks for something that is not supported: {error}") from error
