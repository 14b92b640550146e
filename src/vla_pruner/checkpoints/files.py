"""A checkpoint's folder and its JSON files: any fault in one is a CheckpointError that names it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vla_pruner.errors import CheckpointError, VLAPrunerError

AGAIN = "Download the checkpoint again."
ADAPTER = "adapter_config.json"
_READ = (".json", ".safetensors", ".pt", ".model")
_POINTER = b"version https://git-lfs"
_MOST_BYTES, _DEEPEST = 32 * 2**20, 100


def checkpoint_folder(path: str | Path) -> Path:
    """Return the folder of a checkpoint, fetched from the hub if `path` is no folder but a name there.

    Raises:
        CheckpointError: it is neither, its files are pointers of git LFS, or it is a PEFT adapter.
    """
    name = str(path)
    try:
        folder = Path(path).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, ValueError, RuntimeError):  # a name that is too long, has a NUL, or begins with ~nobody
        is_folder, exists, folder = False, False, Path()
    if not is_folder:
        if exists or not may_be_on_hub(name):
            raise CheckpointError(
                f"{shown(name)} is no folder, nor a name on the Hugging Face hub (owner/name). Give the folder that "
                "holds config.json and the *.safetensors files."
            )
        folder = _fetched(name)
    _refuse_pointers(folder)
    _refuse_adapters(folder)
    return folder


def may_be_on_hub(name: str) -> bool:
    """Return whether a name has the form of those on the Hugging Face hub, owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def _fetched(name: str) -> Path:
    import huggingface_hub

    try:
        # No *.py and no *.bin: files that could run are not even fetched.
        fetched = huggingface_hub.snapshot_download(
            name,
            allow_patterns=["*.json", "*.safetensors", "*.pt", "*.model"],
            ignore_patterns=["lora_adapter/*"],
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{shown(name)} is no folder here and could not be fetched from the Hugging Face hub ({reason(error)}). "
            f"Check the name and the connection, or fetch it elsewhere (`hf download {shown(name)} --local-dir "
            "FOLDER`) and give the folder."
        ) from error
    return Path(fetched)


def _refuse_pointers(folder: Path) -> None:
    files = [file for file in sorted(folder.iterdir()) if file.suffix in _READ and _is_pointer(file)]
    if files:
        raise CheckpointError(
            f"{listed(map(str, files))} is damaged (it is a pointer of git LFS, not the file itself). Run `git lfs "
            f"pull` in {folder}, or download the checkpoint with `hf download`."
        )


def _is_pointer(file: Path) -> bool:
    try:
        if not file.is_file() or file.stat().st_size > 1024:
            return False
        with file.open("rb") as opened:
            return opened.read(len(_POINTER)) == _POINTER
    except OSError:
        return False  # the reader of the file reports its fault


def _refuse_adapters(folder: Path) -> None:
    if not (folder / ADAPTER).exists():
        return
    try:
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    except CheckpointError:
        base = None
    of = f" of {shown(base)}" if isinstance(base, str) and base else ""
    raise CheckpointError(
        f"{folder / ADAPTER} says that this folder is a PEFT adapter{of}, not a whole checkpoint; adapters are not "
        "loaded. Merge it (`PeftModel.from_pretrained(base, folder).merge_and_unload()`, then save_pretrained) and "
        f"give the merged folder; if its weights are merged already, move {ADAPTER} elsewhere."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from an untrusted file.

    Raises:
        CheckpointError: the file is missing, is no regular file, is larger than any that is published, nested without
            end, or holds anything else.
    """
    if not is_file(path):
        raise CheckpointError(f"{path.parent} has no {path.name}; give the folder of a whole checkpoint.")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes; such files have less than {_MOST_BYTES}")
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and _is_deep(values):
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
    except RecursionError:
        raise CheckpointError(f"{path} is damaged (it is nested more than {_DEEPEST} deep). {AGAIN}") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({reason(error)}). {AGAIN}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it holds no settings by name. {AGAIN}")
    return values


def _is_deep(values: Any) -> bool:
    level = [values]
    for _ in range(_DEEPEST):
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def is_file(path: Path) -> bool:
    """Return True if there is a regular file of this name; False also if the name is not a possible one."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_plain_name(name: Any) -> bool:
    """Return True if a name given in a file is that of a file beside it and cannot lead elsewhere."""
    return isinstance(name, str) and 0 < len(name) <= 255 and not set(name) & set("/\\\0") and name not in (".", "..")


@contextmanager
def described_by(path: Path) -> Iterator[None]:
    """Raise any error in the block as a fault of the file whose content is used there.

    Raises:
        CheckpointError: in place of any error but this package's own.
    """
    try:
        yield
    except VLAPrunerError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} describes nothing that can be built ({type(error).__name__}: {reason(error)}). {AGAIN}"
        ) from error


UNUSED_KEYS = (
    # Code, kernels and quantizers that would be fetched and run.
    *("auto_map", "attn_implementation", "experts_implementation", "quantization_config", "compression_config"),
    # The loader's own arguments decide these.
    *("dtype", "torch_dtype", "device_map", "transformers_version", "architectures"),
    # Labels of classifiers: one entry is made for each of `num_labels`.
    *("num_labels", "id2label", "label2id", "problem_type"),
)
"""The settings of transformers that mean nothing to a policy here, and are not passed on."""


def settings_for(config_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without the entries that this package does not read, at every level.

    Args:
        config_class: of transformers; names of its methods and private attributes are no settings.
        values: the content of the file.
    """

    def kept(name: Any) -> bool:
        is_setting = not str(name).startswith("_") and name not in UNUSED_KEYS
        return is_setting and not callable(getattr(config_class, str(name), None))

    return {
        name: settings_for(config_class, value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if kept(name)
    }


def refuse_quantized(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse weights that were saved quantized.

    Raises:
        CheckpointError: `values`, the content of `path`, say so.
    """
    if values.get("quantization_config") is not None:
        raise CheckpointError(
            f"{path} has a quantization_config: its weights were saved quantized, and such weights are not read. Give "
            "the checkpoint as it was before (OpenVLA's is quantized while it loads: load_policy(..., "
            "quantization='int4'))."
        )


def reason(error: BaseException) -> str:
    """Return the first line of an error, short enough for a sentence."""
    return shown((str(error).strip() or type(error).__name__).splitlines()[0], 300)


def shown(text: Any, most: int = 100) -> str:
    """Return untrusted text for a message: on one line, without control characters, and cut at `most` characters."""
    clean = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text)[: most + 1])
    return clean if len(clean) <= most else f"{clean[:most]}..."


def listed(names: Iterable[Any], most: int = 20, otherwise: str = "none") -> str:
    """Return names for a message: the first few in full."""
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(shown(name, 300) for name in found[:most]) + more if found else otherwise
