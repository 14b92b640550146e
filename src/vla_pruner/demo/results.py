"""The demo's result file: `results.json`, with every episode and every condition."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from vla_pruner.demo.episodes import Episode
from vla_pruner.demo.settings import DemoSettings
from vla_pruner.demo.summary import Summary
from vla_pruner.outputs import replace_file
from vla_pruner.timing import STAGES

FORMAT = "vla-pruner demo 2"
"""The format of the file. In format 1 the arms were others, each action was one control step, and the verdict began
with the unpruned arm. "compiled" came later to format 2: a file without it has arms that were not compiled.
"""


def to_json(
    settings: DemoSettings,
    conditions: Mapping[str, Any],
    finished: Sequence[Mapping[str, Episode]],
    summary: Summary,
    verdict: Sequence[str],
    notes: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the result file's content: plain JSON values, nan and infinity as null."""
    asked = dataclasses.asdict(settings)
    content = {
        "format": FORMAT,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in asked.items()},
        "conditions": dict(conditions),
        **notes,
        "paired_episodes": summary.units,
        "decoder_layers": summary.layers,
        "pruning_layer": summary.layer,
        "vision_flops": summary.vision_flops,
        "touchable_share": summary.touchable_share,
        "amdahl_ceiling": summary.ceiling,
        "verdict": list(verdict),
        "arms": [arm.to_json() for arm in summary.arms],
        "episodes": [_episode(episode) for unit in finished for episode in unit.values()],
    }
    return _finite(content)


def write(path: Path, content: Mapping[str, Any]) -> None:
    replace_file(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _episode(episode: Episode) -> dict[str, Any]:
    return {
        "arm": episode.arm,
        "task": episode.unit.task,
        "seed": episode.unit.seed,
        "success": episode.success,
        "steps": episode.steps,
        "pruned_steps": sum(count is not None for count in episode.kept),
        "milliseconds": [round(time.total, 3) for time in episode.times],
        **{f"{stage}_ms_mean": round(_mean([getattr(t, stage) for t in episode.times]), 3) for stage in STAGES},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
