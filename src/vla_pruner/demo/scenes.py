"""Meta-World and LIBERO as the demo runs them: a chunk of actions in, the next look out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vla_pruner.observations import Observation
from vla_pruner.simulators.base import Convention


class Scene:
    """One task; see `demo.episodes.Environment`.

    Args:
        task: its name.
        open_environment: opens the task's environment, or gives the one that is open.
        convention: the policy's view of the suite.
    """

    def __init__(self, task: str, open_environment: Callable[[str], Any], convention: Convention) -> None:
        self._task, self._open, self._convention = task, open_environment, convention
        self._environment: Any = open_environment(task)

    def reset(self, seed: int) -> Observation:
        """Begin the episode of `seed`."""
        self._environment = self._open(self._task)
        return self._look(self._environment.begin(seed))

    def step(self, chunk: np.ndarray) -> tuple[Observation | None, bool, bool]:
        """Carry out the part of a chunk (n, action_size) that the convention says.

        Returns:
            The next look (None if the episode is over), whether the task is solved, and whether it is over.
        """
        seen: Any = None
        for command in self._convention.plan(chunk):
            seen, _, terminated, truncated, info = self._environment.step(command)
            if terminated or truncated:
                return None, bool(info["success"]), True
        return self._look(seen), False, False

    def render(self, size: int) -> np.ndarray:
        """Return (size, n * size, 3) uint8: the views of the policy's n cameras, side by side."""
        views = [self._environment.picture(camera, size) for camera in self._convention.cameras.values()]
        return np.concatenate(views, axis=1)

    def close(self) -> None:
        """Free all resources."""
        self._environment.close()

    def _look(self, seen: Any) -> Observation:
        return self._convention.observe(seen)


class _Opened:
    """The environments of a suite's tasks, of which up to `most` are open at once; None: all stay open."""

    def __init__(self, make: Callable[[str], Any], most: int | None) -> None:
        self._make, self._most = make, most
        self._open: dict[str, Any] = {}

    def __call__(self, task: str) -> Any:
        if task not in self._open:
            while self._most is not None and len(self._open) >= self._most:
                self._open.pop(next(iter(self._open))).close()
            self._open[task] = self._make(task)
        return self._open[task]


def suite_of(policy: Any) -> str:
    """Return the benchmark that a reference policy was trained on: "metaworld" or "libero_object"."""
    return getattr(policy.config, "suite", "metaworld")


def scenes(policy: Any) -> Callable[[str], Scene]:
    """Return a function that makes the scene of a task of the benchmark of `policy`, at the size of its images.

    The function raises SuiteError if the policy cannot act there, and SimulatorUnavailable if the simulator is missing.
    """
    if suite_of(policy) == "metaworld":
        from vla_pruner.simulators.metaworld_suite import MetaWorldSuite

        suite: Any = MetaWorldSuite("metaworld:mt8", image_size=policy.image_size)
        most = None
    else:
        from vla_pruner.simulators.libero import LiberoSuite

        suite = LiberoSuite(suite_of(policy))
        most = 2  # each takes 2 GB
    opened, convention = _Opened(suite.make, most), suite.convention(policy)
    return lambda task: Scene(task, opened, convention)
