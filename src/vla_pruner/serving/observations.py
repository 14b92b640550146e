"""Messages of clients, turned into inputs of policies: declared layouts of keys, and checks of every array."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_pruner.errors import ObservationError
from vla_pruner.observations import Observation
from vla_pruner.serving.errors import ServingError
from vla_pruner.strangers import Unread, shown

if TYPE_CHECKING:  # the command line uses the layouts without torch
    from vla_pruner.policies.base import Policy

LONGEST_SIDE = 4096
"""Pixels of an image's side."""
LONGEST_STATE = 1024
"""Numbers of proprioception."""
LONGEST_PROMPT = 2000
"""Characters."""

BY_CAMERA = "cameras"


@dataclass(frozen=True)
class ObservationLayout:
    """The keys of observations. "a/b" is a key of that name, or the key "b" in a map under "a".

    Attributes:
        images: the key of an image by the policy's name of that camera. Several names of one camera may stand for the
            same key.
        state: keys of the robot's state, joined in this order.
        channels_first: whether images are (3, H, W) instead of (H, W, 3).
        optional: keys of images that observations may lack, if the policy accepts absent cameras.
        absent: the policy's names of cameras that this robot does not have.
        action_dim: numbers of an action that the robot takes; None: all numbers of the policy's actions.
    """

    images: Mapping[str, str]
    state: tuple[str, ...]
    channels_first: bool = False
    optional: frozenset[str] = frozenset()
    absent: frozenset[str] = frozenset()
    action_dim: int | None = None


_LIBERO = ("observation/image", "observation/wrist_image")
_DROID = ("observation/exterior_image_1_left", "observation/wrist_image_left")
_ALOHA = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")

LAYOUTS: dict[str, ObservationLayout] = {
    BY_CAMERA: ObservationLayout({}, ("observation/state",)),
    "libero": ObservationLayout(
        {
            **dict.fromkeys(("image", "agentview", "base_0_rgb"), _LIBERO[0]),
            **dict.fromkeys(("image2", "wrist_image", "left_wrist_0_rgb"), _LIBERO[1]),
        },
        ("observation/state",),
        absent=frozenset({"right_wrist_0_rgb"}),
        action_dim=7,
    ),
    "droid": ObservationLayout(
        {
            **dict.fromkeys(("exterior_image_1_left", "image", "base_0_rgb"), _DROID[0]),
            **dict.fromkeys(("wrist_image_left", "wrist_image", "left_wrist_0_rgb"), _DROID[1]),
        },
        ("observation/joint_position", "observation/gripper_position"),
        absent=frozenset({"right_wrist_0_rgb"}),
        action_dim=8,
    ),
    "aloha": ObservationLayout(
        {
            **{name: f"images/{name}" for name in _ALOHA},
            "base_0_rgb": "images/cam_high",
            "left_wrist_0_rgb": "images/cam_left_wrist",
            "right_wrist_0_rgb": "images/cam_right_wrist",
        },
        ("state",),
        channels_first=True,
        optional=frozenset(f"images/{name}" for name in _ALOHA[1:]),
        action_dim=14,
    ),
}
"""The keys of openpi's clients, and "cameras": observation/<the policy's own name> for each image. Absent cameras and
the width of actions are as in openpi's own transforms for these robots.
"""


@dataclass(frozen=True)
class Seen(Observation):
    """An observation that a client sent, checked.

    Attributes:
        reset: whether the client says that an episode begins.
    """

    reset: bool = False


def _as_it_is(array: np.ndarray) -> np.ndarray:
    return array


@dataclass(frozen=True)
class ObservationReader:
    """Reads a layout for one policy.

    Attributes:
        keys: the key of each of the policy's cameras that the robot may have, in the policy's order.
        state: keys of the state; empty if the policy takes none.
        channels_first: as of the layout.
        optional: keys of images that an observation may lack: the policy then treats these cameras as absent.
        known: keys of all images of the layout, including those that the policy does not read.
        image: prepares an image, (H, W, 3) uint8 -> the same; called in the model's thread.
        actions: converts a chunk, (chunk, dim) -> (chunk, dim); may leave out its last actions and numbers.
        default_prompt: the instruction of observations that have none; None: they are refused.
    """

    keys: Mapping[str, str]
    state: tuple[str, ...]
    channels_first: bool = False
    optional: frozenset[str] = frozenset()
    known: frozenset[str] = frozenset()
    image: Callable[[np.ndarray], np.ndarray] = field(default=_as_it_is)
    actions: Callable[[np.ndarray], np.ndarray] = field(default=_as_it_is)
    default_prompt: str | None = None

    def read(self, observation: Any) -> Seen:
        """Return a message's observation.

        Raises:
            ObservationError: a part is missing or invalid; the message names it and the valid form.
        """
        if not isinstance(observation, dict):
            raise ObservationError(f"An observation is a map of keys to values; found {_what(observation)}.")
        default = self.default_prompt
        prompt = default if default is not None and "prompt" not in observation else self._find(observation, "prompt")
        if not isinstance(prompt, str) or len(prompt) > LONGEST_PROMPT:
            found = f"{len(prompt)} characters" if isinstance(prompt, str) else _what(prompt)
            raise ObservationError(f"'prompt' is text of up to {LONGEST_PROMPT} characters; found {found}.")
        absent = [key for key in self.optional if not self._has(observation, key)]
        if absent:
            self._check_names(observation, min(absent))
        return Seen(
            images={c: self._image(observation, key) for c, key in self.keys.items() if key not in absent},
            instruction=prompt,
            proprio=self._state(observation) if self.state else None,
            reset=_flag(observation.get("reset", False)),
        )

    def _image(self, observation: dict[str, Any], key: str) -> np.ndarray:
        image = self._find(observation, key)
        shape = "(3, height, width)" if self.channels_first else "(height, width, 3)"
        if not isinstance(image, np.ndarray) or image.ndim != 3 or not (image.dtype == np.uint8 or _is_float(image)):
            raise ObservationError(
                f"{key!r} is an image of shape {shape}, of uint8 or of floats from 0 to 1; found {_what(image)}."
            )
        # Like openpi, tell the order from the place of the three colours.
        first = self.channels_first or (image.shape[0] == 3 and image.shape[2] != 3)
        upright = image.transpose(1, 2, 0) if first else image
        height, width, channels = upright.shape
        if channels != 3 or not 1 <= min(height, width) <= max(height, width) <= LONGEST_SIDE:
            raise ObservationError(
                f"{key!r} is an image of shape {shape} with sides of 1 to {LONGEST_SIDE}; found {_what(image)}."
            )
        if image.dtype == np.uint8:
            return np.array(upright, order="C")  # messages are read-only, and torch needs writable memory
        if not ((upright >= 0) & (upright <= 1)).all():
            raise ObservationError(
                f"{key!r} is an image of floats, which are colours from 0 to 1; found others, or NaN. Send uint8, or "
                "divide by 255."
            )
        return np.ascontiguousarray((255 * upright).astype(np.uint8))  # truncated and not rounded, as in openpi

    def _has(self, observation: dict[str, Any], key: str) -> bool:
        if key in observation:
            return True
        value: Any = observation
        for part in key.split("/"):
            if not isinstance(value, dict) or part not in value:
                return False
            value = value[part]
        return True

    def _check_names(self, observation: dict[str, Any], absent: str) -> None:
        """Raise ObservationError if a camera is missing while the observation has an image that the layout does not
        know: the name may be misspelled.
        """
        folder = f"{absent.rpartition('/')[0]}/"
        strange = [
            name
            for name, value in _arrays(observation)
            if name not in self.known
            and (name.startswith(folder) or (isinstance(value, np.ndarray) and value.ndim == 3))
        ]
        if strange:
            raise ObservationError(
                f"The observation has no {absent!r}, and {shown(strange[0])} is none of the layout's images "
                f"({', '.join(sorted(self.known))}); send it by its name, or not at all where there is no such camera."
            )

    def _state(self, observation: dict[str, Any]) -> np.ndarray:
        parts = []
        for key in self.state:
            value = self._find(observation, key)
            if not _is_state(value):
                raise ObservationError(f"{key!r} is a list of up to {LONGEST_STATE} numbers; found {_what(value)}.")
            part = np.atleast_1d(np.asarray(value))
            with np.errstate(over="ignore"):  # numbers out of range become infinite, and are refused below
                parts.append(part.astype(np.float32))
        state = np.concatenate(parts)
        if not np.isfinite(state).all():
            raise ObservationError(
                f"{' and '.join(map(repr, self.state))} must be finite as float32, but hold NaN or infinity; send "
                "finite numbers."
            )
        return state

    def _find(self, observation: dict[str, Any], key: str) -> Any:
        value: Any = observation
        if key in observation:
            return observation[key]
        for part in key.split("/"):
            if not isinstance(value, dict) or part not in value:
                wanted = ", ".join(map(repr, (*self.keys.values(), *self.state, "prompt")))
                found = ", ".join(shown(name) for name in list(observation)[:20])
                raise ObservationError(
                    f"The observation has no {key!r}; this server reads {wanted}. Found {found or 'no key'}."
                )
            value = value[part]
        return value


def reader_of(
    policy: Policy,
    layout: str = BY_CAMERA,
    camera_keys: Mapping[str, str] | None = None,
    default_prompt: str | None = None,
    action_dim: int | None = None,
    center_crop: bool = True,
    action_horizon: int | None = None,
) -> ObservationReader:
    """Return the reader of `layout` for `policy`.

    LIBERO's images and actions are converted as in the evaluation of the policy's family there (OpenVLA: its image
    chain, and the gripper's sign). Actions are cut to the numbers that the layout's robot takes.

    Args:
        policy: the one whose cameras and state are read.
        layout: a name of `LAYOUTS`.
        camera_keys: keys of single cameras, in place of the layout's.
        default_prompt, action_dim, center_crop, action_horizon: as of `ServerSettings`.

    Raises:
        ServingError: there is no such layout, it has no key for one of the policy's cameras, or the policy's actions
            have fewer numbers than `action_dim`.
        SuiteError: the policy's family has no convention for LIBERO.
    """
    if layout not in LAYOUTS:
        raise ServingError(f"--observations is {layout!r}; it is one of {', '.join(LAYOUTS)}.")
    declared, given = LAYOUTS[layout], dict(camera_keys or {})
    strange = [camera for camera in given if camera not in policy.cameras]
    if strange:
        raise ServingError(
            f"--camera-key names the camera {strange[0]!r}; the policy's cameras are "
            f"{', '.join(map(repr, policy.cameras))}."
        )
    known = {camera: f"observation/{camera}" for camera in policy.cameras} if layout == BY_CAMERA else declared.images
    may_lack = bool(getattr(policy, "takes_absent_cameras", False))
    keys = {}
    for camera in policy.cameras:
        if may_lack and camera in declared.absent and camera not in given:
            continue
        key = given.get(camera, known.get(camera))
        if key is None:
            keys_of_layout = ", ".join(dict.fromkeys(declared.images.values()))
            raise ServingError(
                f"The {layout} layout does not say which image the policy's camera {camera!r} is; say it yourself "
                f"(--camera-key {camera}=KEY). The layout's keys are {keys_of_layout}."
            )
        keys[camera] = key
    state = declared.state if policy.proprio_size is not None else ()
    image = actions = _as_it_is
    if layout == "libero":
        from vla_pruner.simulators.libero_conventions import libero_convention

        convention = libero_convention(policy, center_crop)
        image, actions = convention.image, convention.actions
    return ObservationReader(
        keys,
        state,
        declared.channels_first,
        declared.optional & set(keys.values()) if may_lack else frozenset(),
        frozenset(declared.images.values()) | set(keys.values()),
        image,
        _first_of(policy, declared.action_dim, action_dim, action_horizon, actions),
        default_prompt,
    )


def _first_of(
    policy: Policy,
    of_layout: int | None,
    action_dim: int | None,
    action_horizon: int | None,
    actions: Callable[[np.ndarray], np.ndarray],
) -> Callable[[np.ndarray], np.ndarray]:
    """Return `actions`, cut to the first `action_horizon` of a chunk, and each action to its first `action_dim` numbers
    or, if that is None, to those that the layout's robot takes.
    """
    size = getattr(policy, "action_size", None)
    if action_dim is not None and size is not None and action_dim > size:
        raise ServingError(f"--action-dim is {action_dim}, and the policy's actions have {size} numbers.")
    width = of_layout if action_dim is None else action_dim
    return actions if width is action_horizon is None else lambda chunk: actions(chunk)[:action_horizon, :width]


def _arrays(observation: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of a message's entries, and of those of the maps in it."""
    for name, value in observation.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", part) for inner, part in value.items())
        else:
            yield str(name), value


def _flag(value: Any) -> bool:
    if isinstance(value, (bool, np.bool_, int, float, np.integer, np.floating)) and value in (0, 1):
        return bool(value)
    raise ObservationError(f"'reset' is true or false; found {_what(value)}.")


def _is_state(value: Any) -> bool:
    """Return True if numpy makes up to `LONGEST_STATE` real numbers of it. A list is searched first: from texts, numpy
    would make an array in which each is as long as the longest.
    """
    if isinstance(value, list):
        return len(value) <= LONGEST_STATE and all(map(_is_number, value))
    if isinstance(value, np.ndarray):
        return value.ndim <= 1 and value.dtype.kind in "iuf" and value.size <= LONGEST_STATE
    return _is_number(value)


def _is_float(image: np.ndarray) -> bool:
    return image.dtype.kind == "f"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _what(value: Any) -> str:
    """Return a description of an invalid value, in few words whatever its size."""
    if isinstance(value, np.ndarray):
        return f"shape {value.shape} of {value.dtype}"
    if isinstance(value, Unread):
        return value.what
    return f"{type(value).__name__} {shown(value)}"
