"""One call that loads any supported policy, whose kind the folder decides."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vla_pruner.checkpoints.files import checkpoint_folder, read_json, shown
from vla_pruner.errors import CheckpointError, OptionError, UnsupportedModelError
from vla_pruner.families.refused import NOT_LOADED
from vla_pruner.families.vlm import KINDS
from vla_pruner.plugins import object_at
from vla_pruner.policies.base import Policy
from vla_pruner.policies.options import as_dtype, usable_device
from vla_pruner.policies.reference import NAMES, load_reference
from vla_pruner.registry import ROWS, Row, row_for
from vla_pruner.versions import check_transformers

REFERENCE = "reference"


def load_policy(
    path_or_hub_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> Policy:
    """Load a policy with everything that `act` needs, in eval mode.

    Args:
        path_or_hub_id: the folder of a published checkpoint as it is, its name on the Hugging Face hub, "reference" for
            the policy that ships with this package, or "reference:NAME" for one of several (see `reference_policy`).
        device: of the policy.
        dtype: of its weights, as torch's or by its name ("bfloat16"); None: the default of its family.
        **options: of its loader: `load_openvla` (unnorm_key, cameras, quantization, ...), `load_pi0` (cameras,
            attn_implementation), `load_lerobot` or `reference_policy`.

    Raises:
        UnsupportedModelError: the folder holds another model, or a package that its family needs is not installed, or
            not in a version that was tested.
        CheckpointError: a file is missing or damaged, or weights are missing or unexpected: it lists them.
        OptionError: an option is not one of the family's, there is no such device, or no such dtype.
    """
    check_transformers()
    usable_device(device)
    dtype = as_dtype(dtype)
    if not isinstance(path_or_hub_id, (str, Path)) or not str(path_or_hub_id):
        raise CheckpointError(
            f"load_policy was given {path_or_hub_id!r} in place of a checkpoint; give its folder, its name on the "
            "Hugging Face hub, or 'reference' for the policy that ships with vla-pruner."
        )
    if isinstance(path_or_hub_id, str) and path_or_hub_id.partition(":")[0] == REFERENCE:
        # A folder of that name is Path('reference') or './reference'.
        name = _reference_name(path_or_hub_id)
        return _load(load_reference, "the reference policy", name, device, dtype, options)
    folder = checkpoint_folder(path_or_hub_id)
    row = _row(folder, read_json(folder / "config.json"))
    return _load(object_at(str(row.load), "function"), row.title, folder, device, dtype, options)


def _row(folder: Path, config: dict[str, Any]) -> Row:
    """Return the row of the folder's policy."""
    row = row_for(config)
    if row is not None and row.load is not None:
        return row
    model_type, kind = config.get("model_type"), config.get("type")
    if model_type in KINDS:
        raise UnsupportedModelError(
            f"{folder / 'config.json'} is of a vision-language model of type {shown(repr(model_type))}, which has no "
            "act of its own. Load it with transformers, AutoModelForImageTextToText.from_pretrained(...), and attach "
            "to it: VLAPruner(keep=0.25).attach(model). See docs/vlm.md."
        )
    if model_type is None and isinstance(kind, str) and kind in NOT_LOADED:
        raise UnsupportedModelError(f"{folder / 'config.json'}: {NOT_LOADED[kind]}")
    if model_type is not None:
        found = f"is of a model of type {shown(repr(model_type))}"
    elif kind is not None:
        found = f"is of a LeRobot policy of type {shown(repr(kind))}"
    else:
        found = "names no model"
    raise UnsupportedModelError(f"{folder / 'config.json'} {found}; supported are {supported()}.")


def supported() -> str:
    """Return the checkpoints that `load_policy` loads, for messages."""
    kinds = []
    for row in ROWS:
        told = [f"{key} {value!r}" for key, value in (row.config or {}).items() if isinstance(value, str)]
        if row.load is not None and told:
            kinds.append(f"{row.title} (config.json with {' and '.join(told)})")
    return (
        f"{', '.join(kinds)}, a folder that a reference policy was saved in, and the names 'reference' and "
        "'reference:NAME'"
    )


def _load(
    loader: Callable[..., Any],
    name: str,
    folder: str | Path | None,
    device: str | torch.device,
    dtype: torch.dtype | None,
    options: dict[str, Any],
) -> Any:
    known = [option for option in inspect.signature(loader).parameters if option not in ("device", "dtype")][1:]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise OptionError(
            f"load_policy was given {', '.join(unknown)}; for {name} it takes {', '.join(known) or 'no options'}."
        )
    return loader(folder, device=device, dtype=dtype, **options)


def _reference_name(text: str) -> str | None:
    """NAME of "reference:NAME"; None of "reference".

    Raises:
        CheckpointError: there is no reference policy of that name.
    """
    _, colon, name = text.partition(":")
    if not colon:
        return None
    if name not in NAMES:
        raise CheckpointError(
            f"There is no reference policy {name!r}; give {' or '.join(f'{REFERENCE}:{one}' for one in NAMES)}."
        )
    return name
