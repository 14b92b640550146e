"""Loading and saving the reference policy's weights; whatever is wrong with them is one clear sentence."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vla_pruner.checkpoints.files import described_by, is_file, read_json, reason
from vla_pruner.checkpoints.weights import check_depth, check_finite, check_fit, misfit, read_headers, read_weights
from vla_pruner.errors import CheckpointError
from vla_pruner.models.reference.configuration import ReferenceConfig
from vla_pruner.models.reference.network import ReferencePolicy
from vla_pruner.versions import check_transformers

SHIPPED_WEIGHTS = Path(__file__).parent / "weights"
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


def reference_policy(
    path: str | Path | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ReferencePolicy:
    """The trained reference policy, in eval mode.

    Args:
        path: a folder with `model.safetensors` and `config.json`; the weights shipped with the package if None.
        device: where to put it.
        dtype: the parameters' type; the weights are stored in float32.

    Raises:
        UnsupportedModelError: the installed transformers was not tested.
        ValueError: a file is missing, damaged, or does not fit the network; the message names it.
    """
    check_transformers()
    folder = SHIPPED_WEIGHTS if path is None else Path(path)
    advice = (
        "Reinstall vla-pruner, or restore the file with `git checkout -- src/vla_pruner/models/reference/weights`."
        if path is None
        else "Give a folder that `python -m reference.train` or `save_policy` wrote."
    )
    for name in (_CONFIG, _WEIGHTS):
        if not is_file(folder / name):
            raise ValueError(f"The reference policy's file {folder / name} is missing. {advice}")
    path = folder / _CONFIG
    try:
        values = read_json(path)
        config = ReferenceConfig.from_dict(values)
        headers = read_headers(folder)
    except CheckpointError as error:
        raise ValueError(f"{error} {advice}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"The reference policy's file {path} is damaged ({reason(error)}). {advice}") from error
    try:
        for what, before in (("num_layers", "language_model.model.layers."), ("vision_layers", "vision.blocks.")):
            check_depth(path, what, getattr(config, what), headers, before)
        with described_by(path), torch.device("meta"):
            described = ReferencePolicy(config)
        check_fit(folder, misfit(described.state_dict(), headers))
        weights = read_weights(headers)
    except CheckpointError as error:
        raise ValueError(f"The reference policy's file {folder / _WEIGHTS} does not fit: {error} {advice}") from error
    policy = ReferencePolicy(config)
    policy.load_state_dict(weights)
    policy = policy.to(device=device, dtype=dtype).eval()
    check_finite(policy, folder, headers)
    return policy


def save_policy(policy: ReferencePolicy, folder: str | Path) -> None:
    """Writes `model.safetensors` (float32) and `config.json` into `folder`."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().float().contiguous().cpu() for name, tensor in policy.state_dict().items()}
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _WEIGHTS).chmod(0o644)  # safetensors writes files that only their owner can read
    (folder / _CONFIG).write_text(json.dumps(policy.config.to_dict(), indent=2) + "\n")
