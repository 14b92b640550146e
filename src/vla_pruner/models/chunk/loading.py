"""Loading and saving the two-camera reference policies."""

from __future__ import annotations

from pathlib import Path

import torch

from vla_pruner.models.chunk.configuration import ChunkConfig
from vla_pruner.models.chunk.network import ChunkPolicy
from vla_pruner.models.saved import load_saved, save

SHIPPED_WEIGHTS = Path(__file__).parent / "weights"
"""The folder with one folder of weights for each simulator."""


def load_chunk_policy(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ChunkPolicy:
    """Load a policy that `save_chunk_policy` wrote, in eval mode.

    Args:
        folder: with `model.safetensors` and `config.json`.
        device: the policy's device.
        dtype: the parameters' type; the weights are stored in float16.

    Raises:
        UnsupportedModelError: the installed transformers was not tested.
        CheckpointError: a file is missing, damaged, or does not fit the network, or a weight is not finite; the message
            names it.
    """
    folder = Path(folder)
    if folder.parent == SHIPPED_WEIGHTS:
        advice = "Reinstall vla-pruner, or restore the file with `git checkout -- src/vla_pruner/models/chunk/weights`."
    else:
        advice = "Give a folder that `save_chunk_policy` wrote."
    depths = {"num_layers": "decoder.layers.", "vision_layers": "vision.blocks."}
    return load_saved(folder, ChunkConfig, ChunkPolicy, depths, advice, device, dtype)


def save_chunk_policy(policy: ChunkPolicy, folder: str | Path) -> None:
    """Write `model.safetensors` (float16) and `config.json` into `folder`."""
    save(policy, folder, torch.float16)
