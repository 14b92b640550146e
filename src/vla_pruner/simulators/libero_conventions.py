"""The published evaluation of each family of policies on LIBERO. Needs no simulator."""

from __future__ import annotations

from typing import Any

import numpy as np

from vla_pruner.errors import ObservationError
from vla_pruner.simulators.base import Convention, SeesTheState, SuiteError, convention_of

AGENT, WRIST = "agentview", "robot0_eye_in_hand"
"""LIBERO's cameras: in front of the robot, and on its hand."""

CAMERAS = (AGENT, WRIST)
ACTION_SIZE = 7
PROPRIO_SIZE = 8
"""Hand position (3), axis times angle (3), fingers (2)."""

OPENPI_HORIZON = 5
"""The number of actions that openpi's evaluation of pi0 carries out, of ten."""

POLICY_CAMERAS = {
    "image": AGENT,
    "agentview": AGENT,
    "base_0_rgb": AGENT,
    "image2": WRIST,
    "wrist_image": WRIST,
    "left_wrist_0_rgb": WRIST,
}
"""The policies' names of LIBERO's cameras: OpenVLA-OFT has image and wrist_image, LeRobot image and image2, openpi the
rest.
"""

ABSENT = "right_wrist_0_rgb"
"""openpi's third camera, on a hand that LIBERO's robot does not have: policies that accept absent cameras mask it."""


def libero_convention(policy: Any, center_crop: bool = True) -> Convention:
    """Return the convention by which a policy's family is evaluated on LIBERO.

    OpenVLA and OFT: images through `preprocessing.libero`, the gripper's sign as LIBERO has it, one action at a time or
    the whole chunk. pi0 of transformers: openpi's five actions. LeRobot's: the checkpoint's `n_action_steps`. The
    two-camera reference policy: images averaged down to its own size, `config.executed` actions.

    Args:
        policy: as `load_policy` gives it, or one that sees the simulator's state.
        center_crop: for OpenVLA and OFT: whether the checkpoint was trained with image augmentation.

    Raises:
        SuiteError: the policy is of another family, or its cameras or its state are not LIBERO's.
    """
    if isinstance(policy, SeesTheState):
        return Convention({}, proprio=False)
    convention = convention_of(policy, "libero", center_crop)
    if convention is not None:
        return convention
    raise SuiteError(
        f"How a {type(policy).__name__} sees LIBERO is not known; OpenVLA, OpenVLA-OFT, pi0 of transformers, LeRobot's "
        "policies, and reference policies trained in LIBERO (reference:libero-object) are, and policies that see the "
        "simulator's state."
    )


def two_cameras(policy: Any, center_crop: bool) -> Convention | None:
    """Return the convention of the two-camera reference policy; None if it was trained elsewhere."""
    if not policy.config.suite.startswith("libero"):
        return None
    if policy.config.action_dimensions != ACTION_SIZE:
        raise SuiteError(
            f"LIBERO's actions have {ACTION_SIZE} numbers; this policy gives {policy.config.action_dimensions}. Use a "
            "checkpoint trained on LIBERO."
        )
    side = policy.image_size

    def image(upright: np.ndarray) -> np.ndarray:
        if upright.dtype != np.uint8 or upright.ndim != 3 or upright.shape[2] != 3:
            raise ObservationError(
                f"An image has the shape {upright.shape} and type {upright.dtype}; give (H, W, 3) uint8 from 0 to 255."
            )
        height, width, _ = upright.shape
        if not height or height != width or height % side:
            raise ObservationError(
                f"The policy sees square images of {side} pixels, averaged down from a multiple of that; found "
                f"{height} x {width}."
            )
        times = height // side
        return upright.reshape(side, times, side, times, 3).mean(axis=(1, 3)).round().astype(np.uint8)

    return Convention(_cameras(policy), _proprio(policy), image, horizon=policy.config.executed)


def pi0(policy: Any, center_crop: bool) -> Convention:
    """Return the convention of transformers' pi0."""
    return Convention(_cameras(policy), _proprio(policy), horizon=OPENPI_HORIZON)


def lerobot(policy: Any, center_crop: bool) -> Convention:
    """Return the convention of LeRobot's policies."""
    return Convention(_cameras(policy), _proprio(policy), horizon=int(policy.module.config.n_action_steps))


def openvla(policy: Any, center_crop: bool) -> Convention:
    """Return the convention of OpenVLA and OpenVLA-OFT."""
    from vla_pruner.models.openvla.actions import libero_gripper
    from vla_pruner.preprocessing.libero import libero_image, rotate_180

    def image(upright: np.ndarray) -> np.ndarray:
        return libero_image(rotate_180(upright), center_crop)

    return Convention(_cameras(policy), _proprio(policy), image, libero_gripper)


def _cameras(policy: Any) -> dict[str, str]:
    may_lack = getattr(policy, "takes_absent_cameras", False)
    cameras = [name for name in policy.cameras if not (may_lack and name == ABSENT)]
    unknown = [name for name in cameras if name not in POLICY_CAMERAS]
    if unknown:
        raise SuiteError(
            f"LIBERO has a camera in front of the robot and one on its hand; this policy's camera {unknown[0]!r} is "
            f"neither. Known names are {', '.join(POLICY_CAMERAS)}; for OpenVLA and pi0 give load_policy(cameras=...)."
        )
    return {name: POLICY_CAMERAS[name] for name in cameras}


def _proprio(policy: Any) -> bool:
    size = policy.proprio_size
    if size not in (None, PROPRIO_SIZE):
        raise SuiteError(
            f"LIBERO's state has {PROPRIO_SIZE} numbers; this policy takes {size}. Use a checkpoint trained on LIBERO."
        )
    return size is not None
