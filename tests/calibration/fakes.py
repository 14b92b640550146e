"""Traces that were made up, a policy whose pruned actions are off by a known amount, and datasets written by hand."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from vla_pruner.evaluation.arms import Arm
from vla_pruner.evaluation.traces import Trace, write_trace
from vla_pruner.evaluation.units import Unit

STEPS = 5


def made_up_trace(state: int, task: int = 0, size: int = 8, dim: int = 4, **changes: Any) -> Trace:
    """Five control steps in which the image's brightness and the actions are drawn."""
    generator = np.random.default_rng([state, task])
    name, text = (("reach", "reach the ball"), ("push", "push the puck"))[task]
    unit = Unit("fake", task, name, state, 0)
    trace = Trace(
        run="x",
        arm="unpruned",
        unit=unit,
        success=True,
        images={"image": generator.integers(1, 255, (STEPS, size, size, 3), dtype=np.uint8)},
        proprio=generator.normal(size=(STEPS, 4)).astype(np.float32),
        instructions=(text,) * STEPS,
        actions=generator.normal(size=(STEPS, 2, dim)).astype(np.float32),
        noise_seeds=np.array([unit.noise_seed(step) for step in range(STEPS)], np.uint64),
        steps=np.arange(STEPS),
        kept=None,
        pruned=np.zeros(STEPS, bool),
        scores={},
        camera_tokens={},
    )
    return dataclasses.replace(trace, **changes)


def made_up_folder(folder: Path, states: int = 3, tasks: int = 2, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for state in range(states):
        for task in range(tasks):
            write_trace(folder, made_up_trace(state, task, **changes))
    return folder


class Drawn(nn.Module):
    """A chunk of two actions, drawn around the image's brightness; `offset` is added to it. Notes its arguments."""

    cameras = ("image",)
    vision_towers: tuple[nn.Module, ...] = ()
    proprio_size = 4

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.offset = np.zeros(dim)
        self.seen: list[tuple[float, str]] = []
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def act(self, images: Mapping[str, np.ndarray], instruction: str, proprio: np.ndarray | None = None) -> np.ndarray:
        assert proprio is not None
        self.seen.append((float(images["image"].mean()), instruction))
        noise = torch.randn(2, len(self.offset)).numpy()
        return noise + images["image"].mean() / 255 + self.offset


class Off:
    """Stands for a method: while it is attached, the policy is off by so much; from the second step on it prunes."""

    motion = 0

    def __init__(self, offset: np.ndarray, waits: int = 1, motion: int = 0) -> None:
        self.offset, self.waits, self.motion = offset, waits, motion
        self.told: list[float] = []

    @contextmanager
    def attach(self, policy: Any, **_: Any) -> Iterator[Any]:
        session = SimpleNamespace(
            method=self, reset=lambda: None, kept=None, encoded=(), moved=self.told.append, acted=0
        )
        act = policy.act

        def acting(*given: Any) -> np.ndarray:
            prunes = session.acted >= self.waits
            session.acted += 1
            session.kept = torch.zeros(1, 1) if prunes else None
            policy.offset = self.offset if prunes else 100.0 + self.offset
            return act(*given)

        policy.act = acting
        try:
            yield session
        finally:
            del policy.act
            policy.offset = np.zeros(len(self.offset))


def off(key: str, offset: Any, kind: str = "method", **options: Any) -> Arm:
    method: Any = Off(np.asarray(offset, float), **options)
    return Arm(key, key, kind, method)


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(image).save(content, "png")
    return content.getvalue()


def _video(path: Path, frames: list[np.ndarray], fps: int) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.bit_rate = 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def grey(episode: int, step: int) -> int:
    """Return the grey level of a dataset's image."""
    return 20 + 60 * episode + 10 * step


LENGTHS = (4, 6, 5)
SENTENCES = ("reach the ball", "push the puck")


def dataset(folder: Path, version: str, video: bool, camera: str = "image", dim: int = 4) -> Path:
    """Three episodes of 4, 6 and 5 steps at 10 Hz, as LeRobot lays them out; the second is of another task."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    key = f"observation.images.{camera}"
    v3 = version == "v3.0"
    rows, frames = [], []
    for episode, length in enumerate(LENGTHS):
        for step in range(length):
            image = np.full((32, 32, 3), grey(episode, step), np.uint8)
            frames.append((episode, image))
            row: dict[str, Any] = {} if video else {key: {"bytes": _png(image), "path": None}}
            generator = np.random.default_rng([episode, step])
            row["observation.state"] = generator.normal(size=4).astype(np.float32).tolist()
            row["action"] = generator.normal(size=dim).astype(np.float32).tolist()
            numbers = {"timestamp": step / 10, "frame_index": step, "episode_index": episode, "task_index": episode % 2}
            rows.append({**row, **numbers})
    meta = folder / "meta"
    meta.mkdir(parents=True)
    features = {
        key: {"dtype": "video" if video else "image", "shape": [32, 32, 3]},
        "observation.state": {"dtype": "float32", "shape": [4]},
        "action": {"dtype": "float32", "shape": [dim]},
    }
    if v3:
        paths = {
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        }
    else:
        paths = {
            "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        }
    info = {"codebase_version": version, "fps": 10, "chunks_size": 1000, "features": features, **paths}
    (meta / "info.json").write_text(json.dumps(info))
    if v3:
        pq.write_table(pa.table({"task_index": [0, 1], "task": list(SENTENCES)}), meta / "tasks.parquet")
        starts = np.cumsum([0, *LENGTHS[:-1]]) / 10
        table: dict[str, Any] = {
            "episode_index": list(range(3)),
            "tasks": [[SENTENCES[episode % 2]] for episode in range(3)],
            "length": list(LENGTHS),
            "data/chunk_index": [0] * 3,
            "data/file_index": [0] * 3,
            f"videos/{key}/chunk_index": [0] * 3,
            f"videos/{key}/file_index": [0] * 3,
            f"videos/{key}/from_timestamp": starts.tolist(),
            "stats/action/mean": [0.0] * 3,
        }
        (meta / "episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.table(table), meta / "episodes/chunk-000/file-000.parquet")
        (folder / "data/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "data/chunk-000/file-000.parquet")
        if video:
            _video(folder / f"videos/{key}/chunk-000/file-000.mp4", [image for _, image in frames], 10)
        return folder
    lines = [{"task_index": index, "task": text} for index, text in enumerate(SENTENCES)]
    (meta / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "data/chunk-000").mkdir(parents=True)
    told = []
    for episode, length in enumerate(LENGTHS):
        told.append({"episode_index": episode, "tasks": [SENTENCES[episode % 2]], "length": length})
        mine = [row for row in rows if row["episode_index"] == episode]
        pq.write_table(pa.Table.from_pylist(mine), folder / f"data/chunk-000/episode_{episode:06d}.parquet")
        if video:
            path = folder / f"videos/chunk-000/{key}/episode_{episode:06d}.mp4"
            _video(path, [image for number, image in frames if number == episode], 10)
    (meta / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    return folder
