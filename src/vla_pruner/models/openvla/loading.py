"""Loading published checkpoint folders of OpenVLA and OpenVLA-OFT as they are; whatever is wrong with them is one
error that says what.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from vla_pruner.errors import BudgetError, CheckpointError, UnsupportedModelError
from vla_pruner.methods.base import is_count
from vla_pruner.models.openvla import heads
from vla_pruner.models.openvla.configuration import OpenVLAConfig
from vla_pruner.models.openvla.equipment import as_checkpoint_error, equip
from vla_pruner.models.openvla.network import OpenVLAForActionPrediction
from vla_pruner.models.openvla.oft import OpenVLAOFT
from vla_pruner.models.openvla.processing import OpenVLAProcessor
from vla_pruner.models.openvla.quantization import INSTALL, quantization_config
from vla_pruner.models.openvla.robots import camera_names
from vla_pruner.models.openvla.shards import check_shards
from vla_pruner.policies.options import check_attention
from vla_pruner.versions import check_transformers

_STATISTICS = "dataset_statistics.json"
_FILM = re.compile(r"vision_backbone\..*\.(scale|shift)\.(weight|bias)$|film", re.IGNORECASE)
_LISTED = 20


def load_openvla(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    device_map: Any = None,
    quantization: Literal["int8", "int4"] | Any = None,
    family: Literal["openvla", "openvla_oft"] | None = None,
    unnorm_key: str | None = None,
    cameras: tuple[str, ...] | None = None,
    chunk: int | None = None,
    denoising_steps: int | None = None,
) -> OpenVLAForActionPrediction | OpenVLAOFT:
    """A policy from a published checkpoint, in eval mode, with its heads, statistics and processor.

    Args:
        path: the checkpoint's folder, or its name on the Hugging Face hub.
        device: where to put it, unless `device_map` is given.
        dtype: of the weights; bfloat16 on CUDA and float32 elsewhere if None.
        attn_implementation: of the language model: "sdpa" or "eager". The vision towers always use sdpa.
        device_map: as in transformers (needs accelerate).
        quantization: "int8", "int4", or a quantization config of transformers; of the language model's layers alone.
        family: which of the two it is. If None, a folder with an action head or a proprio projector is OpenVLA-OFT;
            one that decodes discrete actions and reads no state has neither, and has to be named.
        unnorm_key: the dataset whose statistics are used where a call names none.
        cameras: names of the images, in the order of the visual tokens. Their number is in no file: if None, OpenVLA
            has one, and OFT as many as its official platform (LIBERO two, ALOHA three, Bridge one), or one if it
            reads no state.
        chunk: actions in a chunk, where the official platforms leave it open.
        denoising_steps: of a diffusion head; None: 50, as many as in training, the official default.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights are not the model's; the message lists them.
        UnsupportedModelError: it is another model, or a variant or a transformers that is not supported.
        BudgetError: `denoising_steps` is not from 1 to 50, or nothing is denoised; `chunk` is no number of actions.
    """
    check_transformers()
    check_attention(attn_implementation)
    if chunk is not None and not is_count(chunk, 1):
        raise BudgetError(f"chunk={chunk!r} was given; it is how many actions are in a chunk, an int of 1 or more.")
    if device_map is not None and find_spec("accelerate") is None:
        raise UnsupportedModelError(f"device_map={device_map!r} needs accelerate. Run: {INSTALL['accelerate']}")
    folder = checkpoint_folder(path)
    config = _read_config(folder)
    check_shards(folder)
    files = _head_files(folder)
    if family not in (None, "openvla", "openvla_oft"):
        raise UnsupportedModelError(f"family={family!r} was given; it is 'openvla' or 'openvla_oft'.")
    if files and family == "openvla":
        raise CheckpointError(f"{folder} has OpenVLA-OFT's heads ({', '.join(files)}); leave family out.")
    oft = bool(files) or family == "openvla_oft"
    if not oft and (chunk is not None or (cameras is not None and len(camera_names(1, cameras)) != 1)):
        raise CheckpointError(
            f"{folder} has no action head and no proprio projector, so it is OpenVLA: one camera, one action at a "
            "time. For OpenVLA-OFT with discrete actions give family='openvla_oft'; else leave out chunk and cameras."
        )
    if not oft and denoising_steps is not None:
        raise BudgetError(f"denoising_steps={denoising_steps!r} was given, but OpenVLA denoises nothing; leave it out.")
    if dtype is None:
        on_cuda = torch.device(device).type == "cuda" if device_map is None else torch.cuda.is_available()
        dtype = torch.bfloat16 if on_cuda else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, torch.device(device), dtype)
        device_map = {"": device} if device_map is None else device_map
    policy: Any = _read_weights(OpenVLAOFT if oft else OpenVLAForActionPrediction, folder, config, options, device_map)
    if device_map is None:
        policy.to(device)
    if isinstance(policy, OpenVLAOFT):
        equip(policy, folder, files, dtype, cameras, chunk, denoising_steps)
    else:
        policy.cameras = camera_names(1, cameras)
    policy.processor = _processor(folder, config.pad_token_id)
    if unnorm_key is not None:
        policy.unnorm_key = policy.dataset(unnorm_key)
    return policy.eval()


def checkpoint_folder(path: str | Path) -> Path:
    """The folder of a checkpoint, fetched from the hub where `path` is no folder but a name there.

    Raises:
        CheckpointError: it is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    name = str(path)
    if folder.exists() or re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None or name.startswith("."):
        raise CheckpointError(
            f"{path} is no folder, nor a name on the Hugging Face hub (owner/name). Give the folder that holds "
            "config.json and the *.safetensors files."
        )
    import huggingface_hub

    try:
        fetched = huggingface_hub.snapshot_download(
            name,
            allow_patterns=["*.json", "*.safetensors", "*.pt", "*.model"],
            ignore_patterns=["lora_adapter/*"],
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{name} is no folder here and could not be fetched from the Hugging Face hub ({reason}). Check the name "
            f"and the connection, or fetch it elsewhere (`hf download {name} --local-dir FOLDER`) and give the folder."
        ) from error
    return Path(fetched)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}). Download the checkpoint again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no table of names and values. Download the checkpoint again.")
    return found


def _read_config(folder: Path) -> OpenVLAConfig:
    values = _read_json(folder / "config.json")
    kind = values.get("model_type")
    if kind != OpenVLAConfig.model_type:
        raise UnsupportedModelError(
            f"{folder / 'config.json'} is of a model of type {kind!r}; this loads 'openvla'. Other families are "
            "loaded with their own library and then attached to."
        )
    config = OpenVLAConfig.from_pretrained(folder)
    vocabulary = config.text_config.vocab_size
    if not 0 <= config.pad_token_id < vocabulary:
        raise CheckpointError(
            f"{folder / 'config.json'} has a vocabulary of {vocabulary} tokens and pad_token_id {config.pad_token_id}, "
            "which is none of them. Copy config.json from the published checkpoint."
        )
    if (folder / _STATISTICS).is_file():
        # As in the official scripts: what the checkpoint was fine-tuned on replaces what config.json was born with.
        config.norm_stats = _read_json(folder / _STATISTICS)
    return config


def _head_files(folder: Path) -> dict[str, Path]:
    film = sorted(file.name for file in folder.glob("vision_backbone--*.pt"))
    if film:
        raise UnsupportedModelError(_film_message(folder, film))
    with as_checkpoint_error():
        return heads.find_heads(folder)


def _film_message(folder: Path, found: Iterable[str]) -> str:
    return (
        f"{folder} was trained with FiLM: its vision towers read the instruction ({', '.join(found)}). FiLM is not "
        "supported; use a checkpoint without it (OFT's, not OFT+'s)."
    )


def _read_weights(
    kind: type[OpenVLAForActionPrediction],
    folder: Path,
    config: OpenVLAConfig,
    options: dict[str, Any],
    device_map: Any,
) -> OpenVLAForActionPrediction:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    # transformers warns of keys that do not fit and goes on with random weights; here they are an error.
    logging.set_verbosity_error()
    try:
        loaded: Any = kind.from_pretrained(
            folder,
            config=config,
            device_map=device_map,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"The weights in {folder} are missing or damaged ({reason}). Download the checkpoint again."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    policy, info = loaded
    _check_weights(folder, info)
    return policy


def _check_weights(folder: Path, info: dict[str, Any]) -> None:
    unexpected = sorted(info["unexpected_keys"])
    film = [key for key in unexpected if _FILM.search(key)]
    if film:
        raise UnsupportedModelError(_film_message(folder, film[:2]))
    wrong = sorted(
        f"{name} ({_shape(found)} instead of {_shape(expected)})" for name, found, expected in info["mismatched_keys"]
    )
    faults = {
        "missing": sorted(set(info["missing_keys"]) - {name for name, *_ in info["mismatched_keys"]}),
        "unexpected": unexpected,
        "of another size": wrong,
        "not loaded": sorted(info.get("error_msgs") or []),
    }
    lists = [f"{len(names)} {fault}: {_some(names)}" for fault, names in faults.items() if names]
    if lists:
        raise CheckpointError(
            f"The weights in {folder} are not those that its config.json describes. {'. '.join(lists)}. Download the "
            "checkpoint again; if it is a variant of OpenVLA, it is not supported."
        )


class AbsentTokenizer:
    """Stands where a folder has no tokenizer: `predict_action` with ids of one's own needs none."""

    bos_token_id = 1

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, text: Any, *, add_special_tokens: bool = True) -> Any:
        raise CheckpointError(
            f"{self._folder} has no tokenizer.json or tokenizer.model, so instructions cannot be read. Copy them there "
            "from the checkpoint that this one was trained from, or call predict_action with token ids of your own and "
            "pixel_values=policy.processor.pixel_values([image, ...])."
        )


def _processor(folder: Path, pad: int) -> OpenVLAProcessor:
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return OpenVLAProcessor.from_folder(folder, None if has_tokenizer else AbsentTokenizer(folder), pad)


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) or "a number"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
