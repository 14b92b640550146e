"""Builds LIBERO's environments one after the other and looks whether they are as published: `python -m
vla_pruner.simulators.libero_check` for all 40 tasks of the four suites, about 15 seconds each.

A version of MuJoCo that is not LIBERO's shows here without any policy: objects of a stored state fall or drift though
nothing touches them, or a picture comes out dark.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_pruner.simulators.base import SimulatorUnavailable, SuiteError, Task
from vla_pruner.simulators.libero import LiberoSuite
from vla_pruner.simulators.libero_environment import DUMMY_ACTION

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
MOST_DRIFT = 0.01
"""Metres that an untouched object may move after it has settled."""
LEAST_BRIGHTNESS = 40.0
"""Mean level of an image; what is not drawn is 0."""


@dataclass(frozen=True)
class Finding:
    """What one task's environment looked like."""

    task: Task
    drift: float
    """Metres that the object which moved most has moved from its stored place, while the robot stood still."""
    brightness: dict[str, float]
    """Camera -> mean level of its image, 0 to 255."""

    @property
    def problems(self) -> list[str]:
        """What is not as it should be."""
        found = [f"the image of {name} is dark" for name, mean in self.brightness.items() if mean < LEAST_BRIGHTNESS]
        if self.drift > MOST_DRIFT:
            found.append(f"an object that nothing touches moves by {100 * self.drift:.1f} cm")
        return found


def check_task(suite: LiberoSuite, task: Task | int | str, initial_state: int = 0, steps: int = 20) -> Finding:
    """Builds a task's environment, begins an episode, and stands still for some steps."""
    environment = suite.make(task)
    try:
        observation, info = environment.reset(initial_state=initial_state)
        names = environment.truth.objects
        before = [environment.truth.pose(name).position for name in names]
        brightness = {camera: float(image.mean()) for camera, image in observation.images.items()}
        for _ in range(steps):
            environment.step(np.array(DUMMY_ACTION))
        moved = [
            float(np.linalg.norm(environment.truth.pose(name).position - place))
            for name, place in zip(names, before, strict=True)
        ]
        return Finding(environment.task, info["settling"] + max(moved), brightness)
    finally:
        environment.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks the tasks; 0 if all are well, 1 if one is not, 2 if LIBERO cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m vla_pruner.simulators.libero_check", description=__doc__)
    parser.add_argument("--suites", default=",".join(SUITES), help="separated by commas (%(default)s)")
    parser.add_argument("--tasks", type=int, default=None, help="only the first so many of each suite")
    parser.add_argument("--assets", default=None, help="a folder with LIBERO's meshes and textures")
    options = parser.parse_args(arguments)
    wrong = 0
    try:
        for name in options.suites.split(","):
            suite = LiberoSuite(name, assets=options.assets)
            for task in suite.tasks[: options.tasks]:
                finding = check_task(suite, task)
                wrong += bool(finding.problems)
                levels = ", ".join(f"{camera} {mean:.0f}" for camera, mean in finding.brightness.items())
                verdict = "; ".join(finding.problems) or "ok"
                print(f"{name} {task.index:2d}  drift {1000 * finding.drift:4.1f} mm  {levels}  {verdict}", flush=True)
    except (SimulatorUnavailable, SuiteError) as error:
        print(error, file=sys.stderr)
        return 2
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
