"""LeRobot's policies: loaded with every weight accounted for, and called with images and a sentence."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy, layers_of, projection_of
from vla_pruner.checkpoints.files import checkpoint_folder, described_by, listed, read_json, reason, shown
from vla_pruner.checkpoints.numbers import check_counts, finite_action
from vla_pruner.checkpoints.weights import Stored, check_finite, check_fit, misfit, read_headers
from vla_pruner.errors import (
    CheckpointError,
    ObservationError,
    OptionError,
    UnsupportedModelError,
    VLAPrunerError,
)
from vla_pruner.families.lerobot_common import IMAGES, camera_names, check_version
from vla_pruner.families.refused import NOT_LOADED
from vla_pruner.observations import HOLDS_IMAGE, check_images, check_instruction, state_of
from vla_pruner.plugins import class_at
from vla_pruner.policies import lerobot_backbones as backbones
from vla_pruner.policies.lerobot_processors import check_steps, no_remote_code, read_processors, state_size
from vla_pruner.policies.lerobot_random import random_lerobot
from vla_pruner.registry import row_of

__all__ = ["KINDS", "LeRobotPolicy", "load_lerobot", "random_lerobot"]

_DTYPE_FIELDS = {"molmoact2": "model_dtype", "vla_jepa": "torch_dtype"}
"""The field of the config that has the dtype, by kind, where it is not "dtype"."""

_MOST = 10_000
"""The largest accepted chunk, number of denoising steps and text; those of published policies are smaller."""

KINDS = {
    "pi0": "PI0",
    "pi05": "PI05",
    "pi0_fast": "PI0Fast",
    "smolvla": "SmolVLA",
    "molmoact2": "MolmoAct2",
    "eo1": "EO1",
    "vla_jepa": "VLAJEPA",
}
"""LeRobot's names of the policies that can be loaded, and the beginnings of their classes' names."""


NEED_ALL_CAMERAS = ("eo1", "vla_jepa")
"""LeRobot's names of the policies that have no place for an absent camera."""


class LeRobotPolicy:
    """A LeRobot policy with the processors around it.

    Attributes:
        module: the policy as LeRobot's users hold it; a method attaches to this.
        preprocessor, postprocessor: LeRobot's pipelines; None if the checkpoint has none.
    """

    def __init__(self, module: nn.Module, preprocessor: Any = None, postprocessor: Any = None) -> None:
        self.module: Any = module
        self.preprocessor = preprocessor
        self.postprocessor = postprocessor

    @property
    def cameras(self) -> tuple[str, ...]:
        """The policy's cameras, without LeRobot's "observation.images." and its empty cameras."""
        names = camera_names(self.module.config)
        return tuple(name for name in names if not name.startswith("empty_camera_"))

    @property
    def takes_absent_cameras(self) -> bool:
        """True if `act` accepts fewer images than there are cameras."""
        return getattr(self.module.config, "type", None) not in NEED_ALL_CAMERAS

    @property
    def vision_towers(self) -> tuple[nn.Module, ...]:
        """The modules that turn an image into patch features."""
        return self._anatomy.towers

    @property
    def device(self) -> torch.device:
        """The policy's device."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which its decoder computes."""
        return projection_of(layers_of(self._anatomy.decoder)[0]).weight.dtype

    @property
    def _anatomy(self) -> Anatomy:
        row = row_of(self)
        assert row is not None
        return class_at(row.family).anatomy_of(self.module)

    @property
    def proprio_size(self) -> int | None:
        """The number of values that `act` takes as proprio; None if the policy takes none."""
        feature = self.module.config.robot_state_feature
        return None if feature is None else state_size(self.preprocessor) or feature.shape[0]

    @property
    def action_size(self) -> int | None:
        """The number of values in an action; None if the checkpoint does not say."""
        feature = self.module.config.action_feature
        return None if feature is None else feature.shape[0]

    def reset(self) -> None:
        """Begin a new episode, for the policy and for a method that is attached to it."""
        self.module.reset()

    def act(self, images: Mapping[str, np.ndarray], instruction: str, proprio: np.ndarray | None = None) -> np.ndarray:
        """Run one control step: return the whole action chunk (chunk, dim), un-normalised, through LeRobot's own
        processors.

        The noise that the flow starts from is drawn from torch's global generator; seed it for repeatable actions.

        Args:
            images: (H, W, 3) uint8 by camera; cameras may be left out where LeRobot allows it
                (`takes_absent_cameras`), but not all of them.
            instruction: the task in words.
            proprio: (d,) the robot's state, in the checkpoint's own units.

        Raises:
            CheckpointError: the checkpoint has no processors, they fail, or its network gives numbers that are not
                finite.
            ObservationError: an image, a camera or the state is not as the policy expects it.
        """
        if self.preprocessor is None or self.postprocessor is None:
            raise CheckpointError(
                "This checkpoint has no policy_preprocessor.json and policy_postprocessor.json, so act() cannot know "
                "its tokenizer and its statistics; save them into its folder, or call .module with a batch of yours."
            )
        check_instruction(instruction)
        for word in backbones.placeholders(self.module, self.preprocessor):
            if word in instruction:
                raise ObservationError(HOLDS_IMAGE.format(what=repr(word)))
        given = {**self._observation(images, proprio), "task": instruction}
        try:
            batch = self.preprocessor(given)
        except VLAPrunerError:
            raise
        except Exception as error:  # its steps, and the tokenizer that it names, are the checkpoint's
            raise CheckpointError(
                f"The checkpoint's own preprocessor failed on this observation ({type(error).__name__}: "
                f"{reason(error)}). Look at policy_preprocessor.json and the tokenizer that it names."
            ) from error
        with torch.no_grad():
            chunk: Tensor = self.module.predict_action_chunk(batch)
        # LeRobot's postprocessors take one action at a time.
        actions = [self.postprocessor(chunk[:, step]) for step in range(chunk.shape[1])]
        return finite_action(torch.cat(actions).float().cpu().numpy(), self.module)

    def _observation(self, images: Mapping[str, np.ndarray], proprio: np.ndarray | None) -> dict[str, Tensor]:
        keys = dict(zip(camera_names(self.module.config), self.module.config.image_features, strict=True))
        check_images(images, self.cameras)
        unknown = [name for name in images if name not in keys]
        if unknown or not images:
            raise ObservationError(
                f"Images of {', '.join(map(repr, images)) or 'no camera'} were given; the policy's cameras are "
                f"{', '.join(map(repr, self.cameras))}."
            )
        missing = [name for name in self.cameras if name not in images]
        if missing and not self.takes_absent_cameras:
            raise ObservationError(
                f"No image of {', '.join(map(repr, missing))} was given; LeRobot's {type(self.module).__name__} takes "
                "images of all of its cameras."
            )
        observation = {}
        for name, image in images.items():
            pixels = np.asarray(image)
            if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
                raise ObservationError(
                    f"The image of {name!r} has shape {pixels.shape} and type {pixels.dtype}; give (H, W, 3) uint8, or "
                    "leave the camera out where it has no frame."
                )
            tensor = torch.from_numpy(np.ascontiguousarray(pixels))
            observation[keys[name]] = tensor.permute(2, 0, 1).float() / 255
        size = self.proprio_size
        shape = None if proprio is None else np.shape(proprio)
        if shape != (None if size is None else (size,)):
            raise ObservationError(
                f"proprio of shape {shape} was given; this policy's observation.state has shape "
                f"{None if size is None else (size,)}."
            )
        if proprio is not None:
            observation["observation.state"] = torch.from_numpy(state_of(proprio))
        return observation


def load_lerobot(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    unnorm_key: str | None = None,
    trust_processors: bool = False,
) -> LeRobotPolicy:
    """Load a published or saved LeRobot policy, by LeRobot's own `from_pretrained`, with every weight accounted for.

    LeRobot prints and goes on with random weights if pi0's and pi0.5's cannot be read or do not fit. If the processors
    hold no statistics at all, nothing is scaled: `act` then gives normalised actions, as LeRobot does.

    Args:
        path: a folder with config.json and model.safetensors, or an id on the hub.
        device: of the policy.
        dtype: of the decoder; None: as the config and LeRobot have it.
        unnorm_key: the dataset whose statistics are used, if the processors hold them by dataset.
        trust_processors: let the processors' files name steps that are not LeRobot's own, which runs their code.

    Raises:
        UnsupportedModelError: lerobot is missing, of an untested version, or the policy is of another type.
        CheckpointError: weights are missing, unexpected, unreadable or not finite; it lists them. The processors name a
            step that is not LeRobot's, or have no statistics for the policy's inputs or outputs; it names both.
        OptionError: there is no dataset `unnorm_key`, or `trust_processors` is not True or False.
    """
    if trust_processors not in (True, False):
        raise OptionError(
            f"trust_processors={trust_processors!r} was given; it is True or False (on the command line 1 or 0)."
        )
    folder = checkpoint_folder(path)
    check_kind(folder)
    check_steps(folder, trust_processors)
    config = read_config(folder)
    policy = load_module(folder, config, device, dtype, trust_processors)
    return LeRobotPolicy(policy, *read_processors(folder, config, device, unnorm_key, trust_processors))


def check_kind(folder: Path) -> None:
    """Refuse the folder of a policy that is not loaded, with its own reason, before anything else of it is read.

    Raises:
        UnsupportedModelError: it is one of those.
        CheckpointError: config.json is missing or damaged.
    """
    kind = read_json(folder / "config.json").get("type")
    if isinstance(kind, str) and kind in NOT_LOADED:
        raise UnsupportedModelError(f"{folder}: {NOT_LOADED[kind]}")


def read_config(path: str | Path, flags: list[str] | None = None) -> Any:
    """Read a checkpoint's config, with `flags` ("--n_action_steps=5") in place of its own values.

    Raises:
        CheckpointError: there is none, or LeRobot cannot read it.
    """
    check_version()
    _lerobot("policies")  # It fills the registry of configs.
    file = Path(path) / "config.json"
    settings = read_json(file)
    check_counts(file, settings, "chunk_size", "n_action_steps", "n_obs_steps", most=_MOST)
    check_counts(file, settings, "num_inference_steps", "num_steps", "tokenizer_max_length", most=_MOST)
    check_counts(file, settings, "max_state_dim", "max_action_dim", most=_MOST)
    check_counts(file, settings, "empty_cameras", least=0, most=100)
    try:
        return _lerobot("configs.policies").PreTrainedConfig.from_pretrained(str(path), cli_overrides=flags or [])
    except Exception as error:  # the errors of LeRobot and its parser are of every kind
        raise CheckpointError(
            f"{file} holds no LeRobot policy that this version reads: {shown(' '.join(str(error).split()), 500)}"
        ) from error


def load_module(
    path: str | Path,
    config: Any,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust: bool = False,
    flag: str = "load_policy(..., trust_processors=True)",
) -> nn.Module:
    """Load the policy alone, for a config that was read already; see `load_lerobot`, and `check_steps` for `trust` and
    `flag`.
    """
    kind = config.type
    if kind in NOT_LOADED:
        raise UnsupportedModelError(f"{path}: {NOT_LOADED[kind]}")
    if kind not in KINDS:
        raise UnsupportedModelError(f"{path} is a policy of type {kind!r}; supported are {', '.join(KINDS)}.")
    if kind == "pi0_fast" and not trust:
        names = {shown(repr(name)) for name in (config.action_tokenizer_name, config.text_tokenizer_name)}
        raise CheckpointError(
            f"{path} is a pi0-FAST, for which LeRobot loads the tokenizers {' and '.join(sorted(names))} and runs the "
            f"code that comes with them, so it is refused. If you trust where these come from, give {flag}."
        )
    config.device = str(device)
    if dtype is not None and kind != "smolvla":
        if dtype not in (torch.float32, torch.bfloat16):
            raise UnsupportedModelError(f"dtype={dtype} was given; LeRobot has {kind} in float32 and bfloat16.")
        setattr(config, _DTYPE_FIELDS.get(kind, "dtype"), str(dtype).removeprefix("torch."))
    folder = checkpoint_folder(path)
    backbones.prepare(folder, config)
    headers = read_headers(folder)
    if kind == "molmoact2":
        _check_molmoact2(folder, config)
    else:
        _check_headers(policy_class(kind), folder, config, headers)
    policy = _checked(policy_class(kind), folder, config)
    if dtype is not None and kind == "smolvla":
        policy.model.vlm_with_expert.to(dtype)
    policy = policy.to(device).eval()
    check_finite(policy, folder, headers)
    if kind == "vla_jepa":
        backbones.check_processor(folder, policy.model.qwen.processor)
    return policy


def _check_headers(policy_type: Any, folder: Path, config: Any, headers: Mapping[str, Stored]) -> None:
    """Compare the config's description with the files' headers, before gigabytes are built."""
    if {stored.file.name for stored in headers.values()} != {"model.safetensors"}:
        raise CheckpointError(f"{folder} has its weights in several files; LeRobot reads model.safetensors alone.")
    policy = _described(policy_type, folder, config)
    own = policy.state_dict(keep_vars=True)
    found = _named_as(policy, headers, config)
    # A weight that is another one that is there is not missing, and no action comes of a language head.
    loaded = {id(own[name]) for name in found if name in own}
    optional = [name for name in own if id(own[name]) in loaded or name.endswith("lm_head.weight")]
    differences = misfit(own, found, optional)
    try:
        check_fit(folder, differences)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (They were compared with {policy_type.__name__}.)") from None


def _check_molmoact2(folder: Path, config: Any) -> None:
    """Check the checkpoint of transformers that LeRobot builds a MolmoAct2 from. If the config leaves the kind of
    actions open, set it to continuous, the only kind that a session supports.
    """
    if config.inference_action_mode is None and config.action_mode != "discrete":
        config.inference_action_mode = "continuous"
    resolve = _lerobot("policies.molmoact2.modeling_molmoact2")._resolve_checkpoint_location
    try:
        base = Path(resolve(config.checkpoint_path, revision=config.checkpoint_revision))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} needs files that are not in it: LeRobot builds the policy from those of "
            f"{shown(repr(config.checkpoint_path))}, and they could not be fetched ({reason(error)}). Run once with a "
            "connection, or name a folder of them as checkpoint_path in config.json."
        ) from error
    read_headers(base)


def _described(policy_type: Any, folder: Path, config: Any) -> Any:
    """Build the policy that the config describes, without memory for its weights."""
    there = copy.copy(config)
    there.device = "meta"
    if hasattr(there, "load_vlm_weights"):
        there.load_vlm_weights = False  # the checkpoint's own weights take their place; only shapes are wanted here
    try:
        with (
            torch.device("meta"),
            no_remote_code(),
            contextlib.redirect_stdout(io.StringIO()),
            backbones.without_weights(config.type),
            backbones.distributions_unchecked(),
        ):
            return policy_type(there)
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and not isinstance(error.__cause__, OSError):
            with described_by(folder / "config.json"):
                raise
        if hasattr(config, "action_tokenizer_name"):
            raise CheckpointError(
                f"{folder} needs tokenizers that are not in it, {shown(repr(config.action_tokenizer_name))} and "
                f"{shown(repr(config.text_tokenizer_name))}, and they could not be fetched "
                f"({reason(error.__cause__ or error)}). Run once with a connection, or name their folders in "
                "config.json (action_tokenizer_name, text_tokenizer_name)."
            ) from error
        if config.type == "vla_jepa":
            raise backbones.refusal(folder, config.qwen_model_name, error) from error
        backbone = getattr(config, "vlm_model_name", None)
        raise CheckpointError(
            f"{folder} needs files that are not in it: LeRobot builds the policy from those of {shown(backbone)}, and "
            f"they could not be fetched ({reason(error)}). Run once with a connection, or fetch them elsewhere (`hf "
            f"download {shown(backbone)} --local-dir FOLDER`) and name that folder as vlm_model_name in config.json."
        ) from error
    except Exception as error:
        with described_by(folder / "config.json"):
            raise error


def _named_as(policy: Any, headers: Mapping[str, Stored], config: Any) -> dict[str, Stored]:
    """Return the headers by the names that LeRobot's `from_pretrained` gives the weights."""
    if not hasattr(policy, "_fix_pytorch_state_dict_keys"):
        unread = backbones.TRAINING_ONLY.get(config.type, ())
        return {name: stored for name, stored in headers.items() if not name.startswith(unread)}
    state = {
        name: torch.empty(stored.shape, dtype=stored.dtype or torch.uint8, device="meta")
        for name, stored in headers.items()
    }
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it repeats the warnings of the weights' loading
    try:
        renamed: dict[str, Tensor] = policy._fix_pytorch_state_dict_keys(state, config)
    finally:
        logger.setLevel(level)
    file = next(iter(headers.values())).file
    return {
        name if name.startswith("model.") else f"model.{name}": Stored(
            file, tuple(tensor.shape), tensor.dtype if tensor.is_floating_point() else None
        )
        for name, tensor in renamed.items()
    }


def policy_class(kind: str) -> Any:
    """LeRobot's class of this kind."""
    check_version(kind)
    return getattr(_lerobot(f"policies.{kind}.modeling_{kind}"), f"{KINDS[kind]}Policy")


def lerobot_config(kind: str, cameras: tuple[str, ...], image: int, state: int, action: int, **fields: Any) -> Any:
    """LeRobot's config of this kind for cameras of `image` pixels, a state and an action of so many numbers."""
    return policy_class(kind).config_class(**lerobot_features(cameras, image, state, action), **fields)


def lerobot_features(cameras: tuple[str, ...], image: int, state: int, action: int) -> dict[str, Any]:
    """Return the fields of a LeRobot config that describe inputs and outputs; arguments as of `lerobot_config`."""
    types = _lerobot("configs.types")

    def feature(kind: str, *shape: int) -> Any:
        return types.PolicyFeature(types.FeatureType[kind], shape)

    features = {f"{IMAGES}{name}": feature("VISUAL", 3, image, image) for name in cameras}
    return {
        "input_features": {**features, "observation.state": feature("STATE", state)},
        "output_features": {"action": feature("ACTION", action)},
    }


def _lerobot(module: str) -> Any:
    return importlib.import_module(f"lerobot.{module}")


def _checked(policy_type: Any, path: str | Path, config: Any) -> Any:
    """Load the policy and watch its loading: warnings that LeRobot would print and forget are errors here."""
    printed = io.StringIO()
    try:
        with (
            _watched(policy_type) as loads,
            no_remote_code(),
            contextlib.redirect_stdout(printed),
            backbones.without_weights(config.type),
        ):
            policy = policy_type.from_pretrained(str(path), config=config)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(NO_WEIGHTS.format(path=path, reason=error)) from error
    if not loads:
        reasons = [line for line in printed.getvalue().splitlines() if "ould not load" in line]
        raise CheckpointError(NO_WEIGHTS.format(path=path, reason=" ".join(reasons) or "LeRobot gave no reason"))
    missing, unexpected, wrong = loads[-1]
    if missing or unexpected or wrong:
        raise CheckpointError(
            f"The weights of {path} do not fit {policy_type.__name__}. Missing: {listed(missing)}. Unexpected: "
            f"{listed(unexpected)}. Of another shape: {listed(wrong)}."
        )
    return policy


@contextlib.contextmanager
def _watched(policy_type: Any) -> Iterator[list[tuple[list[str], list[str], list[str]]]]:
    """Notes, for each load of a policy of this type, the missing, unexpected and misshapen weights."""
    loads: list[tuple[list[str], list[str], list[str]]] = []
    unread = backbones.TRAINING_ONLY.get(policy_type.name, ())
    original = policy_type.load_state_dict

    def load_state_dict(self: nn.Module, state: Mapping[str, Tensor], strict: bool = True, **options: Any) -> Any:
        own = self.state_dict()
        # A weight that shares its memory with one that is there is not missing, and no action comes of a language head.
        loaded = {own[name].data_ptr() for name in state if name in own}
        missing = [
            name
            for name, tensor in own.items()
            if name not in state and tensor.data_ptr() not in loaded and not name.endswith("lm_head.weight")
        ]
        wrong = [
            f"{name} {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
            for name, tensor in state.items()
            if name in own and tensor.shape != own[name].shape
        ]
        unexpected = [name for name in state if name not in own and not name.startswith(unread)]
        loads.append((missing, unexpected, wrong))
        return _NOTHING if wrong else original(self, state, strict=False, **options)

    policy_type.load_state_dict = load_state_dict
    try:
        yield loads
    finally:
        del policy_type.load_state_dict


_NOTHING = nn.modules.module._IncompatibleKeys([], [])


NO_WEIGHTS = "No weights were loaded from {path}, which must hold a whole model.safetensors: {reason}"
