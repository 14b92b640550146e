"""Records demonstrations: the scripted experts act with noise, so that recoveries are seen; labels stay clean.

`python -m reference.demonstrations --episodes 200 --workers 2` (resumable: shards that exist are skipped).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from reference.store import DATA_ROOT, save_shard
from vla_pruner.simulators.metaworld import TASKS, MetaWorldEnv, scripted_expert

SHARD_EPISODES = 20
FIRST_SEED = 0


class NoisyExpert:
    """The expert's action plus noise that is correlated over control steps; a quarter of the episodes is clean."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.scale = 0.0 if rng.random() < 0.25 else rng.uniform(0.1, 0.5)
        self.noise = np.zeros(3)
        self.burst = 0

    def __call__(self, action: np.ndarray) -> np.ndarray:
        rng = self.rng
        self.noise = 0.6 * self.noise + 0.8 * rng.normal(size=3)
        if self.scale and self.burst == 0 and rng.random() < 0.06:
            self.burst, self.direction = int(rng.integers(2, 5)), rng.uniform(-1, 1, 3)
        noisy = action.copy()
        if self.burst:
            self.burst -= 1
            noisy[:3] = self.direction
        else:
            noisy[:3] += self.scale * self.noise
        return np.clip(noisy, -1, 1)


def record_shard(
    task: str, seeds: range, path: Path, behaviour: Callable[[np.random.Generator], Callable] = NoisyExpert
) -> tuple[str, int, float]:
    """Record one episode per seed; return the shard's name, its frames and the success rate."""
    images, states, episodes, success = [], [], [], []
    expert = scripted_expert(task)
    with MetaWorldEnv(task) as env:
        for number, seed in enumerate(seeds):
            observation, done, solved = env.reset(seed), False, False
            act = behaviour(np.random.default_rng([seed, len(task)]))
            while not done:
                images.append(observation.images["image"])
                states.append(env.state)
                episodes.append(number)
                observation, solved, done = env.step(act(expert(env.state)))
            success.append(solved)
    save_shard(path, np.stack(images), np.stack(states), np.array(episodes), np.array(success))
    return f"{task}/{path.stem}", len(images), float(np.mean(success))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=200, help="episodes a task")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=DATA_ROOT / "demonstrations")
    args = parser.parse_args()
    jobs = []
    for start in range(0, args.episodes, SHARD_EPISODES):  # all tasks grow together: training can start early
        for task in args.tasks:
            path = args.out / task / f"{FIRST_SEED + start:06d}.npz"
            if not path.exists():
                jobs.append((task, range(FIRST_SEED + start, FIRST_SEED + start + SHARD_EPISODES), path))
    started, frames = time.time(), 0
    with ProcessPoolExecutor(args.workers) as pool:
        for done, future in enumerate(as_completed([pool.submit(record_shard, *job) for job in jobs]), 1):
            name, count, rate = future.result()
            frames += count
            print(
                f"[{done}/{len(jobs)}] {name}: {count} frames, success {rate:.2f}, {time.time() - started:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
