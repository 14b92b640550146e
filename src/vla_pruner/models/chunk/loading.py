"""Loading and saving the two-camera reference policies; whatever is wrong with their files is one clear sentence."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vla_pruner.models.chunk.configuration import ChunkConfig
from vla_pruner.models.chunk.network import ChunkPolicy

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


def load_chunk_policy(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ChunkPolicy:
    """A policy that `save_chunk_policy` wrote, in eval mode.

    Args:
        folder: with `model.safetensors` and `config.json`.
        device: where to put it.
        dtype: the parameters' type; the weights are stored in float16.

    Raises:
        ValueError: a file is missing, damaged, or does not fit the network; the message names it.
    """
    folder = Path(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"The policy's file {folder / name} is missing.")
    try:
        config = ChunkConfig.from_dict(json.loads((folder / _CONFIG).read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"The policy's file {folder / _CONFIG} is damaged ({error}).") from error
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(folder / _WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"The policy's file {folder / _WEIGHTS} is damaged ({error}).") from error
    policy = ChunkPolicy(config)
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"The policy's file {folder / _WEIGHTS} does not fit {folder / _CONFIG} ({reason})."
        ) from error
    return policy.to(device=device, dtype=dtype).eval()


def save_chunk_policy(policy: ChunkPolicy, folder: str | Path) -> None:
    """Writes `model.safetensors` (float16) and `config.json` into `folder`."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().half().contiguous().cpu() for name, tensor in policy.state_dict().items()}
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _WEIGHTS).chmod(0o644)  # safetensors writes files that only their owner can read
    (folder / _CONFIG).write_text(json.dumps(policy.config.to_dict(), indent=2) + "\n")
