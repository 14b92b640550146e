"""SIMPLER's four bridge tasks (WidowX) in ManiSkill3, on the CPU, as published evaluations run them.

24 episodes a task, 60 control steps (120 for the eggplant), the instruction read anew in every step. An episode always
runs to its end, and its last step alone says whether it was solved: an object that was placed and rolls off again is no
success.
"""

from __future__ import annotations

from typing import Any

from vla_pruner.simulators.base import Convention, SuiteError, Task, find_task
from vla_pruner.simulators.simpler_conventions import ACTION_SIZE, CAMERA, DATASET, simpler_convention
from vla_pruner.simulators.simpler_environment import SimplerEnvironment
from vla_pruner.simulators.simpler_package import check_packages, installed_versions

NAME = "simpler_widowx"
EPISODES = 24
"""Episodes of a task, as published. In all tasks but the eggplant's, ManiSkill3 repeats an episode if the number is
larger.
"""

_TASKS = (
    ("widowx_spoon_on_towel", "put the spoon on the towel", 60, "PutSpoonOnTableClothInScene-v1"),
    ("widowx_carrot_on_plate", "put carrot on plate", 60, "PutCarrotOnPlateInScene-v1"),
    (
        "widowx_stack_cube",
        "stack the green block on the yellow block",
        60,
        "StackGreenCubeOnYellowCubeBakedTexInScene-v1",
    ),
    ("widowx_put_eggplant_in_basket", "put eggplant into yellow basket", 120, "PutEggplantInBasketScene-v1"),
)
"""SimplerEnv's name, the instruction, control steps, and ManiSkill3's name; in the order of the published table."""

GOOGLE_ROBOT = (
    "SIMPLER's google robot tasks are not supported: they run in SimplerEnv alone, which needs SAPIEN 2.2.2, numpy < 2 "
    "and gymnasium < 1, and a Vulkan driver with VK_KHR_external_semaphore_fd. The four bridge tasks are the suite "
    "simpler_widowx. From a SimplerEnv of your own, a pruned policy can be asked over `vla-pruner serve`."
)


class SimplerSuite:
    """SIMPLER's bridge tasks.

    Args:
        name: "simpler_widowx".
        dataset: the statistics by which a policy's actions must be scaled; another than bridge_orig only for a
            checkpoint that was trained on the same robot under another name.

    Raises:
        SuiteError: there is no such suite.
        SimulatorUnavailable: ManiSkill3, the version of it that is supported, or its assets are missing.
    """

    cameras = (CAMERA,)
    action_size = ACTION_SIZE
    settling_steps = 0  # control steps; ManiSkill3 lets objects settle within a reset

    def __init__(self, name: str = NAME, dataset: str = DATASET) -> None:
        if name != NAME:
            raise SuiteError(f"SIMPLER has no suite {name!r} here; its suite is {NAME}.")
        check_packages()
        self.name = name
        self.dataset = dataset
        self.tasks = tuple(
            Task(name, index, task, instruction, steps, EPISODES, ends_at_success=False)
            for index, (task, instruction, steps, _) in enumerate(_TASKS)
        )

    def make(self, task: Task | int | str) -> SimplerEnvironment:
        """Return the environment of a task; errors as in `Suite.make`. Takes about ten seconds and up to 1 GB."""
        found = find_task(self.tasks, task)
        return SimplerEnvironment(found, _TASKS[found.index][3])

    def convention(self, policy: Any) -> Convention:
        """Return the convention of the policy's family on SIMPLER; errors as in `Suite.convention`."""
        return simpler_convention(policy, self.dataset)

    def expert(self) -> Any:
        """Refuse: there is no scripted expert.

        Raises:
            SuiteError: always.
        """
        raise SuiteError(f"{self.name} has no scripted expert; libero_object has one, and so has Meta-World.")

    def versions(self) -> dict[str, str]:
        """Return the versions of ManiSkill3, SAPIEN, Gymnasium and numpy."""
        return installed_versions()
