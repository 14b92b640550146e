"""Closed-loop success of the two-camera policy in Meta-World, of pruned arms and of controls, as JSON.

    python -m reference.chunk.metaworld_evaluate --weights FOLDER --arms policy --first-seed 90000 --episodes 20
    python -m reference.chunk.metaworld_evaluate --arms policy wrong_scene blank blank_wrist wrong_instruction random \\
        --episodes 50 --out benchmarks/results/metaworld_policy_success.json

Arms are `policy`; the controls `blank` (both images grey), `blank_wrist`, `wrong_scene` (both images of another seed's
scene, in which the same actions are carried out, with the true proprioception), `wrong_instruction`; or a method with
its options, `vla-pruner:keep=0.25:layer=2`. Every arm of a task runs on the same seeds. Finished (task, arm) pairs are
kept in the output file, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from reference.chunk.metaworld_record import IMAGE, MAX_ACTIONS, look
from reference.evaluate import WRONG_TASK, machine, wilson
from vla_pruner.simulators.metaworld import EVALUATION_SEED, TASKS, MetaWorldEnv

CONTROLS = ("policy", "blank", "blank_wrist", "wrong_scene", "wrong_instruction")


def evaluate_arm(task: str, arm: str, seeds: range, weights: Path) -> dict[str, Any]:
    """Run one arm of one task; return its figures."""
    import torch

    from vla_pruner.method_names import methods_of
    from vla_pruner.models.chunk import load_chunk_policy

    torch.set_num_threads(1)
    policy = load_chunk_policy(weights)
    executed = policy.config.executed
    method = None if arm in CONTROLS else methods_of([arm])[0].method
    instruction = TASKS[WRONG_TASK[task] if arm == "wrong_instruction" else task]
    success, looks, milliseconds = [], [], []
    size = {"image_size": IMAGE, "render": False, "action_repeat": 1, "max_control_steps": MAX_ACTIONS}
    with (
        MetaWorldEnv(task, **size) as env,
        MetaWorldEnv(task, **size) as other,
        contextlib.nullcontext() if method is None else method.attach(policy) as session,
    ):
        for seed in seeds:
            env.reset(seed)
            if arm == "wrong_scene":
                other.reset(seed + len(seeds))
            if session is not None:
                session.reset()
            done = solved = False
            count = 0
            while not done:
                images = look(other if arm == "wrong_scene" else env)
                for name in images:
                    if arm == "blank" or (arm == "blank_wrist" and name != "image"):
                        images[name] = np.full_like(images[name], 128)
                started = time.perf_counter()
                chunk = policy.act(images, instruction, env.state[:4].astype(np.float32))
                milliseconds.append(1000 * (time.perf_counter() - started))
                count += 1
                for action in chunk[:executed]:
                    if arm == "wrong_scene":
                        other.step(action)
                    _, solved, done = env.step(action)
                    if done:
                        break
            success.append(bool(solved))
            looks.append(count)
    total = sum(success)
    return {
        "task": task,
        "arm": arm,
        "episodes": len(success),
        "successes": total,
        "success_rate": round(total / len(success), 4),
        "wilson_95": [round(value, 4) for value in wilson(total, len(success))],
        "mean_control_steps": round(float(np.mean(looks)), 2),
        "milliseconds_per_control_step_p50": round(float(np.median(milliseconds)), 2),
        "success_by_seed": {str(seed): value for seed, value in zip(seeds, success, strict=True)},
    }


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean success over tasks for each arm."""
    summary: dict[str, Any] = {}
    for arm in dict.fromkeys(entry["arm"] for entry in results):
        rates = {entry["task"]: entry["success_rate"] for entry in results if entry["arm"] == arm}
        summary[arm] = {"mean": round(float(np.mean(list(rates.values()))), 4), "by_task": rates}
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder of weights")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--arms", nargs="*", default=["policy"])
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=EVALUATION_SEED)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.episodes)
    report: dict[str, Any] = {"format": "vla-pruner reference success 1", "results": []}
    if args.out and args.out.exists():
        report = json.loads(args.out.read_text())
    weights = hashlib.sha256((args.weights / "model.safetensors").read_bytes()).hexdigest()
    if report.get("weights_sha256", weights) != weights or report.get("first_seed", seeds.start) != seeds.start:
        parser.error(f"{args.out} holds figures of other weights or seeds; give another file.")
    report |= {"weights_sha256": weights, "first_seed": seeds.start, "machine": machine()}
    finished = {(entry["task"], entry["arm"]) for entry in report["results"]}
    jobs = [(task, arm) for arm in args.arms for task in args.tasks if (task, arm) not in finished]
    with ProcessPoolExecutor(args.workers) as pool:
        for future in as_completed([pool.submit(evaluate_arm, *job, seeds, args.weights) for job in jobs]):
            entry = future.result()
            report["results"].append(entry)
            report["summary"] = summarise(report["results"])
            low, high = entry["wilson_95"]
            print(
                f"{entry['task']:12s} {entry['arm']:18s} {entry['successes']}/{entry['episodes']}"
                f"  [{low:.2f}, {high:.2f}]  {entry['mean_control_steps']:.1f} steps"
                f"  {entry['milliseconds_per_control_step_p50']:.0f} ms",
                flush=True,
            )
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report.get("summary", {}), indent=1))


if __name__ == "__main__":
    main()
