"""The observations of the tests' robots, and a policy whose steps last until a test lets them end."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from vla_pruner.methods import Method
from vla_pruner.serving.observations import Seen

WAIT = 600.0
"""Seconds after which a test that hangs fails; no machine is so slow."""


def scene(policy: Any, robot: int, step: int) -> np.ndarray:
    """The image of a robot: blocks of its own colours, and a little noise in each step."""
    side = policy.image_size
    blocks = np.random.default_rng(robot).integers(0, 256, (side // 8, side // 8, 3)).repeat(8, 0).repeat(8, 1)
    noise = np.random.default_rng((robot, step)).integers(-20, 21, blocks.shape)
    return np.clip(blocks + noise, 0, 255).astype(np.uint8)


def scenes(policy: Any, robot: int, step: int) -> dict[str, np.ndarray]:
    """The image of every camera of the policy; those after the first look at other robots' blocks."""
    return {camera: scene(policy, robot + 1000 * number, step) for number, camera in enumerate(policy.cameras)}


def state(policy: Any, robot: int, step: int) -> np.ndarray:
    noise = np.random.default_rng((robot, step, 1)).normal(0, 0.05, policy.proprio_size)
    return (np.asarray(policy.config.proprio_mean) + noise).astype(np.float32)


def instruction(policy: Any, robot: int) -> str:
    return policy.instructions[robot % len(policy.instructions)]


def observation(policy: Any, robot: int = 0, step: int = 0, **more: Any) -> dict[str, Any]:
    """A message of a robot."""
    return {
        **{f"observation/{camera}": image for camera, image in scenes(policy, robot, step).items()},
        "observation/state": state(policy, robot, step),
        "prompt": instruction(policy, robot),
        **more,
    }


def seen(policy: Any, robot: int = 0, step: int = 0) -> Seen:
    """The same, read."""
    return Seen(scenes(policy, robot, step), instruction(policy, robot), state(policy, robot, step), reset=False)


def alone(policy: Any, method: Method, robot: int, steps: range) -> list[tuple[np.ndarray, list[int] | None]]:
    """Actions and kept ids of a robot that has the policy to itself, in an episode of these steps."""
    found = []
    with method.attach(policy) as session:
        session.reset()
        for step in steps:
            actions = policy.act(scenes(policy, robot, step), instruction(policy, robot), state(policy, robot, step))
            found.append((actions, None if session.kept is None else session.kept[0].tolist()))
    return found


class Gated:
    """A policy whose steps wait until the test opens the gate, from `begin` on.

    Attributes:
        entered: set while a step waits.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.cameras: tuple[str, ...] = module.cameras
        self.vision_towers = module.vision_towers
        self.proprio_size: int | None = module.proprio_size
        self.image_size, self.config, self.instructions = module.image_size, module.config, module.instructions
        self.example = module.example
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def begin(self) -> None:
        """Close the gate; steps before were the server's own warm-up."""
        self.gate.clear()
        self.entered.clear()

    def reset(self) -> None:
        self.module.reset()

    def act(self, images: Mapping[str, np.ndarray], instruction: str, proprio: Any = None) -> np.ndarray:
        self.entered.set()
        assert self.gate.wait(WAIT)
        return self.module.act(images, instruction, proprio)


class Failing(Gated):
    """A policy that fails by a third-party error, or acts beyond numbers, when a test sets it to."""

    error: Exception | None = None
    endless = False

    def act(self, images: Mapping[str, np.ndarray], instruction: str, proprio: Any = None) -> np.ndarray:
        if self.error is not None:
            raise self.error
        actions = self.module.act(images, instruction, proprio)
        return np.full_like(actions, np.nan) if self.endless else actions


def same_memory(one: Any, other: Any) -> bool:
    """Return True if two memories hold the same, bit by bit."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
