"""Loading published checkpoint folders of OpenVLA and OpenVLA-OFT as they are; any fault in them is one error that
names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers.initialization import no_init_weights

from vla_pruner.checkpoints.files import checkpoint_folder, described_by, is_file, listed, read_json, reason, shown
from vla_pruner.checkpoints.weights import Stored, check_depth, check_finite, misfit, read_headers
from vla_pruner.checks import check_attention, is_count
from vla_pruner.errors import CheckpointError, OptionError, UnsupportedModelError
from vla_pruner.models.openvla import heads
from vla_pruner.models.openvla.configuration import OpenVLAConfig, config_of, tower_sizes
from vla_pruner.models.openvla.equipment import as_checkpoint_error, equip
from vla_pruner.models.openvla.network import OpenVLAForActionPrediction
from vla_pruner.models.openvla.oft import OpenVLAOFT
from vla_pruner.models.openvla.processing import OpenVLAProcessor
from vla_pruner.models.openvla.quantization import INSTALL, quantization_config
from vla_pruner.models.openvla.robots import camera_names
from vla_pruner.models.openvla.statistics import STATISTICS, check_statistics
from vla_pruner.versions import check_transformers

_FILM = re.compile(r"vision_backbone\..*\.(scale|shift)\.(weight|bias)$|film", re.IGNORECASE)


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
    """Load a policy from a published checkpoint, in eval mode, with its heads, statistics and processor.

    Args:
        path: the checkpoint's folder, or its name on the Hugging Face hub.
        device: the policy's device, unless `device_map` is given.
        dtype: of the weights; bfloat16 on CUDA and float32 elsewhere if None.
        attn_implementation: of the language model: "sdpa" or "eager". The vision towers always use sdpa.
        device_map: as in transformers (needs accelerate).
        quantization: "int8", "int4", or a quantization config of transformers; of the language model's layers alone.
        family: which of the two it is. If None, a folder with an action head and a proprio projector is OpenVLA-OFT,
            and one with neither is OpenVLA. One that has lost either, or shows that it was OFT's, is refused: discrete
            actions, and OFT without a state, have to be named.
        unnorm_key: the dataset whose statistics are used if a call names none.
        cameras: names of the images, in the order of the visual tokens. Their number is in no file: if None, OpenVLA
            has one, and OFT as many as its official platform (LIBERO two, ALOHA three, Bridge one), or one if it
            reads no state.
        chunk: actions in a chunk, if the official platforms leave it open.
        denoising_steps: of a diffusion head; None: 50, as many as in training, the official default.

    Raises:
        CheckpointError: a file is missing or damaged, the weights are not the model's, or weights or statistics are not
            finite; the message lists them.
        UnsupportedModelError: it is another model, or a variant or a transformers that is not supported.
        OptionError: `denoising_steps` is not from 1 to 50, or nothing is denoised; `chunk` is no number of actions.
    """
    check_transformers()
    check_attention(attn_implementation)
    if chunk is not None and not is_count(chunk, 1):
        raise OptionError(f"chunk={chunk!r} was given; it is how many actions are in a chunk, an int of 1 or more.")
    if device_map is not None and find_spec("accelerate") is None:
        raise UnsupportedModelError(f"device_map={device_map!r} needs accelerate. Run: {INSTALL['accelerate']}")
    folder = checkpoint_folder(path)
    config = _read_config(folder)
    headers = read_headers(folder)
    files = _head_files(folder)
    if family not in (None, "openvla", "openvla_oft"):
        raise UnsupportedModelError(f"family={family!r} was given; it is 'openvla' or 'openvla_oft'.")
    if files and family == "openvla":
        raise CheckpointError(f"{folder} has OpenVLA-OFT's heads ({', '.join(files)}); leave family out.")
    if family is None:
        _check_whole(folder, files, config)
    oft = bool(files) or family == "openvla_oft"
    if not oft and (chunk is not None or (cameras is not None and len(camera_names(1, cameras)) != 1)):
        raise CheckpointError(
            f"{folder} has no action head and no proprio projector, so it is OpenVLA: one camera, one action at a "
            "time. For OpenVLA-OFT with discrete actions give family='openvla_oft'; else leave out chunk and cameras."
        )
    if not oft and denoising_steps is not None:
        raise OptionError(f"denoising_steps={denoising_steps!r} was given, but OpenVLA denoises nothing; leave it out.")
    if dtype is None:
        on_cuda = torch.device(device).type == "cuda" if device_map is None else torch.cuda.is_available()
        dtype = torch.bfloat16 if on_cuda else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, torch.device(device), dtype)
        device_map = {"": device} if device_map is None else device_map
    kind = OpenVLAOFT if oft else OpenVLAForActionPrediction
    _check_headers(kind, folder, config, headers)
    policy: Any = _read_weights(kind, folder, config, options, device_map)
    if device_map is None:
        policy.to(device)
    check_finite(policy, folder, headers)
    if isinstance(policy, OpenVLAOFT):
        equip(policy, folder, files, dtype, cameras, chunk, denoising_steps)
    else:
        policy.cameras = camera_names(1, cameras)
    policy.processor = _processor(folder, config)
    if unnorm_key is not None:
        policy.unnorm_key = policy.dataset(unnorm_key)
    return policy.eval()


def _read_config(folder: Path) -> OpenVLAConfig:
    path = folder / "config.json"
    values = read_json(path)
    kind = values.get("model_type")
    if kind != OpenVLAConfig.model_type:
        raise UnsupportedModelError(
            f"{path} is of a model of type {shown(repr(kind))}; this loads 'openvla'. Other families are "
            "loaded with their own library and then attached to."
        )
    config = config_of(path, values)
    if is_file(folder / STATISTICS):
        # As in the official scripts, the statistics of fine-tuning replace those in config.json.
        config.norm_stats = read_json(folder / STATISTICS)
        check_statistics(folder / STATISTICS, config.norm_stats)
    else:
        check_statistics(path, config.norm_stats)
    return config


def _head_files(folder: Path) -> dict[str, Path]:
    film = sorted(file.name for file in folder.glob("vision_backbone--*.pt"))
    if film:
        raise UnsupportedModelError(_film_message(folder, film))
    with as_checkpoint_error():
        return heads.find_heads(folder)


def _film_message(folder: Path, found: Iterable[str]) -> str:
    return (
        f"{folder} was trained with FiLM: its vision towers read the instruction ({listed(found)}). FiLM is not "
        "supported; use a checkpoint without it (OFT's, not OFT+'s)."
    )


def _check_whole(folder: Path, files: dict[str, Path], config: OpenVLAConfig) -> None:
    """Refuse a folder that looks like OFT without all of its files: the rest would act, but was not trained to."""
    heads_there = listed([file.name for file in files.values()])
    if files and "action_head" not in files and "noisy_action_projector" not in files:
        raise CheckpointError(
            f"{folder} has {heads_there}, but no action_head--*_checkpoint.pt: an OFT checkpoint that lost its action "
            "head, or one with discrete actions. Copy the file from the published checkpoint; for discrete actions "
            "give family='openvla_oft'."
        )
    if files and "proprio_projector" not in files:
        raise CheckpointError(
            f"{folder} has {heads_there}, but no proprio_projector--*_checkpoint.pt: an OFT checkpoint that lost its "
            "projector, or one that reads no state. Copy the file from the published checkpoint; for a policy without "
            "state give family='openvla_oft'."
        )
    sign = None if files else _sign_of_oft(folder, config)
    if sign is not None:
        raise CheckpointError(
            f"{folder} has no action head and no proprio projector, as OpenVLA, but {sign}, as OpenVLA-OFT. Copy "
            "action_head--*_checkpoint.pt and proprio_projector--*_checkpoint.pt from the published checkpoint; if it "
            "is OpenVLA, give family='openvla', and for OFT with discrete actions and no state family='openvla_oft'."
        )


def _sign_of_oft(folder: Path, config: OpenVLAConfig) -> str | None:
    """Return the sign that a folder without heads was OFT's: the code saved with it or, without any, its data."""
    code = folder / "modeling_prismatic.py"
    if is_file(code):
        # OpenVLA is fine-tuned on the same data, so the code decides.
        of_oft = "NUM_ACTIONS_CHUNK" in code.read_text(encoding="utf-8", errors="replace")
        return f"its {code.name} (which is not run) is OFT's" if of_oft else None
    data = [name for name in config.norm_stats if name.endswith("_no_noops") or name.startswith("aloha")]
    return f"its statistics are of {listed(data)}" if data else None


def _check_headers(
    kind: type[OpenVLAForActionPrediction], folder: Path, config: OpenVLAConfig, headers: dict[str, Stored]
) -> None:
    """Compare config.json with the headers of the files before anything takes memory or time."""
    path = folder / "config.json"
    with described_by(path):
        dino, siglip = tower_sizes(config)
    text = config.text_config.num_hidden_layers
    check_depth(path, "num_hidden_layers", text, headers, "language_model.model.layers.")
    for name, size in (("featurizer", dino), ("fused_featurizer", siglip)):
        # Published folders hold one block more than is used, saved ones may not.
        check_depth(path, "a vision tower's depth", size.depth - 1, headers, f"vision_backbone.{name}.blocks.")
    with described_by(path), torch.device("meta"), no_init_weights():
        described = kind(config)
    unused = [re.compile(pattern) for pattern in described._keys_to_ignore_on_load_unexpected or ()]
    used = {name: stored for name, stored in headers.items() if not any(part.search(name) for part in unused)}
    found = misfit(described.state_dict(), used)
    info = {"unexpected_keys": found.unexpected, "missing_keys": found.missing, "mismatched_keys": found.wrong}
    _check_weights(folder, {**info, "error_msgs": [f"{name} is not of floating point" for name in found.strange]})


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
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"The weights in {folder} are missing or damaged ({reason(error)}). Download the checkpoint again."
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
    lists = [f"{len(names)} {fault}: {listed(names)}" for fault, names in faults.items() if names]
    if lists:
        raise CheckpointError(
            f"The weights in {folder} are not those that its config.json describes. {'. '.join(lists)}. Download the "
            "checkpoint again; if it is a variant of OpenVLA, it is not supported."
        )


class AbsentTokenizer:
    """A stand-in if a folder has no tokenizer: `predict_action` with ids of one's own needs none."""

    bos_token_id = 1

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, text: Any, *, add_special_tokens: bool = True) -> Any:
        raise CheckpointError(
            f"{self._folder} has no tokenizer.json or tokenizer.model, so instructions cannot be read. Copy them there "
            "from the checkpoint that this one was trained from, or call predict_action with token ids of your own and "
            "pixel_values=policy.processor.pixel_values([image, ...])."
        )


def _processor(folder: Path, config: OpenVLAConfig) -> OpenVLAProcessor:
    has_tokenizer = any(is_file(folder / name) for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = None if has_tokenizer else AbsentTokenizer(folder)
    return OpenVLAProcessor.from_folder(folder, tokenizer, config.pad_token_id, config.text_config.vocab_size)


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) or "a number"
