"""The policy of an evaluation: any that `load_policy` knows, a suite's scripted expert, or one that does nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from vla_pruner.errors import ObservationError
from vla_pruner.simulators.base import Convention, Environment, SeesTheState, Suite, SuiteError, Task
from vla_pruner.wording import said_by

EXPERT, NOTHING = "expert", "nothing"
SCRIPTED = (EXPERT, NOTHING)


class DoNothing(nn.Module):
    """A policy without images whose every action is zero: an evaluation must see it fail.

    Args:
        action_size: numbers in an action.
    """

    cameras: tuple[str, ...] = ()
    vision_towers: tuple[nn.Module, ...] = ()
    proprio_size = None

    def __init__(self, action_size: int) -> None:
        super().__init__()
        self.action_size = action_size

    def watch(self, environment: Environment) -> None:
        """Do nothing: it needs no ground truth."""

    def reset(self) -> None:
        """Do nothing: it has no memory."""

    def act(self, images: Mapping[str, np.ndarray], instruction: str, proprio: np.ndarray | None = None) -> np.ndarray:
        """Return (1, action_size) zeros."""
        return np.zeros((1, self.action_size), np.float32)


@dataclass(frozen=True)
class PolicySource:
    """The source of a policy; small, so that it can be sent to workers.

    Attributes:
        name: "expert", "nothing", or a name for `load_policy`; with `random_weights` one for `random_policy`.
        random_weights: whether weights are drawn.
        size: of random weights, "tiny" or "full".
        device, dtype: as of `load_policy`.
        options: of the family.
    """

    name: str
    random_weights: bool = False
    size: str = "tiny"
    device: str = "cpu"
    dtype: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scripted(self) -> bool:
        """True if it acts without images, so that nothing can be pruned."""
        return self.name in SCRIPTED and not self.random_weights

    def load(self, suite: Suite | None = None) -> Any:
        """Return the policy for a suite; only scripted ones differ from suite to suite, and need one.

        Raises:
            VLAPrunerError: it cannot be loaded, or the suite has no expert.
        """
        if self.scripted:
            assert suite is not None
            return DoNothing(suite.action_size) if self.name == NOTHING else suite.expert()
        from vla_pruner.policies.asked import asked_policy

        return asked_policy(
            self.name,
            random_weights=self.random_weights,
            size=self.size,
            device=self.device,
            dtype=self.dtype,
            options=self.options,
        )


def sees_images(policy: Any) -> bool:
    """Return True if a policy acts by images, so that pruning and blank images mean something."""
    return not isinstance(policy, SeesTheState)


def check_fits(policy: Any, suite: Suite, convention: Convention) -> None:
    """Refuse a policy that cannot act in a suite, before its first episode crashes, and every other one.

    Args:
        convention: the policy's view of the suite.

    Raises:
        SuiteError: its cameras are not those that it is shown, their images cannot be prepared for it, or its actions
            have another size than the suite's.
        CheckpointError, ObservationError: its actions cannot be scaled, for instance because it has statistics of
            several datasets and none was chosen.
    """
    cameras, shown = tuple(policy.cameras), convention.cameras
    missing = [name for name in cameras if name not in shown] + [
        one for one in shown.values() if one not in suite.cameras
    ]
    if missing:
        raise SuiteError(
            f"{suite.name} has the cameras {', '.join(map(repr, suite.cameras))}, and this policy takes "
            f"{', '.join(map(repr, cameras))}: nothing is known of {missing[0]!r}. Give a policy trained on this suite."
        )
    check_images_fit(suite, convention)
    statistics = getattr(policy, "get_action_stats", None)
    if callable(statistics):
        statistics()
    size = action_size(policy)
    if size is None:
        return
    planned = convention.plan(np.zeros((1, size), np.float32)).shape[1]
    if planned != suite.action_size:
        raise SuiteError(
            f"{suite.name} takes actions of {suite.action_size} numbers, and this policy's have {planned}; it was "
            "trained for another robot. Give a policy trained on this suite."
        )


def check_images_fit(suite: Suite, convention: Convention) -> None:
    """Refuse images of a size that the convention cannot prepare.

    Raises:
        SuiteError: the suite draws such images, or a package that prepares them is missing.
    """
    side = getattr(suite, "image_size", None)
    if not convention.cameras or not isinstance(side, int):
        return
    try:
        convention.image(np.zeros((side, side, 3), np.uint8))
    except (ObservationError, ImportError) as error:
        raise SuiteError(f"{suite.name} draws images of {side} x {side} pixels. {said_by(error)}") from error


def refused_instructions(policy: Any, tasks: Iterable[Task]) -> dict[tuple[str, int], str]:
    """Return the policy's own message for each of the tasks, by suite and number, whose instruction it does not read.
    Only the reference policies, which know the words of their training alone, say so without acting.
    """
    read = getattr(policy, "encode_instructions", None)
    found: dict[tuple[str, int], str] = {}
    if not callable(read):
        return found
    for task in tasks:
        try:
            read([task.instruction])
        except ObservationError as error:
            found[task.suite, task.index] = str(error)
    return found


def action_size(policy: Any) -> int | None:
    """Return the numbers in an action of a policy, if it says so without acting; else None."""
    size = getattr(policy, "action_size", None)
    return size if isinstance(size, int) else None


def fingerprint(policy: Any) -> str:
    """Sixteen hexadecimal digits of a policy's weights: names, shapes, types and up to 64 values of each.

    Two checkpoints under one name differ in it, so that their results do not mix.
    """
    module = getattr(policy, "module", policy)
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, parameter in sorted(getattr(module, "named_parameters", list)()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 64)][:64].to("cpu")
        values = picked.double() if picked.is_floating_point() else picked
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]
