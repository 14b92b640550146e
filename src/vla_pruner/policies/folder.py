"""Checkpoint folders: what they hold, and weights that must all fit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from vla_pruner.errors import CheckpointError

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; give the folder of a whole checkpoint.") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Download it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no settings by name. Download it again.")
    return values


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors, one file or shards, by its stored name.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / _INDEX
    names = sorted(set(read_json(index).get("weight_map", {}).values())) if index.is_file() else [_SINGLE]
    weights: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; weights are read from safetensors alone.")
        try:
            weights |= load_file(folder / name)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{folder / name} is damaged ({error}). Download it again.") from error
    return weights


def check_names(folder: Path, expected: dict[str, Tensor], found: dict[str, Tensor], optional: Iterable[str]) -> None:
    """Compare a checkpoint's tensors with a model's.

    Args:
        folder: for the message.
        expected: the model's, by name.
        found: the checkpoint's, by the model's names.
        optional: names that may be absent.

    Raises:
        CheckpointError: weights are missing, unexpected or of another shape; it lists them.
    """
    missing = sorted(set(expected) - set(found) - set(optional))
    unexpected = sorted(set(found) - set(expected))
    wrong = [
        f"{name} {tuple(found[name].shape)}, not {tuple(expected[name].shape)}"
        for name in sorted(set(expected) & set(found))
        if found[name].shape != expected[name].shape
    ]
    if missing or unexpected or wrong:
        raise CheckpointError(
            f"The weights in {folder} do not fit its config.json. Missing: {_listed(missing)}. Unexpected: "
            f"{_listed(unexpected)}. Of another shape: {_listed(wrong)}."
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
