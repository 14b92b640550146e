"""The interface of every policy of this project, whatever its family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import nn

from vla_pruner.observations import Observation

INSTRUCTION = "pick up the red block and put it into the bowl"
_SIDE = 224


@runtime_checkable
class Policy(Protocol):
    """One robot's policy: images and an instruction in, an action chunk out.

    It is a module itself, or has the one that it drives as `module`; methods attach to either. (A module has no
    `module`: this distinguishes parallel wrappers from their content.)

    Attributes:
        cameras: names of the images that `act` takes, in the order of the visual tokens.
        vision_towers: modules that turn pixels into patch features; each gets every camera's image once a control step.
        proprio_size: the number of proprioception values that `act` takes; None: none.

    If a tower gets several images of each camera, such as tiles of it, the policy has their number as `tiles`.
    """

    @property
    def cameras(self) -> tuple[str, ...]: ...

    @property
    def vision_towers(self) -> tuple[nn.Module, ...]: ...

    @property
    def proprio_size(self) -> int | None: ...

    def act(self, images: Mapping[str, np.ndarray], instruction: str, proprio: np.ndarray | None = None) -> np.ndarray:
        """Run one control step: return the whole action chunk, (chunk, dim) float.

        Args:
            images: (H, W, 3) uint8, RGB, upright, by camera.
            instruction: the task in words.
            proprio: (proprio_size,) the robot's state, in the units that the checkpoint was trained on.

        Raises:
            ObservationError: something does not fit the policy.
        """
        ...

    def reset(self) -> None:
        """Begin a new episode."""
        ...


@runtime_checkable
class BatchPolicy(Policy, Protocol):
    """A policy that can act for several robots in one forward pass, each row as if it were alone.

    So `act_batch` draws nothing from torch's generators: a row's draws would depend on its place among the others. A
    server refuses a policy that does. Policies that draw (a flow's noise) have `act` alone.
    """

    def act_batch(
        self,
        images: Sequence[Mapping[str, np.ndarray]],
        instructions: Sequence[str],
        proprio: Sequence[np.ndarray] | None = None,
    ) -> np.ndarray:
        """Run one control step of B robots: return (B, chunk, dim). Arguments as in `act`, one for each robot.

        Raises:
            ObservationError: something of any robot does not fit the policy.
        """
        ...


@runtime_checkable
class ShowsExample(Protocol):
    """A policy with an example of its training data, for tools that act without a robot: audits, a server's warm-up."""

    def example(self) -> Observation:
        """Return an observation like those of its training: grey images of the right size, one of its instructions, a
        state in the middle of those that it saw.
        """
        ...


def example_of(policy: Any) -> Observation:
    """Return an observation that a policy can act on: its own example if it has one, else grey images of 224 pixels, a
    usual instruction, and a state of zeros.

    Args:
        policy: as `Policy` describes it.
    """
    if isinstance(policy, ShowsExample):
        return policy.example()
    images = {camera: np.full((_SIDE, _SIDE, 3), 128, np.uint8) for camera in policy.cameras}
    size = policy.proprio_size
    return Observation(images, INSTRUCTION, None if size is None else np.zeros(size, np.float32))


def module_of(policy: Any) -> nn.Module:
    """Return the module behind a policy; a module is its own."""
    return policy if isinstance(policy, nn.Module) else policy.module
