"""The inputs of a policy at a control step, and their checks before the policy uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_pruner.errors import ObservationError
from vla_pruner.wording import a_type

HOLDS_IMAGE = (
    "The instruction holds {what}, which stands for an image in this policy's prompt; give the task in words alone."
)


@dataclass(frozen=True)
class Observation:
    """The inputs of a policy at one control step: the arguments of `act`, in their order.

    Attributes:
        images: (H, W, 3) uint8, RGB, upright, by camera. A simulator's are by its own names of its cameras, and drawn
            when they are looked at, so look before the next step.
        instruction: the task in words.
        proprio: (d,) the robot's state; None if the policy takes none.
    """

    images: Mapping[str, np.ndarray]
    instruction: str
    proprio: np.ndarray | None = None


def check_images(images: Any, cameras: tuple[str, ...]) -> None:
    """Refuse images that are not given by camera name.

    Args:
        images: the argument of `act`.
        cameras: the policy's, for the message.

    Raises:
        ObservationError: it is no mapping.
    """
    if not isinstance(images, Mapping):
        wanted = ", ".join(f"{camera!r}: ..." for camera in cameras)
        raise ObservationError(
            f"The images are {a_type(images)}; give a mapping of camera names to images: {{{wanted}}}."
        )


def check_instruction(instruction: Any, what: str = "The instruction") -> None:
    """Refuse an instruction that is no text.

    Args:
        what: it is called so in the message.

    Raises:
        ObservationError: it is no string, or has half of a character (a lone surrogate), which no tokenizer reads.
    """
    if not isinstance(instruction, str):
        raise ObservationError(f"{what} is a string, what to do in words; found {type(instruction).__name__}.")
    try:
        instruction.encode()
    except UnicodeEncodeError as error:
        raise ObservationError(
            f"{what}'s character {error.start} is half of one ({instruction[error.start]!r}), as a text that "
            "was cut or wrongly decoded has; give whole characters."
        ) from error


def array_of(values: Any) -> np.ndarray:
    """Return real numbers as an array of the same kind, in this machine's byte order and without negative strides.

    Args:
        values: an array, a tensor on any device, or nested sequences.

    Raises:
        TypeError, ValueError: they are no array of real numbers.
    """
    if hasattr(values, "detach"):  # a tensor, known without importing torch
        values = values.detach().cpu()
        # numpy has no bfloat16, and float64 holds every value of the smaller types.
        values = (values.double() if values.is_floating_point() else values).numpy()
    found = np.asarray(values)
    if found.dtype.kind not in "biuf":
        raise TypeError(f"of the type {found.dtype}")
    return np.ascontiguousarray(found, dtype=found.dtype.newbyteorder("=")).reshape(found.shape)


def state_of(proprio: Any) -> np.ndarray:
    """Return the robot's state as float32, of any shape.

    Raises:
        ObservationError: it is no array of numbers, or one of them is not finite.
    """
    try:
        found = array_of(proprio)
    except (TypeError, ValueError) as error:
        raise ObservationError(f"proprio is an array of numbers; found {type(proprio).__name__} ({error}).") from error
    with np.errstate(over="ignore"):  # told below
        state = found.astype(np.float32)
    if not np.isfinite(state).all():
        raise ObservationError(
            "proprio holds numbers that are not finite (NaN or infinity) in float32; give finite ones."
        )
    return state
