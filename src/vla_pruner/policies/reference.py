"""The reference policies: those that ship with the package, by name, and saved ones in folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vla_pruner.checkpoints.files import read_json
from vla_pruner.errors import CheckpointError, UnsupportedModelError
from vla_pruner.models.saved import CONFIG
from vla_pruner.policies.options import as_dtype, usable_device
from vla_pruner.policies.reference_names import DEFAULT, NAMES
from vla_pruner.registry import row_for

if TYPE_CHECKING:
    from vla_pruner.models.chunk import ChunkPolicy
    from vla_pruner.models.reference import ReferencePolicy


def reference_policy(
    name: str | Path | None = None, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None
) -> ReferencePolicy | ChunkPolicy:
    """Load a trained reference policy, in eval mode.

    Args:
        name: "metaworld" (two cameras, a chunk of actions in one pass, for Meta-World), "libero-object" (the same for
            LIBERO-Object), "autoregressive" (one camera, decoded action tokens, for Meta-World), or a folder that
            `save_chunk_policy` or `save_policy` wrote; None: `reference_names.DEFAULT`.
        device: of the policy.
        dtype: the parameters' type, or its name; None: float32.

    Raises:
        OptionError: torch has no such device here, or the dtype is none of weights.
        CheckpointError: a file is missing, damaged, or does not fit the network, or a
            weight is not finite; the message names it.
        UnsupportedModelError: the folder holds another model.
    """
    usable_device(device)
    dtype = as_dtype(dtype) or torch.float32
    folder = policy_folder(name)
    # Shipped weights that are damaged are found by their loader.
    two_cameras = folder.parent == _chunk_weights() or (
        folder != _autoregressive_weights() and kind_of(folder) == "chunk"
    )
    if two_cameras:
        from vla_pruner.models.chunk import load_chunk_policy

        return load_chunk_policy(folder, device, dtype)
    from vla_pruner.models.reference import load_autoregressive_policy

    return load_autoregressive_policy(folder, device, dtype)


def load_reference(
    name: str | Path | None, device: str | torch.device, dtype: torch.dtype | None
) -> ReferencePolicy | ChunkPolicy:
    """Load a policy as `reference_policy` does, for `load_policy`."""
    return reference_policy(name, device, dtype)


def policy_folder(name: str | Path | None = None) -> Path:
    """Return the folder of a reference policy's weights. Arguments as in `reference_policy`.

    Raises:
        CheckpointError: there is none.
    """
    name = DEFAULT if name is None else name
    if not isinstance(name, (str, Path)) or not str(name):
        raise CheckpointError(f"reference_policy was given {name!r}; give {_CHOICES}.")
    if name == "autoregressive":
        return _autoregressive_weights()
    if name in NAMES:  # a folder of that name is Path('metaworld') or './metaworld'
        return _chunk_weights() / str(name)
    folder = Path(name)
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no reference policy {str(name)!r}, and no folder of that name; give {_CHOICES}."
        )
    return folder


def kind_of(folder: Path) -> str:
    """Return the network that a folder was saved from, by its config.json: "chunk" or "autoregressive".

    Raises:
        CheckpointError: it has no config.json that can be read.
        UnsupportedModelError: it is of another model.
    """
    row = row_for(read_json(folder / CONFIG))
    kind = None if row is None else {"reference": "autoregressive", "reference-chunk": "chunk"}.get(row.name)
    if kind is None:
        raise UnsupportedModelError(
            f"{folder / CONFIG} is not that of a reference policy; give {_CHOICES}, or load other policies with "
            "vla_pruner.load_policy."
        )
    return kind


def _chunk_weights() -> Path:
    from vla_pruner.models.chunk.loading import SHIPPED_WEIGHTS

    return SHIPPED_WEIGHTS


def _autoregressive_weights() -> Path:
    from vla_pruner.models.reference.loading import SHIPPED_WEIGHTS

    return SHIPPED_WEIGHTS


_CHOICES = f"one of {', '.join(map(repr, NAMES))}, or a folder that save_chunk_policy or save_policy wrote"
