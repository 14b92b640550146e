"""The statistics that scale an OpenVLA policy's actions, checked when they are read: each fault names its file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla_pruner.checkpoints.files import AGAIN, listed, shown
from vla_pruner.checkpoints.numbers import finite_row
from vla_pruner.errors import CheckpointError

STATISTICS = "dataset_statistics.json"
NO_STATISTICS = (
    f"its actions cannot be scaled: {STATISTICS} is missing, which fine-tuning writes beside the weights, and "
    "config.json has no norm_stats. Copy it from the run that made the checkpoint."
)
_VALUES = ("q01", "q99", "min", "max", "mean", "std")


def check_statistics(path: Path, statistics: Any) -> None:
    """Refuse statistics that cannot scale anything, by the file that holds them.

    Args:
        path: dataset_statistics.json, or config.json with its norm_stats.
        statistics: by dataset.

    Raises:
        CheckpointError: there are none, their dataset is not named, or one is no list of finite numbers.
    """
    if not isinstance(statistics, Mapping):
        raise CheckpointError(
            f"{path} has statistics {shown(repr(statistics))}, not those of datasets by name. {AGAIN}"
        )
    if not statistics:
        raise CheckpointError(f"{path.parent} has no statistics, so {NO_STATISTICS}")
    action = statistics.get("action")
    if isinstance(action, Mapping) and any(name in action for name in _VALUES):
        raise CheckpointError(
            f"{path} holds the statistics of one dataset without its name ({listed(statistics)}); they belong under "
            'it: {"NAME": {"action": ..., "proprio": ...}}.'
        )
    for dataset, parts in statistics.items():
        if not isinstance(parts, Mapping):
            raise CheckpointError(
                f"{path} has {shown(repr(parts))} for the dataset {shown(dataset)!r}, which is no table. {AGAIN}"
            )
        for part in ("action", "proprio"):
            if part in parts:
                _check_part(path, f"the {part} of {shown(dataset)!r}", parts[part])


def _check_part(path: Path, what: str, part: Any) -> None:
    if not isinstance(part, Mapping):
        raise CheckpointError(f"{path} has {shown(repr(part))} for {what}, which is no table of numbers. {AGAIN}")
    rows = {name: finite_row(path, f"{name} of {what}", part[name]) for name in _VALUES if name in part}
    sizes = {name: len(row) for name, row in rows.items()}
    mask = part.get("mask")
    if mask is not None:
        if not isinstance(mask, list) or not all(type(item) is bool for item in mask):
            raise CheckpointError(f"{path} has mask {shown(repr(mask))} of {what}, which is no list of bool. {AGAIN}")
        sizes["mask"] = len(mask)
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{size} numbers of {name}" for name, size in sizes.items())
        raise CheckpointError(f"{path} has {found} for {what}; they need one for each dimension. {AGAIN}")
