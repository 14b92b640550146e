"""The conditions under which a result was measured: versions, machine, threads, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vla_pruner.conditions import machine_conditions, sha256
from vla_pruner.families import family_of

_PACKAGES = (
    "vla-pruner", "torch", "transformers", "numpy", "safetensors", "metaworld", "mujoco", "gymnasium", "hf-libero",
    "robosuite",
)  # fmt: skip


def conditions(policy: Any, weights: Path | None) -> dict[str, Any]:
    """Return everything that a reader needs to judge or repeat a run, as plain JSON values.

    Args:
        policy: the policy that runs.
        weights: its weights file, hashed; None if it came from elsewhere.
    """
    parameters = list(policy.parameters())
    return {
        **machine_conditions(_PACKAGES),
        "device": str(parameters[0].device) if parameters else "cpu",
        "dtype": str(parameters[0].dtype).removeprefix("torch.") if parameters else None,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "image_size": policy.config.image_size,
        "policy": type(policy).__name__,
        "cameras": list(policy.cameras),
        "attention": family_of(policy).backend,
        "weights_sha256": sha256(weights) if weights is not None else None,
    }
