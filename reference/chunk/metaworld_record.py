"""Records Meta-World for the two-camera policy: demonstrations with noise, or the policy's own episodes (DAgger).

    python -m reference.chunk.metaworld_record --episodes 160
    python -m reference.chunk.metaworld_record --dagger 1 --weights FOLDER --episodes 12

In every control step the simulator is taken forward by the expert, its next eight actions are written down as the
label, and the simulator is put back: a label is what the expert would do from here, whatever was done in fact.
Interrupted runs go on: shards that exist are left alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from reference.chunk.corpus import DATA_ROOT, Recorder
from reference.dataset import SHARED_SCENE
from reference.demonstrations import NoisyExpert
from reference.experts import EXPERTS, GOAL, OBJECT
from reference.heads import project
from vla_pruner.simulators.metaworld import CORNER, TASKS, WRIST, MetaWorldEnv

CHUNK, EXECUTED, IMAGE = 8, 4, 128
"""Actions a chunk, actions carried out before the next look, and the side of an image in pixels."""
MAX_ACTIONS = 160
SHARD_EPISODES = 20
_QUESTIONS = len(SHARED_SCENE)
_NAMES = list(TASKS)
_DAGGER_SEED, _ROUND_SEEDS = 20_000, 2_000

CHUNK_EXPERTS = EXPERTS | {
    "push": replace(EXPERTS["push"], height=0.05),
    "door-open": replace(EXPERTS["door-open"], act=(-0.04, -0.05, 0.0)),
}
"""The experts of `reference.experts`; these two stopped short when each action is carried out once."""


class Branch:
    """Takes the simulator forward and puts it back."""

    def __init__(self, env: MetaWorldEnv) -> None:
        self.env, self.inner = env, env._env
        self.data = self.inner.data

    def __enter__(self) -> Branch:
        data, inner = self.data, self.inner
        self.saved = {
            name: np.array(getattr(data, name))
            for name in ("qpos", "qvel", "act", "ctrl", "mocap_pos", "mocap_quat", "qacc_warmstart", "xfrc_applied")
        }
        self.time, self.path = data.time, inner.curr_path_length
        self.previous = inner._prev_obs.copy()
        return self

    def restore(self) -> None:
        for name, value in self.saved.items():
            getattr(self.data, name)[...] = value
        self.data.time, self.inner.curr_path_length = self.time, self.path
        self.inner._prev_obs = self.previous.copy()
        self.env._mujoco.mj_forward(self.env._model, self.data)

    def __exit__(self, *_: object) -> None:
        self.restore()


def expert_chunk(env: MetaWorldEnv, task: str) -> np.ndarray:
    """Return (CHUNK, 4): the next actions of the expert of `task`, from the present state; the simulator is not
    moved.
    """
    actions, state = [], env.state
    with Branch(env):
        for _ in range(CHUNK):
            action = CHUNK_EXPERTS[task](state[None])[0]
            actions.append(action)
            state = np.asarray(env._env.step(action)[0], np.float64)
    return np.stack(actions)


def marks(env: MetaWorldEnv) -> np.ndarray:
    """(2 cameras, 2 landmarks, 2) pixels of object and goal."""
    state = env.state
    points = np.stack([state[OBJECT], state[GOAL]])
    corner = project(points, IMAGE)
    camera = env._model.camera("gripperPOV").id
    axes = env._env.data.cam_xmat[camera].reshape(3, 3)
    ray = (points - env._env.data.cam_xpos[camera]) @ axes
    focal = IMAGE / 2 / np.tan(np.radians(env._model.cam_fovy[camera]) / 2)
    depth = -ray[:, 2]
    wrist = IMAGE / 2 + focal * np.stack([ray[:, 0], -ray[:, 1]], axis=-1) / np.maximum(depth, 1e-6)[:, None]
    wrist[depth <= 1e-3] = np.nan
    both = np.stack([corner, wrist])
    both[((both < 0) | (both >= IMAGE)).any(-1)] = np.nan
    return both.astype(np.float32)


def look(env: MetaWorldEnv) -> dict[str, np.ndarray]:
    """The policy's two images."""
    return {"image": env.image(CORNER), "wrist_image": env.image(WRIST)}


Behaviour = Callable[[MetaWorldEnv, dict[str, np.ndarray], np.ndarray], Callable[[int, np.ndarray], np.ndarray]]
"""(environment, images, the expert's chunk) -> the action of each of the next steps, given its number and the state."""


def record_episode(env: MetaWorldEnv, seed: int, number: int, behave: Behaviour, recorder: Recorder) -> bool:
    """One episode; returns whether it was solved."""
    env.reset(seed)
    done = success = False
    task = _NAMES.index(env.task)
    names = SHARED_SCENE if env.task in SHARED_SCENE else (env.task,)
    while not done:
        images = look(env)
        chunks = np.zeros((_QUESTIONS, CHUNK, 4), np.float32)
        questions = np.full(_QUESTIONS, -1, np.int16)
        for index, name in enumerate(names):
            chunks[index], questions[index] = expert_chunk(env, name), _NAMES.index(name)
        state = env.state
        recorder.add(
            images=np.stack([images["image"], images["wrist_image"]]),
            proprio=state[:4].astype(np.float32),
            states=state.astype(np.float32),
            chunks=chunks,
            questions=questions,
            marks=marks(env),
            tasks=np.int16(task),
            episodes=np.int64(number),
        )
        act = behave(env, images, chunks[names.index(env.task)])
        for step in range(EXECUTED):
            _, success, done = env.step(act(step, env.state))
            if done:
                break
    return success


def noisy(seed: int, task: str) -> Behaviour:
    """Return the expert with noise that is the same for the actions of one look."""
    noise = NoisyExpert(np.random.default_rng([seed, len(task), 1]))
    noise.scale *= 0.7  # it lasts for four actions

    def behave(env: MetaWorldEnv, images: dict, chunk: np.ndarray) -> Callable[[int, np.ndarray], np.ndarray]:
        shift = noise(chunk[0]) - chunk[0] if noise.burst == 0 else None
        burst = noise.burst > 0

        def act(step: int, state: np.ndarray) -> np.ndarray:
            action = CHUNK_EXPERTS[env.task](state[None])[0].copy()
            if burst:
                action[:3] = noise.direction
            elif shift is not None:
                action[:3] += shift[:3]
            return np.clip(action, -1, 1)

        if burst:
            noise.burst -= 1
        return act

    return behave


def helped(policy: Any, seed: int, help_rate: float) -> Behaviour:
    """The policy acts; in a share of the control steps the expert does."""
    rng = np.random.default_rng(seed)

    def behave(env: MetaWorldEnv, images: dict, chunk: np.ndarray) -> Callable[[int, np.ndarray], np.ndarray]:
        if rng.random() < help_rate:
            return lambda step, state: chunk[step]
        own = policy.act(images, env.instruction, env.state[:4].astype(np.float32))
        return lambda step, state: own[step]

    return behave


def record_shard(
    task: str, seeds: range, folder: Path, weights: Path | None, help_rate: float
) -> tuple[str, int, float]:
    """One episode per seed; returns the shard's name, its control steps and the success rate."""
    policy = None
    if weights is not None:
        import torch

        from vla_pruner.models.chunk import load_chunk_policy

        torch.set_num_threads(1)
        policy = load_chunk_policy(weights)
    recorder, solved = Recorder(), []
    with MetaWorldEnv(task, IMAGE, render=False, action_repeat=1, max_control_steps=MAX_ACTIONS) as env:
        for number, seed in enumerate(seeds):
            behave = noisy(seed, task) if policy is None else helped(policy, seed, help_rate)
            solved.append(record_episode(env, seed, number, behave, recorder))
    recorder.save(folder)
    return f"{task}/{folder.name}", len(recorder), float(np.mean(solved))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=160, help="episodes a task")
    parser.add_argument("--tasks", nargs="*", default=_NAMES)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--dagger", type=int, help="number of the round; rounds draw different seeds")
    parser.add_argument("--weights", type=Path, help="folder of the policy that acts in DAgger")
    parser.add_argument("--help-rate", type=float, default=0.1, help="share of control steps in which the expert acts")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out or DATA_ROOT / ("metaworld" if args.dagger is None else "metaworld-dagger")
    first = 0 if args.dagger is None else _DAGGER_SEED + args.dagger * _ROUND_SEEDS
    jobs = []
    for start in range(
        first, first + args.episodes, SHARD_EPISODES
    ):  # all tasks grow together: training can start early
        seeds = range(start, min(start + SHARD_EPISODES, first + args.episodes))
        jobs += [(task, seeds, out / task / f"{start:06d}", args.weights, args.help_rate) for task in args.tasks]
    jobs = [job for job in jobs if not job[2].exists()]
    started, steps = time.time(), 0
    with ProcessPoolExecutor(args.workers) as pool:
        for done, future in enumerate(as_completed([pool.submit(record_shard, *job) for job in jobs]), 1):
            name, count, rate = future.result()
            steps += count
            print(f"[{done}/{len(jobs)}] {name}: {count}, solved {rate:.2f}, {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
