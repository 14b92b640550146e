"""The safetensors files of a checkpoint folder, checked before anything is built: each fault names its file."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vla_pruner.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADVICE = "Download the checkpoint again."


def check_shards(folder: Path) -> None:
    """Whether the weights' files are all there, whole, and no more than belong together.

    Only their headers are read, which say how long a file must be.

    Args:
        folder: with model.safetensors, or with model.safetensors.index.json and the files that it names.

    Raises:
        CheckpointError: a file is missing, damaged, or of another checkpoint.
    """
    parts = sorted(file.name for file in folder.glob("model-*-of-*.safetensors"))
    index = folder / _INDEX
    if index.is_file():
        named = _named(index)
        if (folder / _SINGLE).is_file() and _SINGLE not in named:
            raise CheckpointError(
                f"{folder} has both {_SINGLE} and {_INDEX}, which names other files; which of them are its weights "
                "cannot be known. Move one of the two elsewhere."
            )
        missing = [name for name in named if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{index} names files that are missing: {', '.join(missing)}. {_ADVICE}")
        extra = [name for name in parts if name not in named]
        if extra:
            raise CheckpointError(
                f"{folder} has files of weights that {_INDEX} does not name: {', '.join(extra)}. They are of another "
                f"checkpoint, or the index is: move them elsewhere, or download the checkpoint again."
            )
    elif (folder / _SINGLE).is_file():
        named = [_SINGLE]
    elif parts:
        raise CheckpointError(f"{folder} has {', '.join(parts)}, but {_INDEX} is missing. {_ADVICE}")
    else:
        raise CheckpointError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}, so its weights are missing. {_ADVICE} Weights in other "
            "formats (*.bin, *.pt) have to be saved as safetensors first."
        )
    for name in named:
        _check_header(folder / name)


def _named(index: Path) -> list[str]:
    """Names of the files in an index."""
    try:
        names = json.loads(index.read_text())["weight_map"].values()
        return sorted({str(Path(name)) for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({type(error).__name__}: {error}). {_ADVICE}") from error


def _check_header(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        pointer = file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs")
        reason = "it is a pointer of git LFS; run `git lfs pull`" if pointer else str(error).splitlines()[0]
        raise CheckpointError(f"{file} is damaged ({reason}). {_ADVICE}") from error
