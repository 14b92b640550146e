"""The published evaluation of OpenVLA on SIMPLER's bridge tasks. Needs no simulator.

The images and actions of SimplerEnv's OpenVLA script: the camera's image squashed to 224 x 224 by area and not cropped,
the action scaled by the statistics of bridge_orig, its rotation turned from roll, pitch and yaw to axis and angle, and
the gripper open or closed.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from vla_pruner.errors import ObservationError, VLAPrunerError
from vla_pruner.simulators.base import Convention, SeesTheState, SimulatorUnavailable, SuiteError, convention_of
from vla_pruner.wording import a_type, install

INSTALL = install("simpler")

CAMERA = "3rd_view_camera"
"""The camera over the robot's shoulder, 640 x 480."""

ACTION_SIZE = 7
"""Displacement of the hand in metres (3), its rotation as axis times angle in radians (3), gripper (-1 closed, +1
open).
"""

DATASET = "bridge_orig"
"""The data set of this robot, whose statistics scale the actions of the published checkpoint."""

IMAGE_SIZE = 224
_DRAWN = "random"  # the only statistics of random weights


def simpler_convention(policy: Any, dataset: str = DATASET) -> Convention:
    """Return the convention by which a policy's family is evaluated on SIMPLER's bridge tasks.

    Args:
        policy: as `load_policy` gives it, or one that sees the simulator's state.
        dataset: the statistics by which its actions must be scaled.

    Raises:
        SuiteError: the policy is of another family, takes several cameras, or scales its actions by other statistics.
    """
    if isinstance(policy, SeesTheState):
        return Convention({}, proprio=False)
    convention = convention_of(policy, "simpler", dataset)
    if convention is not None:
        return convention
    raise SuiteError(
        f"How {a_type(policy)} sees SIMPLER is not known here; OpenVLA's published scripts are, and policies "
        "that see the simulator's state. Run an OpenVLA checkpoint (openvla-7b, or one fine-tuned on bridge data)."
    )


def openvla(policy: Any, dataset: str) -> Convention:
    """Return the convention of OpenVLA."""
    if len(policy.cameras) != 1:
        raise SuiteError(
            f"SIMPLER shows one camera; this policy takes {', '.join(map(repr, policy.cameras))}. Load it with one: "
            "load_policy(cameras=('image',))."
        )
    try:
        found = policy.dataset(None)
    except VLAPrunerError as error:
        raise SuiteError(f"{error} SIMPLER's bridge tasks need --option unnorm_key={dataset}.") from error
    if found not in (dataset, _DRAWN):
        raise SuiteError(
            f"SIMPLER's bridge tasks take actions scaled by the statistics of {dataset!r}; this policy scales them by "
            f"{found!r}. Give --option unnorm_key={dataset} if the checkpoint has these, or, if it was trained on the "
            f"same robot, name its data set: --suite-option dataset={found}."
        )
    return Convention({policy.cameras[0]: CAMERA}, proprio=False, image=averaged, actions=widowx_actions)


def averaged(image: np.ndarray, size: int = IMAGE_SIZE) -> np.ndarray:
    """Return an image averaged down to a square by OpenCV's INTER_AREA, nothing cropped: (H, W, 3) uint8 -> (size,
    size, 3) uint8.

    Raises:
        SimulatorUnavailable: OpenCV cannot be imported.
    """
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError as error:
        raise SimulatorUnavailable(
            f"OpenCV, which resizes SIMPLER's images, cannot be imported ({error})", INSTALL
        ) from error
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)


def widowx_actions(chunk: np.ndarray) -> np.ndarray:
    """Return OpenVLA's actions as SIMPLER's WidowX takes them.

    Args:
        chunk: (n, 7) displacement in metres, rotation by roll, pitch and yaw in radians about fixed axes, and the
            gripper from 0 (closed) to 1 (open).

    Returns:
        (n, 7) float64: displacement, axis times angle, and the gripper, +1 if it was above one half and else -1.

    Raises:
        ObservationError: the actions have another number of dimensions.
    """
    given = np.asarray(chunk, dtype=np.float64)
    if given.shape[-1] != ACTION_SIZE:
        raise ObservationError(f"SIMPLER's WidowX takes actions of {ACTION_SIZE} numbers; found {given.shape[-1]}.")
    turned = np.stack([axis_angle(*rotation) for rotation in given.reshape(-1, ACTION_SIZE)[:, 3:6]])
    gripper = np.where(given[..., 6:] > 0.5, 1.0, -1.0)
    return np.concatenate([given[..., :3], turned.reshape(*given.shape[:-1], 3), gripper], axis=-1)


def axis_angle(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Return a rotation by roll, pitch and yaw, about the fixed x, y and z in this order, as axis times angle.

    Returns:
        (3,) float64, of a length from 0 to pi.
    """
    half = np.array([roll, pitch, yaw], dtype=np.float64) / 2.0
    (sr, sp, sy), (cr, cp, cy) = np.sin(half), np.cos(half)
    w = cr * cp * cy + sr * sp * sy
    axis = np.array([sr * cp * cy - cr * sp * sy, cr * sp * cy + sr * cp * sy, cr * cp * sy - sr * sp * cy])
    if w < 0:  # the same rotation, the short way round
        w, axis = -w, -axis
    sine = float(np.linalg.norm(axis))
    return axis * (2.0 if sine < 1e-12 else 2.0 * np.arctan2(sine, w) / sine)
