"""Builds LIBERO's environments one after the other and looks whether they are as published: `python -m
vla_pruner.simulators.libero_check` for all 40 tasks of the four suites, about 15 seconds each. `--suites` names others,
such as perturbed ones.

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
MOST_DRIFT = 0.03
"""Metres that an untouched object may move sideways; in the spatial suite's task 5 a bowl slides by 1.5 cm on MuJoCo
3.3.2, and by 3.9 cm on 3.4.0."""
LEAST_BRIGHTNESS = {"libero_spatial": 100.0, "libero_object": 120.0, "libero_goal": 100.0, "libero_10": 50.0}
"""Suite -> mean level of an image. The object suite has 138 to 140 on MuJoCo 3.3.2 and 102 on 3.4.0."""


@dataclass(frozen=True)
class Finding:
    """The measurements of one task's environment."""

    task: Task
    drift: float
    """The sideways motion in metres of the object that moved most, while it settled and in all."""
    brightness: dict[str, float]
    """The mean level of each camera's image, 0 to 255."""
    solved: bool = False
    """True if the task was solved while the robot stood still."""

    @property
    def problems(self) -> list[str]:
        """The measurements that are not as they should be, as sentences."""
        least = LEAST_BRIGHTNESS.get(self.task.suite, 1.0)
        found = [f"the image of {name} is dark" for name, mean in self.brightness.items() if mean < least]
        if self.drift > MOST_DRIFT:
            found.append(f"an object that nothing touches slides by {100 * self.drift:.1f} cm")
        if self.solved:
            found.append("it is solved though nothing was done")
        return found


def check_task(suite: LiberoSuite, task: Task | int | str, initial_state: int = 0, steps: int = 20) -> Finding:
    """Build a task's environment, begin an episode, and stand still for some steps."""
    environment = suite.make(task)
    try:
        observation, info = environment.reset(initial_state=initial_state)
        names = environment.truth.objects
        before = [environment.truth.pose(name).position for name in names]
        brightness = {camera: float(image.mean()) for camera, image in observation.images.items()}
        solved = False
        for _ in range(steps):
            *_, solved, _, _ = environment.step(np.array(DUMMY_ACTION))
            if solved:
                break
        moved = [
            float(np.linalg.norm((environment.truth.pose(name).position - place)[:2]))
            for name, place in zip(names, before, strict=True)
        ]
        return Finding(environment.task, info["settling"] + max(moved), brightness, solved)
    finally:
        environment.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the tasks; return 0 if all pass, 1 if one does not, 2 if LIBERO cannot run here."""
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
