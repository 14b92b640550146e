"""DAgger: the policy acts (with a little help), the experts label what it saw.

`python -m reference.dagger --weights CHECKPOINTS/full --round 1 --episodes 20` (resumable).
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from reference.experts import EXPERTS
from reference.rollout import policy_actor, run_episode
from reference.store import DATA_ROOT, save_shard
from vla_pruner.simulators.metaworld import TASKS, MetaWorldEnv, Observation

FIRST_SEED = 20_000
_ROUND_SEEDS = 2_000


def record_shard(task: str, seeds: range, path: Path, weights: Path, help_rate: float) -> tuple[str, int, float]:
    """Record one episode per seed; return the shard's name, its frames and the success rate."""
    import torch

    from vla_pruner.models.reference.loading import load_autoregressive_policy

    torch.set_num_threads(1)
    act = policy_actor(load_autoregressive_policy(weights))
    images, states, episodes, success = [], [], [], []
    with MetaWorldEnv(task) as env:
        for number, seed in enumerate(seeds):
            rng = np.random.default_rng(seed)
            expert_acts = rng.random(50) < help_rate

            def behaviour(shown: Observation, turns: np.ndarray = expert_acts, env: MetaWorldEnv = env) -> np.ndarray:
                if turns[env.control_steps]:
                    return EXPERTS[env.task](env.state[None])[0]
                return act(shown)

            episode = run_episode(behaviour, env, seed)
            images += episode.images
            states += episode.states
            episodes += [number] * episode.steps
            success.append(episode.success)
    save_shard(path, np.stack(images), np.stack(states), np.array(episodes), np.array(success))
    return f"{task}/{path.stem}", len(images), float(np.mean(success))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="folder with the policy that acts")
    parser.add_argument("--round", type=int, required=True, help="rounds draw different seeds")
    parser.add_argument("--episodes", type=int, default=20, help="episodes a task")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--help-rate", type=float, default=0.1, help="share of control steps in which the expert acts")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=DATA_ROOT / "dagger")
    args = parser.parse_args()
    first = FIRST_SEED + args.round * _ROUND_SEEDS
    seeds = range(first, first + args.episodes)
    jobs = [(task, seeds, args.out / task / f"{first:06d}.npz", args.weights, args.help_rate) for task in args.tasks]
    jobs = [job for job in jobs if not job[2].exists()]
    started = time.time()
    with ProcessPoolExecutor(args.workers) as pool:
        for future in as_completed([pool.submit(record_shard, *job) for job in jobs]):
            name, count, rate = future.result()
            print(f"{name}: {count} frames, success {rate:.2f}, {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
