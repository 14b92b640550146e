"""A policy, an environment and arms that need no simulator and no trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from vla_pruner.demo.arms import BASELINE, Arm
from vla_pruner.methods import RandomKeep, VLAPruner
from vla_pruner.models.reference import ReferenceConfig, ReferencePolicy
from vla_pruner.observations import Observation
from vla_pruner.policies.random import random_policy

TASKS = (("reach", "reach the ball"), ("push", "push the puck"))


@pytest.fixture(autouse=True)
def busy(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The cores that other programs use before a run and after it, whatever else runs beside the tests: none."""
    cores = [0.0, 0.0]
    monkeypatch.setattr("vla_pruner.conditions.busy_cores", lambda: cores[0])
    monkeypatch.setattr("vla_pruner.demo.run.busy_cores", lambda: cores[1])
    return cores


class FakeEnvironment:
    """Solved at step `solved_at` on even seeds; over after 6 steps on odd ones. Counts its calls."""

    solved_at = 5
    longest = 6
    cameras, side = ("image",), 32

    def __init__(self, task: str) -> None:
        self.task = task
        self.closed = False
        self.resets: list[int] = []
        self.actions: list[np.ndarray] = []

    def _observe(self) -> Observation:
        generator = np.random.default_rng([self.resets[-1], len(self.actions)])
        shape = (self.side, self.side, 3)
        images = {camera: generator.integers(0, 255, shape, dtype=np.uint8) for camera in self.cameras}
        return Observation(images, dict(TASKS)[self.task], generator.normal(size=4).astype(np.float32))

    def reset(self, seed: int) -> Observation:
        self.resets.append(seed)
        self.actions = []
        return self._observe()

    def step(self, chunk: np.ndarray) -> tuple[Observation, bool, bool]:
        self.actions.append(chunk)
        success = self.resets[-1] % 2 == 0 and len(self.actions) >= self.solved_at
        return self._observe(), success, success or len(self.actions) >= self.longest

    def render(self, size: int) -> np.ndarray:
        return np.full((size, len(self.cameras) * size, 3), 128, np.uint8)

    def close(self) -> None:
        self.closed = True


class PairEnvironment(FakeEnvironment):
    """The same with two cameras."""

    cameras, side = ("image", "wrist_image"), 64


class FakeEnvironments:
    """Makes `FakeEnvironment`s and remembers them."""

    def __init__(self) -> None:
        self.made: dict[str, FakeEnvironment] = {}

    def __call__(self, task: str) -> FakeEnvironment:
        assert task not in self.made, "an environment is made once a task"
        self.made[task] = FakeEnvironment(task)
        return self.made[task]


@pytest.fixture(scope="session")
def policy() -> ReferencePolicy:
    """A tiny untrained policy: 16 visual tokens, 3 layers."""
    torch.manual_seed(0)
    words = tuple(sorted({word for _, instruction in TASKS for word in instruction.split()}))
    config = ReferenceConfig(
        image_size=32,
        vision_width=16,
        vision_layers=1,
        vision_heads=2,
        hidden_size=32,
        num_layers=3,
        num_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        words=words,
        tasks=TASKS,
    )
    return ReferencePolicy(config).eval()


@pytest.fixture(scope="session")
def chunk_policy() -> Any:
    """A tiny untrained two-camera policy: 128 visual tokens, 6 layers."""
    return random_policy("reference-chunk")


@pytest.fixture
def environments() -> FakeEnvironments:
    return FakeEnvironments()


@pytest.fixture
def arms() -> tuple[Arm, ...]:
    """Three arms; they prune from the second layer on."""
    return (
        Arm(BASELINE, "unpruned", "unpruned", None),
        Arm("drop", "VLA-Pruner 0.25 drop", "drop", VLAPruner(keep=0.25, layer=1, preset="paper")),
        Arm("random", "random 0.25 drop", "random", RandomKeep(keep=0.25, layer=1)),
    )


def module_state(module: torch.nn.Module) -> list[Any]:
    """Everything that an attachment or a timer could leave behind."""
    return [
        (name, type(part), len(part._forward_hooks), len(part._forward_pre_hooks), sorted(vars(part)))
        for name, part in module.named_modules()
    ]


@contextmanager
def leaves_no_trace(module: torch.nn.Module) -> Iterator[None]:
    before = module_state(module)
    yield
    assert module_state(module) == before
