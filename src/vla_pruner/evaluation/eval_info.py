"""`eval_info.json`: LeRobot's keys, so that its tools read it, and everything that they leave out."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vla_pruner.evaluation.records import Record
from vla_pruner.evaluation.run import Run
from vla_pruner.evaluation.summary import Summary

EVAL_INFO = "eval_info.json"
ARMS = "arms"
"""Folder of a run that holds one folder per arm, each with the `eval_info.json` that LeRobot would write for it."""

_LONGEST_NAME = 150


def eval_info(run: Run, summary: Summary, sentences: Sequence[str]) -> dict[str, Any]:
    """Return the file's content; plain JSON values.

    `per_task`, `per_group` and `overall` are LeRobot's, of the unpruned policy; `arms` has them of every arm. Episodes
    that crashed are in none of them.
    """
    of_arms = {arm.key: _of_arm(run, arm.key) for arm in summary.arms}
    manifest = run.manifest.to_json()
    return {
        **of_arms[summary.baseline.key],
        "run": {name: manifest[name] for name in ("format", "run", "identity", "plan", "for_claims", "extended")},
        "conditions": manifest["conditions"],
        "arms": of_arms,
        "summary": summary.to_json(),
        "verdict": list(sentences),
        "errors": [_error(record) for record in run.records.values() if record.crashed],
    }


def of_arms(info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the contents of `eval_info.json` for each arm alone, for tools that read one policy per file: LeRobot's
    keys, and the arm's identity.

    Args:
        info: from `eval_info`.

    Returns:
        the contents by the name of the arm's folder: the arm's key in characters that a file name allows.
    """
    identity = {arm["key"]: arm for arm in info["run"]["identity"]["arms"]}
    return {_folder(key): {**content, "arm": identity[key]} for key, content in info["arms"].items()}


def _folder(key: str) -> str:
    readable = re.sub(r"[^A-Za-z0-9.+_-]", "_", key)[:_LONGEST_NAME]
    # Dots alone are not a name, but would lead out of the folder.
    return readable if readable == key and key.strip(".") else f"{readable}-{zlib.crc32(key.encode()):08x}"


def _of_arm(run: Run, arm: str) -> dict[str, Any]:
    done = sorted(
        (record for (_, key), record in run.records.items() if key == arm and not record.crashed),
        key=lambda record: record.unit,
    )
    tasks: dict[tuple[str, int], list[Record]] = {}
    groups: dict[str, list[Record]] = {}
    for record in done:
        tasks.setdefault((record.unit.suite, record.unit.task_id), []).append(record)
        groups.setdefault(record.unit.suite, []).append(record)
    seconds = sum(record.seconds for record in done)
    return {
        "per_task": [
            {"task_group": suite, "task_id": number, "metrics": _metrics(records)}
            for (suite, number), records in tasks.items()
        ],
        "per_group": {suite: _rates(records) for suite, records in groups.items()},
        "overall": {
            **_rates(done),
            "eval_s": round(seconds, 3),
            "eval_ep_s": round(seconds / len(done), 3) if done else None,
        },
    }


def _metrics(records: Iterable[Record]) -> dict[str, list[Any]]:
    """LeRobot's lists, one entry an episode, and ours of the same length."""
    of_episodes = list(records)
    return {
        "sum_rewards": [record.sum_reward for record in of_episodes],
        "max_rewards": [record.max_reward for record in of_episodes],
        "successes": [record.success for record in of_episodes],
        "video_paths": [],
        "predicted_video_paths": [],
        "init_state_ids": [record.unit.initial_state for record in of_episodes],
        "seeds": [record.unit.policy_seed for record in of_episodes],
        "n_steps": [record.steps for record in of_episodes],
        "terminations": [record.termination for record in of_episodes],
        "infer_ms_p50": [record.latency_p50_ms for record in of_episodes],
        "infer_ms_p99": [record.latency_p99_ms for record in of_episodes],
    }


def _rates(records: Sequence[Record]) -> dict[str, Any]:
    def mean(values: Iterable[float]) -> float | None:
        return sum(values) / len(records) if records else None

    return {
        "avg_sum_reward": mean(record.sum_reward for record in records),
        "avg_max_reward": mean(record.max_reward for record in records),
        "pc_success": mean(100.0 * bool(record.success) for record in records),
        "n_episodes": len(records),
        "video_paths": [],
        "predicted_video_paths": [],
    }


def _error(record: Record) -> Mapping[str, Any]:
    unit = record.unit
    return {
        "arm": record.arm,
        "task_group": unit.suite,
        "task_id": unit.task_id,
        "init_state_id": unit.initial_state,
        "attempt": record.attempt,
        **(record.error or {}),
    }
