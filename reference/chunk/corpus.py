"""Recorded control steps on disk: one folder of arrays per shard, readable without loading the images into memory."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DATA_ROOT = Path(os.environ.get("VLA_PRUNER_REFERENCE_DATA", Path.home() / ".cache" / "vla-pruner-reference")) / "chunk"
"""The folder of recordings and checkpoints: gigabytes, so outside the repository."""

COLUMNS = ("images", "proprio", "states", "chunks", "questions", "marks", "tasks", "episodes")


@dataclass
class Recorder:
    """Collects control steps and writes them as one shard.

    Columns, one row a control step:
        images: (C, H, W, 3) uint8, one image a camera.
        proprio: (P,) float32. states: (S,) float32, the simulator's state, for labels of other questions.
        chunks: (Q, T, A) float32, the expert's next T actions for each question. questions: (Q,) int16, the number of
            each question's instruction, -1 if there are fewer.
        marks: (C, K, 2) float32, column and row in pixels of each landmark; NaN where it is out of view.
        tasks: int16. episodes: int64, unique within the shard.
    """

    def __init__(self) -> None:
        self.rows: dict[str, list] = {name: [] for name in COLUMNS}

    def add(self, **row: object) -> None:
        for name in COLUMNS:
            self.rows[name].append(row[name])

    def __len__(self) -> int:
        return len(self.rows["tasks"])

    def save(self, folder: Path) -> None:
        """Write the shard under its final name only once it is complete."""
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, values in self.rows.items():
            np.save(partial / f"{name}.npy", np.stack([np.asarray(value) for value in values]))
        os.replace(partial, folder)


class Corpus:
    """Every shard under some folders as one table; images stay on disk until they are read."""

    def __init__(self, folders: list[Path]) -> None:
        shards = [
            shard
            for folder in folders
            for shard in sorted(folder.glob("*/*"))
            if shard.is_dir() and not shard.name.endswith(".partial")
        ]
        if not shards:
            raise ValueError(f"No recordings under {', '.join(map(str, folders))}: record some first.")
        self.parts = [np.load(shard / "images.npy", mmap_mode="r") for shard in shards]
        lengths = [len(part) for part in self.parts]
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        columns = {name: [np.load(shard / f"{name}.npy") for shard in shards] for name in COLUMNS if name != "images"}
        shift = 0
        for episodes in columns["episodes"]:
            episodes += shift
            shift = int(episodes.max()) + 1
        joined = {name: np.concatenate(parts) for name, parts in columns.items()}
        self.proprio, self.states = joined["proprio"].astype(np.float32), joined["states"].astype(np.float32)
        self.chunks, self.questions = joined["chunks"].astype(np.float32), joined["questions"].astype(np.int64)
        self.marks, self.tasks, self.episodes = joined["marks"].astype(np.float32), joined["tasks"], joined["episodes"]
        fresh = [np.full(n, shard.parent.parent != folders[0]) for n, shard in zip(lengths, shards, strict=True)]
        self.fresh = np.concatenate(fresh)
        """(N,) bool: recorded while the policy acted."""

    def __len__(self) -> int:
        return len(self.tasks)

    def images(self, rows: np.ndarray) -> np.ndarray:
        """(N, C, H, W, 3) uint8 of some rows."""
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        return np.stack([self.parts[s][row - self.starts[s]] for s, row in zip(shard, rows, strict=True)])
