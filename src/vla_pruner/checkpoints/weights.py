"""The safetensors files of a checkpoint folder: their headers, compared with a model before it is built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.checkpoints.files import AGAIN, is_file, is_plain_name, listed, read_json, reason, shown
from vla_pruner.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """The description of a tensor in a header.

    Attributes:
        file: the file that holds it.
        shape: its shape.
        dtype: its dtype; None if it is not of floating point.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None


def read_headers(folder: Path) -> dict[str, Stored]:
    """Return every tensor of a folder by its stored name, from the headers alone, which also give each file's length.

    Args:
        folder: with model.safetensors, or with model.safetensors.index.json and the files that it names.

    Raises:
        CheckpointError: a file is missing, damaged, of another checkpoint, or holds something that is no weight.
    """
    parts = sorted(file.name for file in folder.glob("model-*-of-*.safetensors"))
    index = folder / _INDEX
    if is_file(index):
        found = _indexed(folder, index, parts)
    elif is_file(folder / _SINGLE):
        found = _header(folder / _SINGLE)
    elif parts:
        raise CheckpointError(f"{folder} has {listed(parts)}, but {_INDEX} is missing. {AGAIN}")
    else:
        raise CheckpointError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}, so its weights are missing. {AGAIN} Weights in other "
            "formats (*.bin, *.pt) have to be saved as safetensors first."
        )
    if not found:
        raise CheckpointError(f"{folder} holds no weights: its safetensors have no tensor. {AGAIN}")
    return found


def _indexed(folder: Path, index: Path, parts: list[str]) -> dict[str, Stored]:
    content = read_json(index)
    weights = content.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{index} is damaged (it has no weight_map of names and files). {AGAIN}")
    if not isinstance(content.get("metadata", {}), dict):
        raise CheckpointError(f"{index} is damaged (its metadata is {shown(repr(content['metadata']))}). {AGAIN}")
    strange = [name for name in weights.values() if not is_plain_name(name) or not name.endswith(".safetensors")]
    if strange:
        raise CheckpointError(
            f"{index} is damaged (its weight_map names {shown(repr(strange[0]))}, and weights are read only from "
            f"*.safetensors beside it). {AGAIN}"
        )
    named = sorted(set(weights.values()))
    if is_file(folder / _SINGLE) and _SINGLE not in named:
        raise CheckpointError(
            f"{folder} has both {_SINGLE} and {_INDEX}, which names other files; which of them are its weights "
            "cannot be known. Move one of the two elsewhere."
        )
    missing = [name for name in named if not is_file(folder / name)]
    if missing:
        raise CheckpointError(f"{index} names files that are missing: {listed(missing)}. {AGAIN}")
    extra = [name for name in parts if name not in named]
    if extra:
        raise CheckpointError(
            f"{folder} has files of weights that {_INDEX} does not name: {listed(extra)}. They are of another "
            f"checkpoint, or the index is: move them elsewhere, or download the checkpoint again."
        )
    found: dict[str, Stored] = {}
    for name in named:
        header = _header(folder / name)
        twice = [tensor for tensor in header if tensor in found]
        if twice:
            raise CheckpointError(f"{folder / name} holds weights that another file has too: {listed(twice)}. {AGAIN}")
        found |= header
    wrong = [name for name, file in weights.items() if name not in found or found[name].file.name != file]
    if wrong or len(found) > len(weights):
        wrong = wrong or [name for name in found if name not in weights]
        raise CheckpointError(f"{index} is damaged (it does not say where these weights are: {listed(wrong)}). {AGAIN}")
    return found


def _header(file: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 it is no mapping
                part = opened.get_slice(name)
                found[name] = Stored(file, tuple(part.get_shape()), _DTYPES.get(str(part.get_dtype())))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({reason(error)}). {AGAIN}") from error
    return found


def read_weights(headers: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Return every tensor that `headers` name, by its stored name.

    Raises:
        CheckpointError: a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for file in sorted({stored.file for stored in headers.values()}):
        try:
            weights |= load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged ({reason(error)}). {AGAIN}") from error
    return weights


def check_depth(config: Path, what: str, layers: Any, headers: Iterable[str], before: str) -> None:
    """Refuse a config that has more layers than the weights: building them could take hours.

    Args:
        config: the file that says so.
        what: the setting's name.
        layers: its value.
        headers: names of the tensors.
        before: the part before a layer's number in them.

    Raises:
        CheckpointError: it is no count, or larger than the weights have layers.
    """
    numbers = {name[len(before) :].split(".", 1)[0] for name in headers if name.startswith(before)}
    found = 1 + max((int(number) for number in numbers if number.isdecimal() and len(number) < 9), default=-1)
    if type(layers) is not int or not 0 < layers <= found:
        raise CheckpointError(
            f"{config} has {what} {shown(repr(layers))}, but the weights beside it have {found} layers "
            f"({before}*). The two are not of one checkpoint. {AGAIN}"
        )


@dataclass(frozen=True)
class Misfit:
    """The differences between a checkpoint's weights and a model's.

    Attributes:
        missing, unexpected: names.
        wrong: name, the checkpoint's shape, the model's shape.
        strange: names of tensors that are not floating point, though the model's are.
    """

    missing: list[str]
    unexpected: list[str]
    wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    strange: list[str]


def misfit(expected: Mapping[str, Tensor], found: Mapping[str, Stored], optional: Iterable[str] = ()) -> Misfit:
    """Compare a model's tensors, which may be on the device "meta", with those in headers, by the model's names."""
    both = sorted(set(expected) & set(found))
    return Misfit(
        sorted(set(expected) - set(found) - set(optional)),
        sorted(set(found) - set(expected)),
        [
            (name, found[name].shape, tuple(expected[name].shape))
            for name in both
            if found[name].shape != tuple(expected[name].shape)
        ],
        [name for name in both if expected[name].is_floating_point() and found[name].dtype is None],
    )


def check_fit(folder: Path, differences: Misfit) -> None:
    """Refuse weights that are not the model's.

    Raises:
        CheckpointError: weights are missing, unexpected, of another shape or no numbers; it lists them.
    """
    found = differences
    wrong = [f"{name} {has}, not {needs}" for name, has, needs in found.wrong]
    if found.missing or found.unexpected or wrong or found.strange:
        strange = f" Not of floating point: {listed(found.strange)}." if found.strange else ""
        raise CheckpointError(
            f"The weights in {folder} do not fit its config.json. Missing: {listed(found.missing)}. Unexpected: "
            f"{listed(found.unexpected)}. Of another shape: {listed(wrong)}.{strange}"
        )


@torch.no_grad()
def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity. Quantized and offloaded ones are not checked."""
    are_good = {
        # Extremes are NaN if one number is, and take no copy, however large the tensor is.
        name: torch.stack(torch.aminmax(tensor.detach())).isfinite().all()
        for name, tensor in tensors
        if type(tensor.data) is Tensor and tensor.dtype in _DTYPES.values() and tensor.numel() and not tensor.is_meta
    }
    return [name for name, is_good in are_good.items() if not is_good]


def check_finite(module: nn.Module, folder: Path | str, headers: Mapping[str, Stored] | None = None) -> None:
    """Refuse weights that are not finite: a network of NaN can act.

    Args:
        module: with its weights, on the device where they stay; quantized and offloaded ones are not checked.
        folder: they came from, for the message.
        headers: the files' headers, if they have the names of the weights.

    Raises:
        CheckpointError: naming the weights, and their files.
    """
    wrong = not_finite([*module.named_parameters(), *module.named_buffers()])
    if wrong:
        files = sorted({str(headers[name].file) for name in wrong if name in headers}) if headers else []
        is_half = any(tensor.dtype == torch.float16 for tensor in module.parameters())
        half = " float16 overflows beyond 65504: load it with dtype='bfloat16' or 'float32'." if is_half else ""
        raise CheckpointError(
            f"The weights in {listed(files, otherwise=str(folder))} hold numbers that are not finite (NaN or "
            f"infinity): {listed(wrong)}.{half} They may have diverged in training; else download the checkpoint again."
        )
