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

from vla_pruner.checkpoints.files import AGAIN, described_by, is_file, read_json, reason, shown
from vla_pruner.errors import CheckpointError
from vla_pruner.json_file import field_of

FOLDER = "backbone"
"""The folder in a checkpoint's that has the backbone's config.json, tokenizer and image processor."""

TRAINING_ONLY = {"vla_jepa": ("model.video_encoder.", "model.video_predictor.")}
"""The beginnings of the names of weights that only training reads, by LeRobot's name of the policy."""

_EO1_STEP = "eo1_qwen_processor"

_MOST_TOKENS = 10_000_000
"""The largest accepted id of a token; those of published tokenizers are below 300 000. The library behind them lists
every id that none has.
"""


def beside(folder: Path) -> Path | None:
    """Return the backbone's folder in a checkpoint's, or None."""
    inner = folder / FOLDER
    return inner if inner.is_dir() else None


def prepare(folder: Path, config: Any) -> None:
    """Set a config so that LeRobot builds the policy of the checkpoint's own weights, without those of its backbone and
    of parts that only training needs.
    """
    inner = beside(folder)
    if inner is not None:
        _check_tokens(inner / "tokenizer.json")
    if config.type == "eo1":
        # LeRobot fetches the backbone's weights if this is None, and then replaces them by the checkpoint's.
        config.pretrained_path = str(folder)
    if config.type == "vla_jepa":
        config.enable_world_model = False
        _check_prompt(folder / "config.json", config.prompt_template)
        if inner is not None:
            config.qwen_model_name = str(inner)


def check_processor(folder: Path, processor: Any) -> None:
    """Refuse a backbone's processor that does not put each image and each text of a message into the prompt once.

    Raises:
        CheckpointError: it does not, it cannot be run, or it has no token to pad with.
    """
    place, said = beside(folder) or folder, "take the cup"
    message = {"role": "user", "content": [{"type": "image", "image": "image"}, {"type": "text", "text": said}]}
    with described_by(place / "chat_template.jinja"):
        prompt = processor.apply_chat_template([message], tokenize=False)
    found = [what for what in (said, processor.image_token) if prompt.count(what) != 1]
    if found:
        what = "text" if said in found else "image"
        raise CheckpointError(
            f"The chat template of {place} makes a prompt that does not hold the {what} of a message once: "
            f"{shown(repr(prompt))}. {AGAIN}"
        )
    if processor.tokenizer.pad_token is None:
        raise CheckpointError(f"The tokenizer of {place} has no token to pad with (pad_token). {AGAIN}")


def placeholders(module: Any, preprocessor: Any) -> frozenset[str]:
    """Return the words that a policy's processors replace by images, wherever in a prompt they are."""
    steps = getattr(preprocessor, "steps", ())
    found = [getattr(step, name, None) for step in steps for name in ("_processor", "processor")]
    found.append(getattr(getattr(getattr(module, "model", None), "qwen", None), "processor", None))
    names = ("image_token", "video_token", "image_placeholder_token")
    words = (getattr(processor, name, None) for processor in found for name in names)
    return frozenset(word for word in words if isinstance(word, str) and word)


def _check_tokens(file: Path) -> None:
    if not is_file(file):
        return
    with described_by(file):
        for token in field_of(read_json(file), "added_tokens", list[dict[str, Any]]):
            number = field_of(token, "id", int, "a token")
            if not 0 <= number <= _MOST_TOKENS:
                raise CheckpointError(f"{file} has a token with the id {number}, up to {_MOST_TOKENS}. {AGAIN}")


def _check_prompt(file: Path, template: Any) -> None:
    """Refuse a template of the prompt from which a part that the policy reads is missing."""
    parts = {name: f"<{name}>" for name in ("instruction", "actions", "e_actions")}
    with described_by(file):
        prompt = template.format(**parts)
    missing = [name for name, part in parts.items() if part not in prompt]
    if missing:
        raise CheckpointError(f"{file} has a prompt_template without {{{missing[0]}}}. {AGAIN}")


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
