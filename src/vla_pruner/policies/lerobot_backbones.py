"""Files of the model that a LeRobot policy is built around, which LeRobot fetches from the hub: read from the
checkpoint's own folder instead, if they lie there.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vla_pruner.checkpoints.files import read_json, reason, shown
from vla_pruner.errors import CheckpointError

FOLDER = "backbone"
"""The folder in a checkpoint's that has the backbone's config.json, tokenizer and image processor."""

TRAINING_ONLY = {"vla_jepa": ("model.video_encoder.", "model.video_predictor.")}
"""The beginnings of the names of weights that only training reads, by LeRobot's name of the policy."""

_EO1_STEP = "eo1_qwen_processor"


def beside(folder: Path) -> Path | None:
    """Return the backbone's folder in a checkpoint's, or None."""
    inner = folder / FOLDER
    return inner if inner.is_dir() else None


def prepare(folder: Path, config: Any) -> None:
    """Set a config so that LeRobot builds the policy of the checkpoint's own weights, without those of its backbone and
    of parts that only training needs.
    """
    inner = beside(folder)
    if config.type == "eo1":
        # LeRobot fetches the backbone's weights if this is None, and then replaces them by the checkpoint's.
        config.pretrained_path = str(folder)
    if config.type == "vla_jepa":
        config.enable_world_model = False
        if inner is not None:
            config.qwen_model_name = str(inner)


@contextlib.contextmanager
def without_weights(kind: str) -> Iterator[None]:
    """Make LeRobot build a VLA-JEPA's backbone from its config alone in the block; other policies are not affected.

    LeRobot would read all of the backbone's weights, and then replace them by the checkpoint's.
    """
    if kind != "vla_jepa":
        yield
        return
    interface: Any = importlib.import_module("lerobot.policies.vla_jepa.qwen_interface")
    known = interface.Qwen3VLForConditionalGeneration

    def build(name: str, torch_dtype: Any = None) -> Any:
        return known._from_config(known.config_class.from_pretrained(name), dtype=torch_dtype)

    interface.Qwen3VLForConditionalGeneration = SimpleNamespace(from_pretrained=build)
    try:
        yield
    finally:
        interface.Qwen3VLForConditionalGeneration = known


@contextlib.contextmanager
def distributions_unchecked() -> Iterator[None]:
    """Make torch check no parameters of distributions in the block: a VLA-JEPA has one for training, and on the device
    "meta" its parameters have no values.
    """
    from torch.distributions import Distribution

    checks = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(checks)


def refusal(folder: Path, name: object, error: BaseException) -> CheckpointError:
    """Return the error that says which files are not there, and where to put them."""
    told = shown(name)
    return CheckpointError(
        f"{folder} needs files that are not in it: the config, the tokenizer and the image processor of {told}, and "
        f"they could not be fetched ({reason(error)}). Run once with a connection, or fetch them elsewhere (`hf "
        f"download {told} --exclude '*.safetensors' --local-dir {FOLDER}`) and put that folder into {folder}."
    )


def processor_overrides(folder: Path, file: Path) -> dict[str, dict[str, Any]]:
    """Return the settings of saved steps in which they differ from a preprocessor's file: the backbone's folder."""
    inner = beside(folder)
    if inner is None or not _names_backbone(file):
        return {}
    return {_EO1_STEP: {"processor_name": str(inner)}}


@contextlib.contextmanager
def fetching(folder: Path, file: Path) -> Iterator[None]:
    """Raise the refusal if a saved step cannot fetch its backbone's files in the block."""
    name = _names_backbone(file)
    try:
        yield
    except Exception as error:
        if name is None or not isinstance(error.__cause__, OSError):
            raise
        raise refusal(folder, name, error.__cause__) from error


def _names_backbone(file: Path) -> str | None:
    """Return the name of the backbone in a preprocessor's file; None if none of its steps reads one's files."""
    for step in read_json(file)["steps"]:
        if step.get("registry_name") == _EO1_STEP:
            settings = step.get("config")
            name = settings.get("processor_name") if isinstance(settings, dict) else None
            return str(name)
    return None
