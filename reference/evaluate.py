"""Closed-loop success of the reference policy and of its controls, as JSON.

`python -m reference.evaluate --episodes 50 --out benchmarks/results/reference_policy_success.json`

Arms: `policy`; `blank` (a grey image); `wrong_scene` (the image of another seed's layout, in which the same actions are
carried out, with the true proprioception); `wrong_instruction` (another task's); `random_keep` (a random quarter of the
visual tokens, through vla_pruner). Every arm of a task runs on the same seeds. Resumable: finished (task, arm) pairs
are kept in the output file, which holds figures of the same weights and seeds alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from reference.rollout import policy_actor, run_episode
from vla_pruner.evaluation.records import write_json
from vla_pruner.json_file import field_of, load_json
from vla_pruner.models.reference.loading import SHIPPED_WEIGHTS
from vla_pruner.simulators.metaworld import EVALUATION_SEED, TASKS, MetaWorldEnv, Observation
from vla_pruner.statistics import wilson

FORMAT = "vla-pruner reference success 1"
ARMS = ("policy", "blank", "wrong_scene", "wrong_instruction", "random_keep")
WRONG_TASK = {
    "reach": "push",
    "push": "reach",
    "pick-place": "reach",
    "coffee-push": "reach",
    "door-open": "drawer-open",
    "window-open": "door-open",
    "plate-slide": "reach",
    "drawer-open": "window-open",
}
"""Task -> the task whose instruction is given instead."""


def evaluate_arm(task: str, arm: str, seeds: range, weights: Path | None) -> dict[str, Any]:
    """Run one arm of one task; return its figures."""
    import torch

    from vla_pruner.models.reference.loading import load_autoregressive_policy

    torch.set_num_threads(1)
    policy = load_autoregressive_policy(weights)
    act = policy_actor(policy)
    session = None
    if arm == "random_keep":
        import vla_pruner

        session = vla_pruner.RandomKeep(keep=0.25).attach(policy)
    success, steps, milliseconds = [], [], []
    with MetaWorldEnv(task) as env, MetaWorldEnv(task, render=arm == "wrong_scene") as other:
        for seed in seeds:
            shown_by_other = other.reset(seed + len(seeds)) if arm == "wrong_scene" else None
            if session is not None:
                session.reset()

            def step(observation: Observation) -> np.ndarray:
                nonlocal shown_by_other
                if arm == "blank":
                    blank = np.full_like(observation.images["image"], 128)
                    observation = replace(observation, images={"image": blank})
                elif arm == "wrong_instruction":
                    observation = replace(observation, instruction=TASKS[WRONG_TASK[task]])
                elif shown_by_other is not None:
                    observation = replace(observation, images=shown_by_other.images)
                started = time.perf_counter()
                action = act(observation)
                milliseconds.append(1000 * (time.perf_counter() - started))
                if shown_by_other is not None:
                    shown_by_other, _, _ = other.step(action)
                return action

            episode = run_episode(step, env, seed)
            success.append(episode.success)
            steps.append(episode.steps)
    return {
        "task": task,
        "arm": arm,
        **rate(sum(success), len(success)),
        "mean_control_steps": round(float(np.mean(steps)), 2),
        "milliseconds_per_decision_p50": round(float(np.median(milliseconds)), 2),
        "success_by_seed": {str(seed): bool(value) for seed, value in zip(seeds, success, strict=True)},
    }


def machine() -> dict[str, Any]:
    """Return the conditions of the figures."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    named = ("torch", "transformers", "metaworld", "mujoco", "gymnasium", "robosuite", "hf-libero")
    installed = {found.metadata["Name"] for found in metadata.distributions()}
    versions = {name: metadata.version(name) for name in named if name in installed}
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "versions": versions}


def rate(successes: int, episodes: int) -> dict[str, Any]:
    """Return the rate of success of one arm of one task, with its 95 % Wilson interval."""
    found = wilson(successes, episodes)
    return {
        "episodes": episodes,
        "successes": successes,
        "success_rate": round(found.value, 4),
        "wilson_95": [round(found.low, 4), round(found.high, 4)],
    }


def summarise(results: Sequence[dict[str, Any]], first: Sequence[str]) -> dict[str, Any]:
    """Return the mean success over tasks of each arm: of those in `first` in its order, then of the others by name. The
    order of `results` is that in which processes finished, which differs from run to run.
    """
    found: dict[str, dict[str, float]] = {}
    for entry in results:
        found.setdefault(entry["arm"], {})[entry["task"]] = entry["success_rate"]
    order = [*(arm for arm in first if arm in found), *sorted(found.keys() - set(first))]
    return {arm: {"mean": round(float(np.mean(list(found[arm].values()))), 4), "by_task": found[arm]} for arm in order}


def publish(entry: dict[str, Any], milliseconds: float, report: dict[str, Any], out: Path | None) -> None:
    """Print the figures of one arm of one task, and write the report so far, if it has a file.

    Raises:
        EvaluationError: it could not be written; the file is as before.
    """
    low, high = entry["wilson_95"]
    print(
        f"{entry['task'][:32]:12s} {entry['arm']:18s} {entry['successes']}/{entry['episodes']}"
        f"  [{low:.2f}, {high:.2f}]  {entry['mean_control_steps']:.1f} steps  {milliseconds:.0f} ms",
        flush=True,
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, report)


def resumed(
    out: Path | None, same: Mapping[str, Any], old: Mapping[str, Any], parser: argparse.ArgumentParser
) -> dict[str, Any]:
    """Return the report that a file holds so far, or one without figures.

    Args:
        out: the file; None: there is none.
        same: what all figures of one file have in common, by the names in it.
        old: what is true of files that do not say.
        parser: ends the program if the file holds anything else.
    """
    if out is None or not out.exists():
        return {"format": FORMAT, "results": [], **same}
    try:
        report = load_json(out.read_text(encoding="utf-8"))
        for entry in field_of(report, "results", list[dict[str, Any]]):
            fields = {"task": str, "arm": str, "success_rate": float, "success_by_seed": dict[str, bool]}
            for name, kind in fields.items():
                field_of(entry, name, kind, "an entry of results")
    except (OSError, ValueError) as error:
        parser.error(f"{out} holds no figures of this program ({error}); restore it, or give another file.")
    other = [name for name, value in same.items() if (old | report).get(name) != value]
    if report["results"] and other:
        parser.error(f"{out} holds figures with another {' and '.join(other)}; give another file.")
    return {**report, **same}


def finished(pool: Executor, run: Callable[..., dict[str, Any]], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Yield the result of `run(*job)` for every job as soon as it is there.

    A job that fails takes none of the others with it: when all of them are over, the first error is raised.
    """
    running = {pool.submit(run, *job): job for job in jobs}
    first: BaseException | None = None
    for future in as_completed(running):
        error = future.exception()
        if error is None:
            yield future.result()
            continue
        print(f"{running[future][:3]} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        first = first or error
    if first is not None:
        raise first


def positive(text: str) -> int:
    """Read a number of 1 or more from a flag."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=SHIPPED_WEIGHTS, help="folder; the shipped one if left out")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=tuple(TASKS))
    parser.add_argument("--arms", nargs="*", default=["policy"], choices=ARMS)
    parser.add_argument("--episodes", type=positive, default=50)
    parser.add_argument("--first-seed", type=int, default=EVALUATION_SEED)
    parser.add_argument("--workers", type=positive, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.episodes)
    weights = args.weights / "model.safetensors"
    if not weights.is_file():
        parser.error(f"--weights is {args.weights}, which has no model.safetensors.")
    same = {"weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(), "first_seed": args.first_seed}
    report = resumed(args.out, same, {}, parser)
    counts = sorted({len(entry["success_by_seed"]) for entry in report["results"]} - {args.episodes})
    if counts:
        parser.error(f"{args.out} holds figures of {counts[0]} episodes; give as many as --episodes, or another file.")
    report["machine"] = machine()
    known = {(entry["task"], entry["arm"]) for entry in report["results"]}
    pairs = dict.fromkeys((task, arm) for arm in args.arms for task in args.tasks)
    jobs = [(*pair, seeds, args.weights) for pair in pairs if pair not in known]
    with ProcessPoolExecutor(args.workers) as pool:
        for entry in finished(pool, evaluate_arm, jobs):
            report["results"].append(entry)
            report["summary"] = summarise(report["results"], ARMS)
            publish(entry, entry["milliseconds_per_decision_p50"], report, args.out)
    print(json.dumps(report.get("summary", {}), indent=1))


if __name__ == "__main__":
    main()
