"""Closed-loop success of a two-camera policy, of pruned arms and of controls, as JSON.

    python -m reference.chunk.evaluate --weights FOLDER --first-seed 90000 --episodes 20
    python -m reference.chunk.evaluate --suite libero_object --weights FOLDER --generated --episodes 4
    python -m reference.chunk.evaluate --weights FOLDER --arms policy wrong_scene blank blank_wrist wrong_instruction \\
        random:keep=0.25:layer=2 --episodes 50 --out benchmarks/results/metaworld_policy_success.json

Arms are `policy`; the controls `blank` (both images grey), `blank_wrist`, `wrong_scene` (both images of another
episode's scene, in which the same actions are carried out, with the true proprioception), `wrong_instruction` (another
task's; in LIBERO, of another object in the scene); or a method with its options, `vla-pruner:keep=0.25:layer=2`. Every
arm of a task runs on the same seeds. In LIBERO a seed is the number of a stored initial state, or, with `--generated`,
of a scene of LIBERO's generator. Finished (task, arm) pairs are kept in the output file, so an interrupted run goes on,
and one with more `--episodes` adds to it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reference.evaluate import WRONG_TASK, finished, machine, positive, publish, rate, resumed, summarise
from vla_pruner.errors import SessionError, VLAPrunerError
from vla_pruner.method_names import methods_of
from vla_pruner.models.chunk import load_chunk_policy
from vla_pruner.simulators.base import Convention
from vla_pruner.simulators.metaworld import EVALUATION_SEED, TASKS

STORED = 50
"""LIBERO's stored initial states of a task."""
CONTROLS = ("policy", "blank", "blank_wrist", "wrong_scene", "wrong_instruction")


@dataclass
class Place:
    """One task's environment, where an episode begins with a seed."""

    environment: Any
    begin: Any
    """Begins the episode of a seed and returns the first observation."""
    convention: Convention
    wrong_instruction: Any
    """Returns another task's instruction that makes sense in the present scene."""


def open_metaworld(policy: Any, task: str, generated: bool) -> Place:
    """Return the place of a Meta-World task; every seed is a scene of its own."""
    from vla_pruner.simulators.metaworld_suite import MetaWorldSuite

    suite = MetaWorldSuite("metaworld:mt8", image_size=policy.image_size)
    environment = suite.make(task)
    return Place(environment, environment.begin, suite.convention(policy), lambda: TASKS[WRONG_TASK[task]])


def open_libero(policy: Any, task: str, generated: bool) -> Place:
    """Return the place of a LIBERO-Object task."""
    from reference.chunk.libero_record import Scene, kind
    from reference.chunk.libero_things import TASKS as ASKED
    from reference.chunk.libero_things import instruction
    from vla_pruner.simulators.libero import LiberoSuite

    suite = LiberoSuite("libero_object")
    index = next(found.index for found in suite.tasks if found.name == task)
    scene = Scene(suite, index)

    def other() -> str:
        there = {kind(name) for name in scene.env.truth.objects}
        return next(instruction(thing) for thing in ASKED[index + 1 :] + ASKED[:index] if thing in there)

    begin = scene.reset if generated else scene.env.begin
    return Place(scene.env, begin, suite.convention(policy), other)


OPEN = {"metaworld": open_metaworld, "libero_object": open_libero}


def wrong_scene(suite: str, seed: int, generated: bool) -> int:
    """Return the seed of the scene that is shown instead of the scene of `seed`."""
    stored = suite == "libero_object" and not generated
    return (seed + STORED // 2) % STORED if stored else seed + 50


def evaluate_arm(
    suite: str, task: str, arm: str, seeds: Sequence[int], weights: Path, generated: bool
) -> dict[str, Any]:
    """Run one arm of one task; return its figures."""
    import torch

    torch.set_num_threads(1)
    policy = load_chunk_policy(weights)
    method = None if arm in CONTROLS else methods_of([arm])[0].method
    place = OPEN[suite](policy, task, generated)
    other = OPEN[suite](policy, task, generated) if arm == "wrong_scene" else None
    success, looks, milliseconds = [], [], []
    with contextlib.nullcontext() if method is None else method.attach(policy) as session:
        for seed in seeds:
            seen = place.begin(seed)
            shown = seen if other is None else other.begin(wrong_scene(suite, seed, generated))
            if session is not None:
                session.reset()
            instruction = place.wrong_instruction() if arm == "wrong_instruction" else seen.instruction
            over = solved = False
            count = 0
            while not over:
                view = place.convention.observe(replace(shown, proprio=seen.proprio))
                images = dict(view.images)
                for name in images:
                    if arm == "blank" or (arm == "blank_wrist" and name != "image"):
                        images[name] = np.full_like(images[name], 128)
                started = time.perf_counter()
                chunk = policy.act(images, instruction, view.proprio)
                milliseconds.append(1000 * (time.perf_counter() - started))
                count += 1
                for action in place.convention.plan(chunk):
                    if other is not None:
                        with contextlib.suppress(SessionError):  # its own episode may be over before
                            shown, *_ = other.environment.step(action)
                    seen, _, terminated, truncated, info = place.environment.step(action)
                    if other is None:
                        shown = seen
                    solved, over = bool(info["success"]), terminated or truncated
                    if over:
                        break
            success.append(solved)
            looks.append(count)
    for opened in (place, other):
        if opened is not None:
            opened.environment.close()
    outcomes = {str(seed): value for seed, value in zip(seeds, success, strict=True)}
    steps = {str(seed): value for seed, value in zip(seeds, looks, strict=True)}
    return entry_of(task, arm, outcomes, steps, float(np.median(milliseconds)))


def entry_of(
    task: str, arm: str, outcomes: dict[str, bool], steps: dict[str, int], milliseconds: float
) -> dict[str, Any]:
    """Return the figures of one arm of one task from its episodes' outcomes and control steps by seed."""
    return {
        "task": task,
        "arm": arm,
        **rate(sum(outcomes.values()), len(outcomes)),
        "mean_control_steps": round(float(np.mean(list(steps.values()))), 2),
        "milliseconds_per_control_step_p50": round(milliseconds, 2),
        "success_by_seed": outcomes,
        "control_steps_by_seed": steps,
    }


def joined(before: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of an arm with more episodes; the milliseconds are those of the newest ones."""
    if before is None:
        return more
    outcomes, steps = (before[name] | more[name] for name in ("success_by_seed", "control_steps_by_seed"))
    return entry_of(more["task"], more["arm"], outcomes, steps, more["milliseconds_per_control_step_p50"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=tuple(OPEN), default="metaworld")
    parser.add_argument("--weights", type=Path, required=True, help="folder of weights")
    parser.add_argument("--tasks", nargs="*", help="names of tasks; all if left out")
    parser.add_argument("--arms", nargs="*", default=["policy"])
    parser.add_argument("--episodes", type=positive, default=50)
    parser.add_argument("--first-seed", type=int, help="default: the first one that no training uses")
    parser.add_argument("--generated", action="store_true", help="LIBERO: scenes of its generator, for development")
    parser.add_argument("--workers", type=positive, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.first_seed is None:
        args.first_seed = EVALUATION_SEED if args.suite == "metaworld" else 500_000 if args.generated else 0
    try:
        known = [name for name, _ in load_chunk_policy(args.weights).config.tasks]
        methods_of([arm for arm in args.arms if arm not in CONTROLS])
    except VLAPrunerError as error:
        parser.error(str(error))
    tasks = args.tasks or known
    if unknown := sorted(set(tasks) - set(known)):
        parser.error(f"--tasks has {', '.join(unknown)}; this policy's tasks are {', '.join(known)}.")
    seeds = range(args.first_seed, args.first_seed + args.episodes)
    weights = hashlib.sha256((args.weights / "model.safetensors").read_bytes()).hexdigest()
    # Files from before LIBERO say neither a suite nor a kind of scenes.
    old = {"suite": "metaworld", "generated": False}
    same = {"weights_sha256": weights, "suite": args.suite, "generated": args.generated, "first_seed": seeds.start}
    report = resumed(args.out, same, old, parser)
    if args.suite == "libero_object" and not args.generated and not 0 <= seeds.start < seeds.stop <= STORED:
        parser.error(f"LIBERO stores {STORED} initial states of a task, from 0 on; give fewer --episodes.")
    report["machine"] = machine()
    found = {(entry["task"], entry["arm"]): entry for entry in report["results"]}
    jobs: list[tuple[Any, ...]] = []
    for task, arm in dict.fromkeys((task, arm) for arm in args.arms for task in tasks):
        before = found.get((task, arm), {"success_by_seed": {}})["success_by_seed"]
        if left := [seed for seed in seeds if str(seed) not in before]:
            if before and "control_steps_by_seed" not in found[task, arm]:
                parser.error(f"{args.out} has no control steps by seed, so nothing can be added; give another file.")
            jobs.append((args.suite, task, arm, left, args.weights, args.generated))
    with ProcessPoolExecutor(args.workers) as pool:
        for entry in finished(pool, evaluate_arm, jobs):
            key = entry["task"], entry["arm"]
            found[key] = entry = joined(found.get(key), entry)
            report["results"] = list(found.values())
            report["summary"] = summarise(report["results"], CONTROLS)
            publish(entry, entry["milliseconds_per_control_step_p50"], report, args.out)
    print(json.dumps(report.get("summary", {}), indent=1))


if __name__ == "__main__":
    main()
