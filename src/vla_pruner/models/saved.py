"""Folders that a reference policy's weights are saved in; whatever is wrong with one is one clear sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vla_pruner.errors import CheckpointError

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def load_saved(folder: Path, config_class: Any, policy_class: Any, advice: str) -> Any:
    """The policy in `folder`, in float32 and on the CPU.

    Args:
        folder: with `model.safetensors` and `config.json`.
        config_class: has `from_dict`.
        policy_class: is made from a configuration.
        advice: what to do, for messages.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the network, or a weight is not finite; the message
            names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"The reference policy's file {folder / name} is missing. {advice}")
    try:
        policy = policy_class(config_class.from_dict(json.loads((folder / CONFIG).read_text(encoding="utf-8"))))
    except Exception as error:  # of settings of another type or size torch and transformers raise anything
        raise CheckpointError(
            f"The reference policy's file {folder / CONFIG} is damaged ({_first_line(error)}). {advice}"
        ) from error
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"The reference policy's file {folder / WEIGHTS} is damaged ({_first_line(error)}). {advice}"
        ) from error
    wrong = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
    if wrong is not None:
        raise CheckpointError(
            f"The reference policy's file {folder / WEIGHTS} is damaged: {wrong} holds numbers that are not finite "
            f"(NaN or infinity). {advice}"
        )
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"The reference policy's file {folder / WEIGHTS} does not fit {folder / CONFIG} ({reason}). {advice}"
        ) from error
    return policy


def save(policy: Any, folder: str | Path, dtype: torch.dtype) -> None:
    """Writes `model.safetensors`, in `dtype`, and `config.json` into `folder`."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().to(dtype).contiguous().cpu() for name, tensor in policy.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes files that only their owner can read
    (folder / CONFIG).write_text(json.dumps(policy.config.to_dict(), indent=2) + "\n", encoding="utf-8")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
