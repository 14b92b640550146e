"""Records LIBERO-Object for the two-camera policy: the scripted expert, disturbed, or the policy's own episodes.

    python -m reference.chunk.libero_record --episodes 60
    python -m reference.chunk.libero_record --dagger 1 --weights FOLDER --episodes 12

Scenes come from LIBERO's own generator, never from the 50 stored initial states that published figures use. At every
look the expert's next eight actions are written down as they are carried out, without noise; what disturbs the robot
comes between looks, and a look whose eight actions it interrupts is left out. Before anything is grasped the same look
also answers what the expert would do for other objects of the scene and from other places of the hand, by a simple
model of how the hand follows.
Interrupted runs go on: shards that exist are left alone.
"""

from __future__ import annotations

import argparse
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from reference.chunk.corpus import DATA_ROOT, Recorder
from reference.chunk.libero_things import THINGS
from vla_pruner.simulators import libero_expert
from vla_pruner.simulators.libero_conventions import AGENT, WRIST
from vla_pruner.simulators.libero_environment import DUMMY_ACTION, SETTLING_STEPS
from vla_pruner.simulators.libero_expert import LiberoObjectExpert, _angle, _Phase
from vla_pruner.simulators.libero_truth import Pose

CHUNK, EVERY, IMAGE, SCALE = 8, 4, 128, 2
"""Actions a chunk, actions from one look to the next, side of an image in pixels, and how much larger it is drawn
before it is averaged down.
"""
SHARD_EPISODES = 10
OTHERS, IMAGINED = 2, 3
QUESTIONS = 1 + OTHERS + IMAGINED
_FOLLOWS = 0.8
"""Share of a commanded step that the hand has gone when the next one is commanded."""
_DAGGER_SEED, _ROUND_SEEDS = 200_000, 20_000


class Expert(LiberoObjectExpert):
    """The scripted expert as nearly a function of the scene: it goes up again if it was pushed aside, closes as soon as
    the hand rests on the object, and lifts as soon as the fingers rest.

    `LiberoObjectExpert` counts steps instead, which no policy can see: while it waited its labels said "stay", and a
    policy that learned from them stayed for good.
    """

    ground = 0.0
    """The height of the ground below the objects, in metres."""

    def aim(self, truth: Any, thing: str, basket: str, ground: float) -> None:
        """Act by this truth, for this object."""
        self._truth, self._object, self._basket, self.ground = truth, thing, basket, ground
        self.reset()

    def reset(self) -> None:
        super().reset()
        self._width = self._sunk = np.inf

    def _sink(self, truth: Any) -> np.ndarray:
        way, height = self._way_to_grip(truth, self._tips(truth.points(self._object))), truth.hand().position[2]
        if np.linalg.norm(way[:2]) > 0.02:
            self._enter(_Phase.COME)
        elif self._steps > 1 and way[2] > -0.014 and abs(self._sunk - height) < 5e-4:
            self._enter(_Phase.GRASP)
        self._sunk = height
        return super()._sink(truth)

    def _grasp(self, truth: Any) -> np.ndarray:
        width = float(np.linalg.norm(truth.fingers()))
        if self._steps > 3 and abs(self._width - width) < 5e-4:
            self._enter(_Phase.LIFT)
        self._width = width
        return super()._grasp(truth)

    def take_over(self) -> None:
        """Guess the phase from the scene, after another actor."""
        truth = self._truth
        assert truth is not None
        self.reset()
        points, hand = truth.points(self._object), truth.hand().position
        centre = truth.pose(self._object).position
        near = np.linalg.norm((hand - centre)[:2]) < 0.03 and hand[2] < points[:, 2].max() + 0.02
        closing = np.linalg.norm(truth.fingers()) < 0.9 * _OPEN_WIDTH
        if near and closing:
            # The height of its middle if it stood on the ground.
            self._height = self.ground + centre[2] - points[:, 2].min()
            self._enter(_Phase.CARRY if points[:, 2].min() > self.ground + 0.02 else _Phase.LIFT)
            return
        self._steps = 1
        self._come(truth)  # plans the grip
        way = self._way_to_grip(truth, points[:, 2].max() + libero_expert._ABOVE)
        if self._phase is _Phase.COME and np.linalg.norm(way[:2]) < 0.01 and way[2] > 0:
            self._height = centre[2]
            self._enter(_Phase.SINK)


_OPEN_WIDTH = 0.078


class Imagined:
    """A scene whose hand is in another place and goes where it is sent, while nothing else moves."""

    def __init__(self, truth: Any, points: Mapping[str, np.ndarray], hand: np.ndarray) -> None:
        self._truth, self._points = truth, points
        self.position, self.angle = hand.copy(), _angle(truth.fingers())
        self.objects = truth.objects

    def points(self, name: str) -> np.ndarray:
        return self._points[name]

    def pose(self, name: str) -> Pose:
        return self._truth.pose(name)

    def hand(self) -> Pose:
        return Pose(self.position, np.eye(3))

    def fingers(self) -> np.ndarray:
        return _OPEN_WIDTH * np.array([np.cos(self.angle), np.sin(self.angle), 0.0])

    def follow(self, action: np.ndarray) -> None:
        self.position = self.position + _FOLLOWS * libero_expert._STEP * action[:3]
        self.angle += _FOLLOWS * libero_expert._TURN * action[5]


def imagine(expert: Expert, points: Mapping[str, np.ndarray], thing: str, hand: np.ndarray) -> np.ndarray:
    """Return (CHUNK, 7): the actions of an expert like `expert` for another object or from another place."""
    scene, other = Imagined(expert._truth, points, hand), Expert()
    other.aim(scene, thing, expert._basket, expert.ground)
    actions = []
    for _ in range(CHUNK):
        action = other.act({}, "")[0]
        actions.append(action)
        scene.follow(action)
    return np.stack(actions)


def _without_smoothing(xml: str) -> str:
    """A scene's XML with one sample a pixel."""
    root = ElementTree.fromstring(xml)
    visual = root.find("visual")
    if visual is None:
        visual = ElementTree.SubElement(root, "visual")
    quality = visual.find("quality")
    if quality is None:
        quality = ElementTree.SubElement(visual, "quality")
    quality.set("offsamples", "0")
    return ElementTree.tostring(root, encoding="unicode")


def kind(name: str) -> str:
    """milk_1 -> milk."""
    return name.rpartition("_")[0]


class Scene:
    """One LIBERO environment with scenes from the generator.

    Args:
        suite: the LIBERO suite.
        task: number of the task.
        smoothed: whether OpenGL smooths edges, as in evaluations. Without it a look takes half the time; `images`
            averages four pixels into one in either case.
    """

    def __init__(self, suite: Any, task: int, smoothed: bool = True) -> None:
        self.env = suite.make(task)
        if not smoothed:
            self.env._open().env.set_xml_processor(_without_smoothing)
        self.task = task
        self.expert = Expert()

    def reset(self, seed: int) -> Any:
        env = self.env
        env._over = True
        env._episode += 1
        with env._package.loading(seed):
            env._make_current()
            env._env.reset()
        seen: Any = None
        for _ in range(SETTLING_STEPS):
            seen, *_ = env._env.step(DUMMY_ACTION)
        env._steps, env._over = 0, False
        truth = env.truth
        _, thing, region = truth.goal[0]
        ground = min(truth.points(name)[:, 2].min() for name in truth.objects)
        self.expert.aim(truth, thing, region.removesuffix("_contain_region"), ground)
        return env._observation(seen)

    def images(self, observation: Any) -> np.ndarray:
        """(2, IMAGE, IMAGE, 3) uint8."""
        drawn = []
        for camera in (AGENT, WRIST):
            large = observation.images[camera]
            small = large.reshape(IMAGE, SCALE, IMAGE, SCALE, 3).mean(axis=(1, 3))
            drawn.append(small.round().astype(np.uint8))
        return np.stack(drawn)

    def marks(self) -> np.ndarray:
        """(2, len(THINGS), 2) pixels in the images as they are recorded; NaN where a thing is out of view."""
        sim, truth = self.env._env.sim, self.env.truth
        out = np.full((2, len(THINGS), 2), np.nan, np.float32)
        model, data = sim.model._model, sim.data._data
        for number, camera in enumerate((AGENT, WRIST)):
            index = sim.model.camera_name2id(camera)
            axes = np.array(data.cam_xmat[index]).reshape(3, 3)
            focal = IMAGE / 2 / np.tan(np.radians(model.cam_fovy[index]) / 2)
            for name in truth.objects:
                if kind(name) not in THINGS:
                    continue
                ray = (truth.pose(name).position - data.cam_xpos[index]) @ axes
                if -ray[2] < 1e-3:
                    continue
                # LIBERO's images are mirrored.
                place = IMAGE / 2 + focal * np.array([-ray[0], -ray[1]]) / -ray[2]
                if (place >= 0).all() and (place < IMAGE).all():
                    out[number, THINGS.index(kind(name))] = place
        return out


def answers(scene: Scene, rng: np.random.Generator, proprio: np.ndarray) -> tuple[np.ndarray, ...]:
    """Questions beside the recorded one: chunks (Q, T, 7), things (Q,), proprio (Q, 8), imagined (Q,)."""
    truth, expert = scene.env.truth, scene.expert
    chunks = np.zeros((QUESTIONS, CHUNK, 7), np.float32)
    things = np.full(QUESTIONS, -1, np.int16)
    proprios = np.repeat(proprio[None], QUESTIONS, axis=0)
    imagined = np.zeros(QUESTIONS, bool)
    if expert._phase not in (_Phase.COME, _Phase.SINK):
        return chunks, things, proprios, imagined
    points = {name: truth.points(name) for name in truth.objects}
    hand = truth.hand().position
    # The state's hand is robosuite's own point, a fixed way from the one between the tips.
    names = [name for name in truth.objects if kind(name) in THINGS[:-1]]
    others = [name for name in names if name != expert._object]
    rng.shuffle(others)
    jobs = [(name, hand, False) for name in others[:OTHERS]]
    for _ in range(IMAGINED):
        name = names[rng.integers(len(names))] if rng.random() < 0.6 else expert._object
        over = points[name]
        middle = np.array([*((over[:, :2].min(0) + over[:, :2].max(0)) / 2), over[:, 2].max()])
        if rng.random() < 0.5:
            place = middle + np.array([*rng.normal(0, 0.03, 2), 0.12 * rng.random()])
        else:
            place = hand + rng.normal(0, 0.06, 3)
        place[2] = max(place[2], over[:, 2].max() - 0.02, expert.ground + 0.04)
        jobs.append((name, place, True))
    for index, (name, place, moved) in enumerate(jobs, 1):
        chunks[index] = imagine(expert, points, name, place)
        things[index] = THINGS.index(kind(name))
        proprios[index, :3] += (place - hand).astype(np.float32)
        imagined[index] = moved
    return chunks, things, proprios, imagined


class Look:
    """One control step of a recording, whose chunk is known only once it was carried out."""

    def __init__(self, scene: Scene, rng: np.random.Generator, observation: Any, number: int) -> None:
        self.chunks, self.things, proprios, imagined = answers(scene, rng, observation.proprio)
        self.things[0] = THINGS.index(kind(scene.expert._object))
        self.row = {
            "images": scene.images(observation),
            "marks": scene.marks(),
            "proprio": observation.proprio,
            "states": np.concatenate([proprios.ravel(), imagined]).astype(np.float32),
            "tasks": np.int16(scene.task),
            "episodes": np.int64(number),
        }
        self.actions: list[np.ndarray] = []

    def record(self, recorder: Recorder) -> None:
        """Write it down if its whole chunk was seen."""
        if len(self.actions) == CHUNK:
            self.chunks[0] = self.actions
            recorder.add(**self.row, chunks=self.chunks, questions=self.things)


def record_episode(scene: Scene, seed: int, number: int, policy: Any, recorder: Recorder) -> bool:
    """One episode; with a policy, it and the expert take turns. Returns whether it was solved."""
    rng = np.random.default_rng(seed)
    observation = scene.reset(seed)
    expert, env = scene.expert, scene.env
    instruction = env.task.instruction
    disturbed = rng.random() < 0.7
    solved = over = False
    looks: list[Look] = []
    action = np.zeros(7)
    turns = 0
    while not over:
        if policy is not None and turns <= 0:
            looks = []
            for _ in range(int(rng.integers(1, 6))):
                images = scene.images(observation)
                named = {"image": images[0], "wrist_image": images[1]}
                for action in policy.act(named, instruction, observation.proprio)[: policy.config.executed]:
                    observation, _, solved, cut, _ = env.step(action.astype(np.float64))
                    if solved or cut:
                        return solved
            expert.take_over()
            turns = int(rng.integers(3, 7))
        turns -= 1
        looks.append(Look(scene, rng, observation, number))
        # The last chunk goes on in thought after the episode is over: to let go is a part of it.
        for _ in range(EVERY):
            action = expert.act({}, instruction)[0]
            for look in looks[-2:]:
                look.actions.append(action)
            if not over:
                observation, _, solved, cut, _ = env.step(action)
                over = solved or cut
        if over:
            for look in looks[-2:]:
                look.actions += [action] * (CHUNK - len(look.actions))
        for look in looks[-2:]:
            look.record(recorder)
        if policy is None and disturbed and not over and rng.random() < 0.15:
            looks = []
            push = np.zeros(7)
            push[:3], push[5], push[6] = rng.uniform(-1, 1, 3) * [1, 1, 0.6], rng.uniform(-0.3, 0.3), action[6]
            for _ in range(int(rng.integers(1, 4))):
                observation, _, solved, cut, _ = env.step(push)
                over = solved or cut
                if over:
                    break
    return solved


def record_shard(task: int, seeds: range, folder: Path, weights: Path | None) -> tuple[str, int, float]:
    """One episode per seed; returns the shard's name, its looks and the success rate."""
    from vla_pruner.simulators.libero import LiberoSuite

    policy = None
    if weights is not None:
        import torch

        from vla_pruner.models.chunk import load_chunk_policy

        torch.set_num_threads(1)
        policy = load_chunk_policy(weights)
    scene = Scene(LiberoSuite("libero_object", image_size=IMAGE * SCALE), task, smoothed=policy is not None)
    recorder, solved = Recorder(), []
    for number, seed in enumerate(seeds):
        solved.append(record_episode(scene, seed, number, policy, recorder))
    recorder.save(folder)
    scene.env.close()
    return f"{task}/{folder.name}", len(recorder), float(np.mean(solved))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=60, help="episodes a task")
    parser.add_argument("--tasks", nargs="*", type=int, default=list(range(10)))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--dagger", type=int, help="number of the round; rounds draw different seeds")
    parser.add_argument("--weights", type=Path, help="folder of the policy that takes turns with the expert")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out or DATA_ROOT / ("libero-object" if args.dagger is None else "libero-object-dagger")
    first = 1000 if args.dagger is None else _DAGGER_SEED + args.dagger * _ROUND_SEEDS
    jobs = []
    for start in range(first, first + args.episodes, SHARD_EPISODES):
        seeds = range(start, min(start + SHARD_EPISODES, first + args.episodes))
        jobs += [(task, seeds, out / str(task) / f"{start:06d}", args.weights) for task in args.tasks]
    jobs = [job for job in jobs if not job[2].exists()]
    started, steps = time.time(), 0
    with ProcessPoolExecutor(args.workers) as pool:
        for done, future in enumerate(as_completed([pool.submit(record_shard, *job) for job in jobs]), 1):
            name, count, rate = future.result()
            steps += count
            print(f"[{done}/{len(jobs)}] {name}: {count}, solved {rate:.2f}, {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
