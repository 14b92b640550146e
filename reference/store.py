"""Recorded episodes on disk: one .npz per shard, written atomically, so that an interrupted run can go on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_pruner.simulators.metaworld import TASKS

DATA_ROOT = Path(os.environ.get("VLA_PRUNER_REFERENCE_DATA", "/work/refdata"))
"""Where recordings and checkpoints live: gigabytes, so outside the repository."""


@dataclass
class Frames:
    """Recorded control steps of any tasks, one row each."""

    images: np.ndarray
    """(N, H, W, 3) uint8."""
    states: np.ndarray
    """(N, 39) float32, Meta-World's full observation: labels are computed from it, never stored."""
    tasks: np.ndarray
    """(N,) int16 index into the list of `TASKS`."""
    episodes: np.ndarray
    """(N,) int32 running number of the episode."""


def save_shard(path: Path, images: np.ndarray, states: np.ndarray, episodes: np.ndarray, success: np.ndarray) -> None:
    """Writes one shard under its final name only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.savez(file, images=images, states=states, episodes=episodes, success=success)
    os.replace(partial, path)


def load_frames(folder: Path, tasks: list[str], skip: set[str] | None = None) -> tuple[Frames, set[str]]:
    """Every shard of `tasks` under `folder` that is not in `skip`, and the set of all shard names seen."""
    names = set(skip or ())
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    episode = 0
    for task in tasks:
        for path in sorted(folder.glob(f"{task}/*.npz")):
            name = f"{task}/{path.stem}"
            if name in names:
                continue
            names.add(name)
            with np.load(path) as shard:
                images, states, numbers = shard["images"], shard["states"], shard["episodes"]
            parts.append(
                (
                    images,
                    states.astype(np.float32),
                    np.full(len(images), list(TASKS).index(task), np.int16),
                    (numbers + episode).astype(np.int32),
                )
            )
            episode += int(numbers.max()) + 1
    if not parts:
        empty = np.zeros((0, 112, 112, 3), np.uint8), np.zeros((0, 39), np.float32)
        return Frames(*empty, np.zeros(0, np.int16), np.zeros(0, np.int32)), names
    return Frames(*(np.concatenate(column) for column in zip(*parts, strict=True))), names
