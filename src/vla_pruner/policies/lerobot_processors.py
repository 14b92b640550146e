"""LeRobot's saved processors: the steps that they name, before LeRobot imports one, and their statistics."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_pruner.checkpoints.files import (
    AGAIN,
    described_by,
    is_file,
    is_plain_name,
    listed,
    read_json,
    shown,
)
from vla_pruner.errors import CheckpointError, OptionError
from vla_pruner.policies.lerobot_backbones import check_processor, fetching, processor_overrides

FILES = ("policy_preprocessor.json", "policy_postprocessor.json")
_OWN = (
    "lerobot.processor.",
    *(f"lerobot.policies.{kind}." for kind in ("pi0", "pi05", "pi0_fast", "smolvla", "molmoact2", "eo1", "vla_jepa")),
)
_NOT_OURS = ("lerobot.processor.hil_processor",)
"""The modules with steps for training beside a robot; one loads a classifier that may be anything."""

_NEEDS = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}


def read_processors(
    folder: Path, config: Any, device: str | torch.device, unnorm_key: str | None = None, trust: bool = False
) -> tuple[Any, Any]:
    """Return a folder's pre- and postprocessor; None and None if it has none.

    Args:
        folder: of the checkpoint.
        config: the policy's.
        device: of the preprocessor's outputs.
        unnorm_key, trust: `unnorm_key` and `trust_processors` of `load_lerobot`.

    Raises:
        CheckpointError: a file is damaged, names a step that is not LeRobot's own, or lacks statistics; or files that a
            step reads are missing.
        OptionError: `unnorm_key` was given, and no statistics are by dataset, or not that one's.
    """
    if not all(is_file(folder / name) for name in FILES):
        if unnorm_key is not None:
            raise OptionError(f"unnorm_key={unnorm_key!r} was given, but {folder} has no {' and '.join(FILES)}.")
        return None, None
    check_steps(folder, trust)
    make = importlib.import_module("lerobot.policies.factory").make_pre_post_processors
    first = folder / FILES[0]
    overrides = {"device_processor": {"device": str(device)}, **processor_overrides(folder, first)}
    with described_by(first), fetching(folder, first), no_remote_code():
        both = make(config, pretrained_path=str(folder), preprocessor_overrides=overrides)
    for step in both[0].steps:
        if type(step).__name__ == "EO1QwenProcessorStep":
            check_processor(folder, step._processor)
    with described_by(folder / FILES[1]):
        _settle_statistics(folder, both, unnorm_key, getattr(config, "max_state_dim", 0))
    return both


def check_steps(folder: Path, trust: bool = False, flag: str = "load_policy(..., trust_processors=True)") -> None:
    """Look at the processors' files before LeRobot does, which imports and calls anything that they name.

    Args:
        folder: of the checkpoint.
        trust: pass over steps that are not LeRobot's own.
        flag: how to say so, for the message.

    Raises:
        CheckpointError: a step is not LeRobot's own, reads a file elsewhere, or could run code that a file names.
    """
    for file in (folder / name for name in FILES):
        if not is_file(file):
            continue
        steps = read_json(file).get("steps")
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise CheckpointError(f"{file} is damaged: it has no list of steps. {AGAIN}")
        for step in steps:
            state = step.get("state_file")
            if state is not None and not is_plain_name(state):
                raise CheckpointError(
                    f"{file} has a step with the state_file {shown(repr(state))}, not beside it. {AGAIN}"
                )
            if not trust:
                _check_step(file, step, flag)


def _check_step(file: Path, step: Mapping[str, Any], flag: str) -> None:
    name = step["registry_name"] if "registry_name" in step else step.get("class")
    found = _step_class(step) if isinstance(name, str) else None
    if found is None:
        what = "has a step that is none of LeRobot's own for the policies that are supported"
    elif "trust_remote_code" in inspect.signature(found).parameters:
        what = "has a step that can run code from another repository"
    else:
        return
    raise CheckpointError(
        f"{file} {what}: {shown(repr(name))}. Loading it would run code that the checkpoint names, so it is refused. "
        f"If you trust where the checkpoint came from, give {flag}."
    )


def _step_class(step: Mapping[str, Any]) -> Any:
    """Return the class of a step, if it is one of LeRobot's own; nothing but LeRobot's own modules is imported."""
    pipeline = importlib.import_module("lerobot.processor.pipeline")
    for module in ("lerobot.processor", *(f"{own}processor_{own.split('.')[-2]}" for own in _OWN[1:])):
        importlib.import_module(module)  # They fill the registry.
    if "registry_name" in step:
        found = pipeline.ProcessorStepRegistry._registry.get(step["registry_name"])
    else:
        module, _, name = step["class"].rpartition(".")
        if not f"{module}.".startswith(_OWN):
            return None
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            return None
    if not inspect.isclass(found) or not issubclass(found, pipeline.ProcessorStep):
        return None
    is_own = f"{found.__module__}.".startswith(_OWN) and found.__module__ not in _NOT_OURS
    return found if is_own else None


@contextlib.contextmanager
def no_remote_code() -> Iterator[None]:
    """Make transformers refuse code of a checkpoint's own at once in the block; at a terminal it would ask whether to
    run it.
    """
    dynamic: Any = importlib.import_module("transformers.dynamic_module_utils")
    known = dynamic.TIME_OUT_REMOTE_CODE
    dynamic.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic.TIME_OUT_REMOTE_CODE = known


def state_size(preprocessor: Any) -> int | None:
    """Return the number of values in the states that a preprocessor scales; None if it scales none.

    Fine-tuning with LeRobot leaves in the config, and in the step's features, the size of the state that the policy
    was trained on before. The statistics are those of the data that it was fine-tuned on.
    """
    for step in getattr(preprocessor, "steps", ()):
        for feature, names in (_scaled(step) if hasattr(step, "_tensor_stats") else {}).items():
            values = step._tensor_stats.get(feature, {}).get(names[0])
            if _is_state(step, feature) and values is not None and values.ndim == 1:
                return len(values)
    return None


def _is_state(step: Any, feature: str) -> bool:
    return step.features[feature].type.name == "STATE"


def _settle_statistics(folder: Path, both: tuple[Any, Any], unnorm_key: str | None, longest_state: int) -> None:
    """Every feature that is to be scaled has its statistics, those of the dataset that was chosen."""
    steps = [
        (file, step)
        for file, pipeline in zip(FILES, both, strict=True)
        for step in pipeline.steps
        if hasattr(step, "_tensor_stats")
    ]
    datasets = {_dataset(key, feature) for _, step in steps for feature in _scaled(step) for key in step._tensor_stats}
    known = sorted(dataset for dataset in datasets if dataset)
    if unnorm_key is not None and unnorm_key not in known:
        raise OptionError(
            f"unnorm_key={unnorm_key!r} was given; the statistics in {folder} are by the datasets {listed(known)}."
        )
    any_statistics = any(step._tensor_stats for _, step in steps)
    for file, step in steps:
        needed = _scaled(step)
        if unnorm_key is not None:
            chosen = {
                key: feature for feature in needed for key in step._tensor_stats if _dataset(key, feature) == unnorm_key
            }
            # Statistics of no dataset stay, unless the chosen one has its own.
            statistics = dict(step._tensor_stats) | {chosen[key]: step._tensor_stats[key] for key in chosen}
            flat = {f"{key}.{name}": value for key, values in statistics.items() for name, value in values.items()}
            step.load_state_dict(flat)
        for feature, names in needed.items():
            _check_feature(folder / file, step, feature, names, known, any_statistics, longest_state)


def _scaled(step: Any) -> dict[str, tuple[str, ...]]:
    """Return the features that a step scales, and the statistics that it needs for each: actions if it
    un-normalises.
    """
    found = {}
    un_normalises = "Unnormalizer" in type(step).__name__
    for feature, what in step.features.items():
        mode = getattr(step.norm_map.get(what.type), "name", "IDENTITY")
        is_action = what.type.name == "ACTION"
        only = step.normalize_observation_keys
        if mode in _NEEDS and is_action == un_normalises and (is_action or only is None or feature in only):
            found[feature] = _NEEDS[mode]
    return found


def _dataset(key: str, feature: str) -> str | None:
    """Return the dataset of "so100.buffer.observation.state" for observation.state, also with underscores; None: not of
    it.
    """
    same = re.fullmatch(rf"(.+?)[._](buffer[._])?{re.escape(feature).replace(chr(92) + '.', '[._]')}", key)
    return same[1] if same else None


def _check_feature(
    file: Path,
    step: Any,
    feature: str,
    names: tuple[str, ...],
    datasets: list[str],
    any_statistics: bool,
    longest_state: int,
) -> None:
    statistics = step._tensor_stats.get(feature)
    if statistics is None:
        by_dataset = any(_dataset(key, feature) for key in step._tensor_stats)
        if by_dataset or (feature == "action" and any_statistics):
            advice = (
                f"Choose the dataset of your robot: load_policy(..., unnorm_key={datasets[0]!r})."
                if datasets
                else "Save the processors with the statistics that the policy was trained with."
            )
            raise CheckpointError(
                f"{file} is to scale {feature!r}, and has statistics of {listed(step._tensor_stats)} instead; without "
                f"its own, normalised numbers would pass for units. {advice}"
            )
        return
    absent = [name for name in names if name not in statistics]
    if absent:
        raise CheckpointError(
            f"{file} has no {' and '.join(absent)} of {feature!r}, which it scales by; found {listed(statistics)}. "
            f"{AGAIN}"
        )
    low, high = (statistics[name] for name in names)
    shape = tuple(step.features[feature].shape)
    if _is_state(step, feature) and isinstance(low, Tensor) and low.ndim == 1 and len(low) <= longest_state:
        shape = tuple(low.shape)  # see `state_size`
    for name, values in zip(names, (low, high), strict=True):
        if not isinstance(values, Tensor) or not values.isfinite().all():
            raise CheckpointError(f"{file} has {name} of {feature!r} that is not finite (NaN or infinity). {AGAIN}")
        if tuple(values.shape) not in (shape, ()):
            raise CheckpointError(
                f"{file} has {name} of {feature!r} of the shape {tuple(values.shape)}; the policy's is {shape}. {AGAIN}"
            )
    if (high < (0 if "std" in names else low)).any():
        raise CheckpointError(f"{file} has {names[0]} and {names[1]} of {feature!r} that no data can have. {AGAIN}")
