"""A suite, environments and policies that need no simulator and no weights."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vla_pruner.evaluation import EvalSettings, PolicySource
from vla_pruner.models.reference import ReferenceConfig, ReferencePolicy
from vla_pruner.simulators.base import Convention, Observation, Suite, SuiteError, Task, find_task

TASKS = (("reach", "reach the ball"), ("push", "push the puck"))
CRASH = "crash"
"""An environment of a suite made with this option raises if it is a file that exists."""


class FakeEnvironment:
    """Solved once the actions since the reset add up to enough; another start needs more. Counts its calls."""

    def __init__(self, task: Task, pause: float, crash: Path | None) -> None:
        self.task = task
        self.images_drawn = 0
        self.closed = False
        self.resets: list[int] = []
        self._pause = pause
        self._crash = crash
        self._actions: list[float] = []

    def reset(self, *, initial_state: int) -> tuple[Observation, dict[str, Any]]:
        assert not self.closed
        self.task.check_initial_state(initial_state)
        self.resets.append(initial_state)
        self._actions = []
        time.sleep(self._pause)
        return self._observe(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        assert action.ndim == 1
        if self._crash is not None and self._crash.exists() and self.resets[-1] == 1 and len(self._actions) == 1:
            raise RuntimeError("the simulator is unstable")
        self._actions.append(float(np.abs(action).sum()))
        wanted = 2.0 + (self.resets[-1] * 7 + self.task.index) % 5
        success = sum(self._actions) > wanted
        over = len(self._actions) >= self.task.max_steps
        return self._observe(), float(success), success, over and not success, {"success": success}

    def _observe(self) -> Observation:
        generator = np.random.default_rng([self.resets[-1], len(self._actions), self.task.index])
        image = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        self.images_drawn += 1
        return Observation({"corner": image}, self.task.instruction, generator.normal(size=4).astype(np.float32))

    def frame(self, size: int) -> np.ndarray:
        return np.zeros((size, size, 3), np.uint8)

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class FakeSuite:
    """Two tasks of up to 6 steps and 100 starts."""

    name: str = "fake"
    pause: float = 0.0
    crash: Path | None = None
    version: str = "1"
    cameras = ("corner",)
    action_size = 4
    settling_steps = 0

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(Task(self.name, index, name, text, 6, 100) for index, (name, text) in enumerate(TASKS))

    def make(self, task: Task | int | str) -> FakeEnvironment:
        return FakeEnvironment(find_task(self.tasks, task), self.pause, self.crash)

    def convention(self, policy: Any) -> Convention:
        if not policy.cameras:
            return Convention({}, proprio=False)
        return Convention({"image": "corner"}, proprio=policy.proprio_size is not None, horizon=2)

    def expert(self) -> FakeExpert:
        if self.name != "fake":
            raise SuiteError(f"{self.name} has no scripted expert.")
        return FakeExpert()

    def versions(self) -> dict[str, str]:
        return {"fake-simulator": self.version}


class FakeExpert(nn.Module):
    """It acts only while it watches the environment that runs."""

    cameras: tuple[str, ...] = ()
    vision_towers: tuple[nn.Module, ...] = ()
    proprio_size = None
    environment: FakeEnvironment

    def watch(self, environment: FakeEnvironment) -> None:
        self.environment = environment

    def reset(self) -> None:
        assert self.environment.resets

    def act(self, images: Mapping[str, np.ndarray], instruction: str, proprio: np.ndarray | None = None) -> np.ndarray:
        assert not images
        assert instruction == self.environment.task.instruction
        return np.ones((1, 4), np.float32)


def find_fake(name: str, **options: Any) -> Suite:
    if name not in ("fake", "other"):
        raise SuiteError(f"There is no suite {name!r}; the suites are fake, other.")
    suite: Any = FakeSuite(name, **options)
    return suite


class ToyFlow(nn.Module):
    """A policy whose chunk of 3 actions is drawn from torch's global generator, around the brightness of its images."""

    cameras = ("image",)
    vision_towers: tuple[nn.Module, ...] = ()
    proprio_size = 4

    def __init__(self, value: float = 0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))
        self.seen: list[np.ndarray] = []
        self.drawn: list[float] = []
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def act(self, images: Mapping[str, np.ndarray], instruction: str, proprio: np.ndarray | None = None) -> np.ndarray:
        self.seen.append(images["image"])
        noise = torch.randn(3, 4)
        self.drawn.append(float(noise[0, 0]))
        return (self.weight.detach() * images["image"].mean() / 128 * noise).numpy()


def tiny_policy() -> ReferencePolicy:
    """A reference policy that was never trained: 16 visual tokens, 3 layers."""
    torch.manual_seed(0)
    words = tuple(sorted({word for _, text in TASKS for word in text.split()}))
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


@dataclass(frozen=True)
class FakeSource(PolicySource):
    """A `PolicySource` of "flow", "tiny" or "dying"."""

    def load(self, suite: Any) -> Any:
        if self.scripted:
            return super().load(suite)
        if self.name == "dying":
            return Dying(**self.options)
        return tiny_policy() if self.name == "tiny" else ToyFlow(**self.options)


class Dying(ToyFlow):
    """Ends its whole process: at its tenth control step, once, for which it leaves a file behind; without a file
    whenever it is to push.
    """

    def __init__(self, file: str | None = None) -> None:
        super().__init__()
        self._file = None if file is None else Path(file)

    def act(self, images: Mapping[str, np.ndarray], instruction: str, proprio: np.ndarray | None = None) -> np.ndarray:
        if self._file is None:
            dies = "push" in instruction
        else:
            dies = len(self.seen) >= 9 and not self._file.exists()
            if dies:
                self._file.touch()
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().act(images, instruction, proprio)


def settings(out: Path, policy: str = "flow", **changes: Any) -> EvalSettings:
    """The unpruned flow, twice, and blank, on 2 tasks and 3 starts."""
    asked: dict[str, Any] = {
        "policy": FakeSource(policy, options=changes.pop("options", {})),
        "suites": ("fake",),
        "out": out,
        "episodes": 3,
        "methods": None if policy in ("expert", "nothing") else ("none",),
        "controls": None if policy in ("expert", "nothing") else ("again", "blank"),
    }
    return EvalSettings(**{**asked, **changes})
