"""One call that loads any supported policy: what it is, its folder says."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vla_pruner.checkpoints.files import checkpoint_folder, read_json, shown
from vla_pruner.errors import BudgetError, CheckpointError, UnsupportedModelError
from vla_pruner.policies.base import Policy
from vla_pruner.policies.options import as_dtype, usable_device
from vla_pruner.policies.reference import NAMES, kind_of_config, reference_policy
from vla_pruner.versions import check_transformers

LEROBOT_TYPES = ("pi0", "pi05", "smolvla")
SUPPORTED = (
    "OpenVLA and OpenVLA-OFT (config.json with model_type 'openvla'), pi0 of transformers (model_type 'pi0'), "
    "LeRobot's policies of type 'pi0', 'pi05' and 'smolvla', a folder that a reference policy was saved in, and the "
    "names 'reference' and 'reference:NAME'"
)
REFERENCE = "reference"


def load_policy(
    path_or_hub_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> Policy:
    """A policy with everything that `act` needs, in eval mode.

    Args:
        path_or_hub_id: the folder of a published checkpoint as it is, its name on the Hugging Face hub, "reference" for
            the policy that ships with this package, or "reference:NAME" for one of several (see `reference_policy`).
        device: where it is put.
        dtype: of its weights, as torch's or by its name ("bfloat16"); None: what its family takes for granted.
        **options: of the family: `load_openvla` (unnorm_key, cameras, quantization, ...), `load_pi0` (cameras,
            attn_implementation), `load_lerobot` or `reference_policy`.

    Raises:
        UnsupportedModelError: the folder holds another model, or what its family needs is not installed, or not in a
            version that was tested.
        CheckpointError: a file is missing or damaged, or weights are missing or unexpected: it lists them.
        BudgetError: an option is not one of the family's, there is no such device, or no such dtype.
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
        return _load(_reference, "the reference policy", _reference_name(path_or_hub_id), device, dtype, options)
    folder = checkpoint_folder(path_or_hub_id)
    config = read_json(folder / "config.json")
    name, loader = _family(folder, config)
    return _load(loader, name, folder, device, dtype, options)


def _family(folder: Path, config: dict[str, Any]) -> tuple[str, Callable[..., Any]]:
    """What the folder holds, and what loads it."""
    model_type, kind = config.get("model_type"), config.get("type")
    if model_type == "openvla":
        from vla_pruner.models.openvla import load_openvla

        return "OpenVLA", load_openvla
    if model_type == "pi0":
        from vla_pruner.policies.pi0 import load_pi0

        return "pi0 of transformers", load_pi0
    if model_type is None and isinstance(kind, str) and kind in LEROBOT_TYPES:
        from vla_pruner.policies.lerobot import load_lerobot

        return f"LeRobot's {kind}", load_lerobot
    if kind_of_config(config) is not None:
        return "the reference policy", _reference
    if model_type is not None:
        found = f"is of a model of type {shown(repr(model_type))}"
    elif kind is not None:
        found = f"is of a LeRobot policy of type {shown(repr(kind))}"
    else:
        found = "names no model"
    raise UnsupportedModelError(f"{folder / 'config.json'} {found}; supported are {SUPPORTED}.")


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
        raise BudgetError(
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


def _reference(name: str | Path | None, device: str | torch.device, dtype: torch.dtype | None) -> Any:
    return reference_policy(name, device, torch.float32 if dtype is None else dtype)
