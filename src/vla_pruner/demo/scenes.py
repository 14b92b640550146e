"""Meta-World as the demo runs it: a chunk of actions in, the next look out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vla_pruner.observations import Observation
from vla_pruner.simulators.base import Convention


class Scene:
    """One task; see `demo.episodes.Environment`.

    Args:
        environment: of the suite.
        convention: how the policy sees the suite.
    """

    def __init__(self, environment: Any, convention: Convention) -> None:
        self._environment, self._convention = environment, convention

    def reset(self, seed: int) -> Observation:
        """Begins the episode of `seed`."""
        return self._look(self._environment.begin(seed))

    def step(self, chunk: np.ndarray) -> tuple[Observation | None, bool, bool]:
        """Carries out what the convention says of a chunk (n, action_size).

        Returns:
            The next look (None where the episode is over), whether the task is solved, and whether it is over.
        """
        seen: Any = None
        for command in self._convention.plan(chunk):
            seen, _, terminated, truncated, info = self._environment.step(command)
            if terminated or truncated:
                return None, bool(info["success"]), True
        return self._look(seen), False, False

    def render(self, size: int) -> np.ndarray:
        """(size, n * size, 3) uint8: what each of the policy's n cameras shows, side by side."""
        views = [self._environment.picture(camera, size) for camera in self._convention.cameras.values()]
        return np.concatenate(views, axis=1)

    def close(self) -> None:
        """Frees what it holds."""
        self._environment.close()

    def _look(self, seen: Any) -> Observation:
        return self._convention.observe(seen)


def metaworld_scenes(policy: Any) -> Callable[[str], Scene]:
    """Makes the scene of a task for `policy`, at the size of its images.

    The function raises SuiteError where the policy cannot act in Meta-World, and SimulatorUnavailable where that is
    missing.
    """

    def make(task: str) -> Scene:
        from vla_pruner.simulators.metaworld_suite import MetaWorldSuite

        suite = MetaWorldSuite("metaworld:mt8", image_size=policy.image_size)
        return Scene(suite.make(task), suite.convention(policy))

    return make
