"""Facts that an OFT checkpoint does not hold: the length of its chunks, its scaling, and its cameras.

The official code keeps these as constants of three platforms and picks one by the name of the script (constants.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vla_pruner.errors import CheckpointError
from vla_pruner.models.openvla.actions import Bounds

CAMERAS = {1: ("image",), 2: ("image", "wrist_image"), 3: ("image", "left_wrist_image", "right_wrist_image")}
"""The names of the cameras by their number, in the order of the visual tokens."""


@dataclass(frozen=True)
class Platform:
    """One of the official platforms.

    Attributes:
        name: a part of the datasets' names.
        action_dim: numbers in an action.
        proprio_dim: numbers in the robot's state.
        chunk: actions in a chunk.
        bounds: which statistics scale actions and states.
        cameras: number of images that the official checkpoints with a state take.
    """

    name: str
    action_dim: int
    proprio_dim: int
    chunk: int
    bounds: Bounds
    cameras: int


PLATFORMS = (
    Platform("libero", action_dim=7, proprio_dim=8, chunk=8, bounds="q99", cameras=2),
    Platform("aloha", action_dim=14, proprio_dim=14, chunk=25, bounds="minmax", cameras=3),
    Platform("bridge", action_dim=7, proprio_dim=7, chunk=5, bounds="q99", cameras=1),
)


def find_platform(action_dim: int, proprio_dim: int | None, datasets: Iterable[str]) -> Platform | None:
    """Return the official platform with these sizes; if several have them, the one in the datasets' names.

    Args:
        action_dim: numbers in an action.
        proprio_dim: numbers in the robot's state; None if the policy does not read it.
        datasets: names of the datasets in the statistics.

    Returns:
        the platform; None if none or several fit.
    """
    fitting = [p for p in PLATFORMS if p.action_dim == action_dim and proprio_dim in (None, p.proprio_dim)]
    if len(fitting) > 1:
        names = " ".join(datasets).lower()
        fitting = [platform for platform in fitting if platform.name in names]
    return fitting[0] if len(fitting) == 1 else None


def camera_names(count: int, cameras: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return `cameras` if given, else the usual names of `count` cameras.

    Raises:
        CheckpointError: `cameras` is empty, names one twice, or names more than three.
    """
    if cameras is None:
        return CAMERAS[count]
    found = tuple(cameras)
    if isinstance(cameras, str) or not 1 <= len(found) <= 3 or len(set(found)) != len(found):
        raise CheckpointError(f"cameras={cameras!r} was given; give one to three different names in a tuple.")
    return found
