"""Stand-ins for the modules of the official repositories that their LIBERO scripts import, with the names that the
scripts use.

They are written from the behaviour of the official functions; images go through `preprocessing.libero`, so TensorFlow
is not needed.
"""

from __future__ import annotations

import functools
import importlib
import os
import random
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from vla_pruner.errors import ObservationError, VLAPrunerError
from vla_pruner.models.openvla.robots import PLATFORMS
from vla_pruner.official.evaluation import HEADS, IMAGE_SIZE, Evaluation, check_family
from vla_pruner.preprocessing.libero import jpeg_round_trip, lanczos3_resize, rotate_180
from vla_pruner.simulators.libero_environment import DUMMY_ACTION, axis_angle
from vla_pruner.wording import said_by

OPENVLA_UTILS = "experiments.robot.openvla_utils"
ROBOT_UTILS = "experiments.robot.robot_utils"
LIBERO_UTILS = "experiments.robot.libero.libero_utils"
CONSTANTS = "prismatic.vla.constants"
FRAMES_PER_SECOND = 30
LIBERO = PLATFORMS[0]


class MissingName(VLAPrunerError, ImportError):
    """A script imports a name from an official module that the module's stand-in does not have."""


class StandIn(ModuleType):
    """A module that stands in for an official one.

    Args:
        name: name of the official module.
        names: the names that can be imported from it, with their values.
    """

    def __init__(self, name: str, names: Mapping[str, Any]) -> None:
        super().__init__(name, f"Stands in for the official {name}.")
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = ", ".join(sorted(known for known in vars(self) if not known.startswith("__")))
        raise MissingName(
            f"vla_pruner.official stands in for {self.__name__} and has no {name}; it has {known}. Take {name} into "
            "the script itself."
        )


def stopping(evaluation: Evaluation, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` so that an error ends the run: the official scripts catch every Exception and count the episode
    as failed.

    Args:
        evaluation: the evaluation of the run.
        function: the function that the script calls.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not isinstance(error, VLAPrunerError):
                traceback.print_exc()
            raise SystemExit(
                f"vla_pruner.official: the run stops after {evaluation.summary()}, since an error is no failed "
                f"episode. {type(error).__name__} in {function.__name__}: {said_by(error)}"
            ) from error

    return call


def stand_ins(evaluation: Evaluation) -> dict[str, StandIn]:
    """Return the stand-ins of one run by the names of their modules."""
    everywhere = {
        "ACTION_DIM": LIBERO.action_dim,
        "DATE": time.strftime("%Y_%m_%d"),
        "DATE_TIME": time.strftime("%Y_%m_%d-%H_%M_%S"),
        "DEVICE": torch.device("cuda:0" if torch.cuda.is_available() else "cpu"),
    }
    modules: dict[str, dict[str, Any]] = {
        OPENVLA_UTILS: {**everywhere, **_openvla_utils(evaluation)},
        ROBOT_UTILS: {**everywhere, **_robot_utils(evaluation)},
        LIBERO_UTILS: {**everywhere, **_libero_utils()},
        CONSTANTS: _constants(),
    }
    made = {}
    for module, names in modules.items():
        for name, value in names.items():
            if callable(value) and not isinstance(value, type):
                names[name] = stopping(evaluation, value)
        made[module] = StandIn(module, names)
    return made


def _constants() -> dict[str, Any]:
    class NormalizationType(StrEnum):
        """The official code's names for the values that -1 and 1 stand for."""

        NORMAL = "normal"
        BOUNDS = "bounds"
        BOUNDS_Q99 = "bounds_q99"

    return {
        "ACTION_DIM": LIBERO.action_dim,
        "ACTION_PROPRIO_NORMALIZATION_TYPE": NormalizationType.BOUNDS_Q99,
        "NUM_ACTIONS_CHUNK": LIBERO.chunk,
        "NormalizationType": NormalizationType,
        "PROPRIO_DIM": LIBERO.proprio_dim,
    }


def _openvla_utils(evaluation: Evaluation) -> dict[str, Any]:
    def get_vla(cfg: Any) -> Any:
        return evaluation.load(cfg)

    def get_processor(cfg: Any) -> Any:
        return evaluation.policy.processor

    def head(name: str) -> Callable[..., Any]:
        def get_head(cfg: Any, llm_dim: int, proprio_dim: int | None = None) -> Any:
            return getattr(evaluation.policy, name, None)

        get_head.__name__ = f"get_{name}"
        return get_head

    def resize_image_for_policy(img: np.ndarray, resize_size: int | Sequence[int]) -> np.ndarray:
        return _resized(img, resize_size)

    return {
        "OPENVLA_IMAGE_SIZE": IMAGE_SIZE,
        "get_processor": get_processor,
        "get_vla": get_vla,
        "resize_image_for_policy": resize_image_for_policy,
        **{f"get_{name}": head(name) for name in HEADS},
    }


def _robot_utils(evaluation: Evaluation) -> dict[str, Any]:
    def get_model(cfg: Any, wrap_diffusion_policy_for_droid: bool = False) -> Any:
        return evaluation.load(cfg)

    def get_action(
        cfg: Any,
        model: Any,
        obs: Mapping[str, Any],
        task_label: str,
        processor: Any = None,
        action_head: Any = None,
        proprio_projector: Any = None,
        noisy_action_projector: Any = None,
        use_film: bool = False,
    ) -> Any:
        heads = (action_head, proprio_projector, noisy_action_projector)
        return evaluation.act(cfg, model, obs, task_label, dict(zip(HEADS, heads, strict=True)))

    def get_image_resize_size(cfg: Any) -> int:
        check_family(cfg)
        return IMAGE_SIZE

    def set_seed_everywhere(seed: int) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 what LIBERO draws from
        random.seed(seed)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False

    def normalize_gripper_action(action: np.ndarray, binarize: bool = True) -> np.ndarray:
        found = np.array(action)
        found[..., -1] = 2.0 * found[..., -1] - 1.0
        if binarize:
            found[..., -1] = np.sign(found[..., -1])
        return found

    def invert_gripper_action(action: np.ndarray) -> np.ndarray:
        found = np.array(action)
        found[..., -1] = -found[..., -1]
        return found

    return {
        "get_action": get_action,
        "get_image_resize_size": get_image_resize_size,
        "get_model": get_model,
        "invert_gripper_action": invert_gripper_action,
        "normalize_gripper_action": normalize_gripper_action,
        "set_seed_everywhere": set_seed_everywhere,
    }


def _libero_utils() -> dict[str, Any]:
    def get_libero_env(task: Any, model_family: str, resolution: int = 256) -> tuple[Any, str]:
        folder = importlib.import_module("libero.libero").get_libero_path("bddl_files")
        environment = importlib.import_module("libero.libero.envs").OffScreenRenderEnv(
            bddl_file_name=os.path.join(folder, task.problem_folder, task.bddl_file),
            camera_heights=resolution,
            camera_widths=resolution,
        )
        environment.seed(0)  # as the official script has it: it moves objects, also in a stored initial state
        return environment, task.language

    def get_libero_dummy_action(model_family: str) -> list[float]:
        return list(DUMMY_ACTION)

    def get_libero_image(obs: Mapping[str, np.ndarray], resize_size: int | Sequence[int] | None = None) -> np.ndarray:
        image = rotate_180(obs["agentview_image"])
        return image if resize_size is None else _resized(image, resize_size)

    def get_libero_wrist_image(obs: Mapping[str, np.ndarray]) -> np.ndarray:
        return rotate_180(obs["robot0_eye_in_hand_image"])

    def quat2axisangle(quat: np.ndarray) -> np.ndarray:
        return axis_angle(quat)

    def save_rollout_video(
        rollout_images: Sequence[np.ndarray], idx: int, success: bool, task_description: str, log_file: Any = None
    ) -> str | None:
        return _save_video(rollout_images, idx, success, task_description, log_file)

    return {
        "get_libero_dummy_action": get_libero_dummy_action,
        "get_libero_env": get_libero_env,
        "get_libero_image": get_libero_image,
        "get_libero_wrist_image": get_libero_wrist_image,
        "quat2axisangle": quat2axisangle,
        "save_rollout_video": save_rollout_video,
    }


def _resized(image: np.ndarray, size: int | Sequence[int]) -> np.ndarray:
    """Resize an image to (224, 224, 3) uint8 as the training data was stored and read."""
    if (tuple(size) if isinstance(size, Sequence) else (size, size)) != (IMAGE_SIZE, IMAGE_SIZE):
        raise ObservationError(f"resize_size={size!r} was given; the policy sees {IMAGE_SIZE} x {IMAGE_SIZE} pixels.")
    return lanczos3_resize(jpeg_round_trip(np.ascontiguousarray(image)))


def _save_video(
    images: Sequence[np.ndarray], number: int, success: bool, task_description: str, log_file: Any
) -> str | None:
    """Save the video of an episode under ./rollouts, like the official scripts, and return its path; None if it cannot
    be encoded.
    """
    day, now = time.strftime("%Y_%m_%d"), time.strftime("%Y_%m_%d-%H_%M_%S")
    task = "".join(letter if letter.isalnum() else "_" for letter in task_description.lower())[:50]
    path = Path("rollouts") / day / f"{now}--episode={number}--success={success}--task={task}.mp4"
    try:
        imageio = importlib.import_module("imageio")
        path.parent.mkdir(parents=True, exist_ok=True)
        with imageio.get_writer(str(path), fps=FRAMES_PER_SECOND, codec="libx264") as writer:
            for image in images:
                writer.append_data(image)
    except Exception as error:  # encoders fail in many ways, and no episode may be lost for its video
        told, saved = f"No video was saved ({said_by(error)}); it takes: pip install 'imageio[ffmpeg]'", None
    else:
        told, saved = f"Saved the video {path}", str(path)
    print(told)
    if log_file is not None:
        log_file.write(f"{told}\n")
    return saved
