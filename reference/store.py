"""Recorded episodes on disk: one .npz per shard, written atomically, so that an interrupted run can go on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_pruner.simulators.metaworld import TASKS

DATA_ROOT = Path(os.environ.get("VLA_PRUNER_REFERENCE_DATA", Path.home() / ".cache" / "vla-pruner-reference"))
"""The folder of recordings and checkpoints: gigabytes, so outside the repository."""


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
    """(N,) running number of the episode."""
    fresh: np.ndarray
    """(N,) bool: not from the first folder, that is, recorded while the policy acted."""


def save_shard(path: Path, images: np.ndarray, states: np.ndarray, episodes: np.ndarray, success: np.ndarray) -> None:
    """Write one shard under its final name only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.savez(file, images=images, states=states, episodes=episodes, success=success)
    os.replace(partial, path)


def load_frames(folders: list[Path], tasks: list[str]) -> Frames:
    """Every shard of `tasks` under `folders`, in a fixed order."""
    parts: list[Frames] = []
    episode = 0
    for folder in folders:
        for task in tasks:
            for path in sorted(folder.glob(f"{task}/*.npz")):
                with np.load(path) as shard:
                    images, states, numbers = shard["images"], shard["states"], shard["episodes"]
                number = np.full(len(images), list(TASKS).index(task), np.int16)
                fresh = np.full(len(images), folder != folders[0])
                parts.append(Frames(images, states.astype(np.float32), number, numbers + episode, fresh))
                episode += int(numbers.max()) + 1
    if not parts:
        raise ValueError(f"No recordings under {', '.join(map(str, folders))}: run reference.demonstrations first.")
    columns = ("images", "states", "tasks", "episodes", "fresh")
    return Frames(*(np.concatenate([getattr(part, column) for part in parts]) for column in columns))
