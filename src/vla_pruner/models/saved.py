"""Folders with the saved weights of a reference policy; any fault of one is one clear sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vla_pruner.checkpoints.files import described_by, is_file, read_json, reason
from vla_pruner.checkpoints.weights import check_depth, check_finite, check_fit, misfit, read_headers, read_weights
from vla_pruner.errors import CheckpointError
from vla_pruner.versions import check_transformers

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def load_saved(
    folder: Path,
    config_class: Any,
    policy_class: Any,
    depths: Mapping[str, str],
    advice: str,
    device: str | torch.device,
    dtype: torch.dtype,
) -> Any:
    """Load the policy in `folder`, in eval mode.

    Args:
        folder: with `model.safetensors` and `config.json`.
        config_class: has `from_dict`.
        policy_class: is made from a configuration.
        depths: settings that count layers -> the part before a layer's number in the names of weights.
        advice: the fix, for messages.
        device, dtype: of the parameters.

    Raises:
        UnsupportedModelError: the installed transformers was not tested.
        CheckpointError: a file is missing, damaged, or does not fit the network, or a weight is not finite; the message
            names it.
    """
    check_transformers()
    for name in (CONFIG, WEIGHTS):
        if not is_file(folder / name):
            raise CheckpointError(f"The reference policy's file {folder / name} is missing. {advice}")
    path = folder / CONFIG
    try:
        config = config_class.from_dict(read_json(path))
        headers = read_headers(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {advice}") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"The reference policy's file {path} is damaged ({reason(error)}). {advice}") from error
    try:
        for what, before in depths.items():
            check_depth(path, what, getattr(config, what), headers, before)
        with described_by(path), torch.device("meta"):
            described = policy_class(config)
        check_fit(folder, misfit(described.state_dict(), headers))
        weights = read_weights(headers)
    except CheckpointError as error:
        raise CheckpointError(
            f"The reference policy's file {folder / WEIGHTS} does not fit: {error} {advice}"
        ) from error
    policy = policy_class(config)
    policy.load_state_dict(weights)
    policy = policy.to(device=device, dtype=dtype).eval()
    check_finite(policy, folder, headers)
    return policy


def save(policy: Any, folder: str | Path, dtype: torch.dtype) -> None:
    """Write `model.safetensors`, in `dtype`, and `config.json` into `folder`."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().to(dtype).contiguous().cpu() for name, tensor in policy.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes files that only their owner can read
    (folder / CONFIG).write_text(json.dumps(policy.config.to_dict(), indent=2) + "\n", encoding="utf-8")
