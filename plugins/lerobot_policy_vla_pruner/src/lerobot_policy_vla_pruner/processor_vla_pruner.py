"""The processors of a `vla_pruner` that has no checkpoint, as LeRobot looks for them: there are none."""

from __future__ import annotations

from typing import Any

from vla_pruner.errors import CheckpointError


def make_vla_pruner_pre_post_processors(config: Any, dataset_stats: Any = None) -> tuple[Any, Any]:
    """Refuse: with --policy.pretrained_path LeRobot takes the checkpoint's own processors."""
    raise CheckpointError("A vla_pruner policy uses its checkpoint's processors; give --policy.pretrained_path.")
