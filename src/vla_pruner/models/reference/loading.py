"""Loading and saving the autoregressive reference policy."""

from __future__ import annotations

from pathlib import Path

import torch

from vla_pruner.models.reference.configuration import ReferenceConfig
from vla_pruner.models.reference.network import ReferencePolicy
from vla_pruner.models.saved import load_saved, save

SHIPPED_WEIGHTS = Path(__file__).parent / "weights"


def load_autoregressive_policy(
    folder: str | Path | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ReferencePolicy:
    """Load the trained autoregressive policy, in eval mode.

    Args:
        folder: with `model.safetensors` and `config.json`; the weights shipped with the package if None.
        device: the policy's device.
        dtype: the parameters' type; the weights are stored in float32.

    Raises:
        UnsupportedModelError: the installed transformers was not tested.
        CheckpointError: a file is missing, damaged, or does not fit the network, or a weight is not finite; the message
            names it.
    """
    folder = SHIPPED_WEIGHTS if folder is None else Path(folder)
    if folder == SHIPPED_WEIGHTS:
        advice = (
            "Reinstall vla-pruner, or restore the file with `git checkout -- src/vla_pruner/models/reference/weights`."
        )
    else:
        advice = "Give a folder that `python -m reference.train` or `save_policy` wrote."
    depths = {"num_layers": "language_model.model.layers.", "vision_layers": "vision.blocks."}
    return load_saved(folder, ReferenceConfig, ReferencePolicy, depths, advice, device, dtype)


def save_policy(policy: ReferencePolicy, folder: str | Path) -> None:
    """Write `model.safetensors` (float32) and `config.json` into `folder`."""
    save(policy, folder, torch.float32)
