"""Folders of evaluations that never ran, written as `vla-pruner eval` writes them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_pruner.evaluation import EvalSettings, PolicySource, Record, Unit
from vla_pruner.evaluation.arms import Arm
from vla_pruner.evaluation.manifest import Manifest, Plan, identity
from vla_pruner.evaluation.records import EPISODES
from vla_pruner.evaluation.traces import Trace, write_trace
from vla_pruner.simulators.base import Task

SCRIPT = "<script>document.title='owned'</script> & \"push\""
"""A name of a task or an instruction that must not act as a script."""
SIDE = 4
STEPS = 6

Outcome = Callable[[Arm, Unit], bool | None]


def chance(arm: Arm, unit: Unit) -> bool:
    """Solved more often the more is kept; starts that are hard are so for every arm."""
    hard = np.random.default_rng([unit.task_id, unit.initial_state]).random()
    luck = np.random.default_rng([zlib.crc32(arm.key.encode()), unit.task_id, unit.initial_state]).random()
    skill = 0.95 - 0.02 * unit.task_id
    if arm.kind == "blank":
        skill = 0.05
    elif arm.method is not None:
        method: Any = arm.method
        lost = (0.3 if method.pruned == "drop" else 0.06) * (0.5 - method.keep) / 0.4
        skill -= lost + (0.1 if arm.kind == "random" else zlib.crc32(arm.title.split()[0].encode()) % 7 / 100)
    return bool(0.8 * hard + 0.2 * luck < skill)


def first_of_each_pair(arm: Arm, unit: Unit) -> bool:
    """Every arm solves even starts; odd ones the unpruned policy alone."""
    return unit.initial_state % 2 == 0 or arm.kind in ("baseline", "again")


def write_run(
    folder: Path,
    *,
    methods: Sequence[str] = ("vla-pruner:preset=paper",),
    keep: Sequence[float] = (0.25, 0.125),
    pruned: Sequence[str] = ("drop", "freeze"),
    controls: Sequence[str] = ("again", "random", "blank"),
    tasks: Sequence[str] = ("reach", SCRIPT),
    suites: Sequence[str] = ("fake",),
    episodes: int = 10,
    planned: int | None = None,
    outcome: Outcome = first_of_each_pair,
    traced: int = 0,
    shard: tuple[int, int] | None = None,
) -> EvalSettings:
    """Write run.json, episodes.jsonl and the traces of the first `traced` starts.

    Args:
        outcome: how an episode ends; None crashes.
        planned: episodes a task that the run set out for; None: those that are there.
    """
    folder.mkdir(parents=True)
    settings = EvalSettings(
        policy=PolicySource("reference"),
        suites=tuple(suites),
        out=folder,
        episodes=planned or episodes,
        methods=tuple(methods),
        keep=tuple(keep) or None,
        pruned=tuple(pruned) or None,
        controls=tuple(controls),
        shard=shard,
    )
    made = tuple(
        Task(suite, index, name, f"do this: {name}", 40, None) for suite in suites for index, name in enumerate(tasks)
    )
    manifest = Manifest(
        identity(settings, {"weights": "w"}),
        Plan(made, 0, planned or episodes, 0, shard),
        (planned or episodes) >= 50,
        conditions=({"policy": "reference", "processor": "a CPU", "threads": 1, "busy_cores_before": 0.0},),
    )
    manifest.write(folder)
    lines = []
    for unit in manifest.plan.units():
        for arm in settings.arms():
            if unit.initial_state < episodes:
                record = _record(manifest.run, arm, unit, outcome(arm, unit))
                lines.append(record.to_line())
                if unit.initial_state < traced and not record.crashed:
                    write_trace(folder, _trace(arm, record))
    (folder / EPISODES).write_bytes(b"".join(lines))
    return settings


def _record(run: str, arm: Arm, unit: Unit, success: bool | None) -> Record:
    method: Any = arm.method
    generator = np.random.default_rng([zlib.crc32(arm.key.encode()), unit.task_id, unit.initial_state, 1])
    kept = None if method is None else max(1, round(196 * method.keep))
    base = 80.0 if kept is None else 40 + 40 * kept / 196 + (6 if "freeze" in arm.title else 0)
    latency = [round(float(base + generator.normal(0, 2)), 3) for _ in range(STEPS)]
    return Record(
        run=run,
        arm=arm.key,
        unit=unit,
        success=success,
        termination="error" if success is None else "success" if success else "max_steps",
        steps=int(generator.integers(8, 30)) if success else 40,
        control_steps=STEPS,
        sum_reward=float(bool(success)),
        max_reward=float(bool(success)),
        latency_ms=latency,
        latency_p50_ms=float(np.median(latency)),
        latency_p99_ms=max(latency),
        visual_tokens=None if kept is None else 196,
        kept_tokens=[] if kept is None else [kept, kept],
        pruned_steps=0 if kept is None else STEPS - 3,
        error={"type": "OSError", "message": SCRIPT, "where": "x.py:1 f"} if success is None else None,
        seconds=1.0,
    )


def _trace(arm: Arm, record: Record) -> Trace:
    """Two cameras of 4 x 4 patches; the semantic map moves in every control step, the action map in every second."""
    cameras = {"front": SIDE * SIDE, "wrist": SIDE * SIDE}
    count = sum(cameras.values())
    method: Any = arm.method
    generator = np.random.default_rng(record.unit.initial_state)
    semantic = np.stack([np.roll(np.arange(1, count + 1, dtype=np.float32), step) for step in range(STEPS)])
    action = np.stack([np.roll(np.arange(1, count + 1, dtype=np.float32), step // 2 + 1) for step in range(STEPS)])
    pruned = np.arange(STEPS) >= 3 if method is not None else np.zeros(STEPS, bool)
    kept = None
    if method is not None:
        kept = np.ones((STEPS, count), bool)
        for step in np.flatnonzero(pruned):
            kept[step] = False
            kept[step, np.argsort(-semantic[step])[: max(1, round(method.keep * count))]] = True
    has_scores = arm.kind in ("baseline", "method")
    shape = (STEPS, 32, 32, 3)
    return Trace(
        run=record.run,
        arm=record.arm,
        unit=record.unit,
        success=bool(record.success),
        images={name: generator.integers(60, 255, shape, dtype=np.uint8) for name in cameras},
        proprio=None,
        instructions=(f"do this: {record.unit.task}",) * STEPS,
        actions=np.zeros((STEPS, 1, 4), np.float32),
        noise_seeds=np.zeros(STEPS, np.uint64),
        steps=np.arange(STEPS, dtype=np.int64),
        kept=kept,
        pruned=pruned,
        scores={"semantic": semantic, "action": action} if has_scores else {},
        camera_tokens=cameras if has_scores or kept is not None else {},
    )
