"""Images and instructions as OpenVLA's and OpenVLA-OFT's networks take them, without torchvision and remote code.

Facts from the official processing_prismatic.py and the published preprocessor_config.json, checked against golden
outputs of that code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vla_pruner.checkpoints.files import described_by, is_file, read_json, shown
from vla_pruner.checkpoints.numbers import finite_row
from vla_pruner.errors import CheckpointError, ObservationError, UnsupportedModelError
from vla_pruner.models.openvla.configuration import IMAGE_SIZE, PUBLISHED_PAD
from vla_pruner.models.openvla.prompt import EMPTY_TOKEN
from vla_pruner.models.openvla.tokenizer import StandInTokenizer, Tokenizer, check_ids, read_tokenizer
from vla_pruner.observations import check_instruction
from vla_pruner.preprocessing.resize import bicubic_resize

if TYPE_CHECKING:
    from transformers import BatchFeature

__all__ = ["PUBLISHED_IMAGE_CONFIG", "OpenVLAProcessor", "StandInTokenizer"]

IMAGE_CONFIG_FILE = "preprocessor_config.json"
PUBLISHED_IMAGE_CONFIG: dict[str, Any] = {
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, 224, 224]] * 2,
    "tvf_resize_params": [{"antialias": True, "interpolation": 3, "max_size": None, "size": [224, 224]}] * 2,
    "tvf_crop_params": [{"output_size": [224, 224]}] * 2,
    "tvf_do_letterbox": False,
    "tvf_normalize_params": [
        {"inplace": False, "mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375]},
        {"inplace": False, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    ],
}
"""The settings that matter in the published checkpoints' file: DINOv2's constants are ImageNet's rounded to bfloat16.
"""

Image = Any
"""A PIL image, or an array or tensor of uint8."""


class OpenVLAProcessor:
    """Prepares the inputs of `predict_action`.

    Args:
        image_config: the content of preprocessor_config.json.
        tokenizer: of transformers, or any with its call and `bos_token_id`.
        pad_token_id: the model's (config.json): the token that `predict_action` takes for padding if it is given no
            mask. The tokenizer's own may be another one.
        vocab_size: the number of tokens of the model, to detect a tokenizer of another model; None: any.

    Attributes:
        size: (height, width) that images are brought to.
        tokenizer, pad_token_id: as given.

    Raises:
        UnsupportedModelError: the configuration asks for another treatment of images than plain bicubic resizing.
        CheckpointError: it is incomplete.
    """

    def __init__(
        self,
        image_config: Mapping[str, Any],
        tokenizer: Tokenizer,
        pad_token_id: int = PUBLISHED_PAD,
        vocab_size: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.pad_token_id = pad_token_id
        self.size = _size(image_config)
        self._mean, self._std = _constants(image_config)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        tokenizer: Tokenizer | None = None,
        pad_token_id: int = PUBLISHED_PAD,
        vocab_size: int | None = None,
    ) -> OpenVLAProcessor:
        """Return the processor of a checkpoint folder.

        Args:
            folder: with preprocessor_config.json, and tokenizer.json or tokenizer.model.
            tokenizer: instead of the folder's.
            pad_token_id, vocab_size: as in the constructor.

        Raises:
            CheckpointError: a file is missing or damaged; the message names it.
            UnsupportedModelError: as the constructor.
        """
        path = Path(folder) / IMAGE_CONFIG_FILE
        if not is_file(path):
            raise CheckpointError(
                f"{folder} has no {IMAGE_CONFIG_FILE}, which says how images are prepared. Copy it there from the "
                "checkpoint that this one was trained from."
            )
        config = read_json(path)
        tokenizer = read_tokenizer(folder) if tokenizer is None else tokenizer
        with described_by(path):
            return cls(config, tokenizer, pad_token_id, vocab_size)

    def __call__(
        self, text: str | Sequence[str], images: Image | Sequence[Image], return_tensors: str = "pt"
    ) -> BatchFeature:
        """Prepare a batch of prompts with one image each, as the official processor does; token 29871 is not appended.

        For several cameras the official scripts call this for each and join `pixel_values` along the channels;
        `pixel_values` of this class takes all cameras at once.

        Args:
            text: one prompt or several; rows of different lengths are padded on the right.
            images: as many, each a PIL image or (H, W, 3) uint8; or one (B, H, W, 3).
            return_tensors: only "pt".

        Returns:
            `input_ids` and `attention_mask` (B, T) int64, and `pixel_values` (B, 6, 224, 224) float32; its
            `.to(device, dtype=...)` casts the images only.

        Raises:
            ObservationError: the numbers of prompts and images differ, or one of them is none.
        """
        from transformers import BatchFeature

        if return_tensors != "pt":
            raise ObservationError(f"return_tensors={return_tensors!r} was given; only 'pt' is supported.")
        prompts = list(text) if isinstance(text, (list, tuple)) else [text]
        if isinstance(images, (list, tuple)):
            pixels = torch.cat([self.pixel_values([image]) for image in images]) if images else torch.empty(0)
        else:
            pixels = self.pixel_values([images])
        if len(prompts) != len(pixels):
            raise ObservationError(
                f"There are {len(prompts)} prompts and {len(pixels)} images; give one image to each."
            )
        input_ids, attention_mask = self._padded([self._encode(prompt) for prompt in prompts])
        return BatchFeature({"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixels})

    def pixel_values(self, images: Sequence[Image]) -> Tensor:
        """Images of all cameras for the vision towers.

        Args:
            images: one entry for each camera, in the model's order: a PIL image, (H, W, 3) or (B, H, W, 3) uint8;
                all cameras for the same number of rows B.

        Returns:
            (B, 6 * cameras, 224, 224) float32: for each camera DINOv2's three channels, then SigLIP's.

        Raises:
            ObservationError: an entry is no such image, or their numbers of rows differ.
        """
        if not images:
            raise ObservationError("There are no images; give one for each camera.")
        cameras = [self._camera(image) for image in images]
        rows = [len(camera) for camera in cameras]
        if len(set(rows)) > 1:
            raise ObservationError(f"The cameras have {rows} images; each needs one for every row of the batch.")
        return torch.cat(cameras, dim=1)

    @staticmethod
    def prompt(instruction: str) -> str:
        """Return the text that the model was trained to complete; the instruction goes in as lower case.

        Raises:
            ObservationError: the instruction is no text, or has no words: the text around it is never without them.
        """
        check_instruction(instruction, "An instruction")
        if not instruction.strip():
            raise ObservationError("The instruction is empty; OpenVLA's prompt asks how to do what it says.")
        return f"In: What action should the robot take to {instruction.lower()}?\nOut:"

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids ready for `predict_action`: BOS first and token 29871 last.

        Args:
            prompts: B texts as `prompt` makes them.

        Returns:
            (B, T) int64 ids, padded on the right, and their (B, T) int64 mask, 1 for real tokens.

        Raises:
            ObservationError: one text was given in place of several, or an entry is no text.
        """
        if not isinstance(prompts, (list, tuple)):
            raise ObservationError(
                f"tokenize takes a list of prompts; found {type(prompts).__name__}. Put the one prompt in a list."
            )
        return self._padded([[*self._encode(prompt), EMPTY_TOKEN] for prompt in prompts])

    def _encode(self, prompt: Any) -> list[int]:
        check_instruction(prompt, "A prompt")
        # BOS is added here: whether a tokenizer adds it by itself depends on its file and transformers' version.
        ids = [self.tokenizer.bos_token_id, *self.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        if self._vocab_size is not None:
            check_ids(ids, self._vocab_size)
        return ids

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rows), default=0)
        ids = [row + [self.pad_token_id] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.int64)

    def _camera(self, image: Image) -> Tensor:
        """Return (B, 3 * towers, height, width) of one camera."""
        resized = np.stack([bicubic_resize(row, self.size) for row in _rows(image)])
        colours = torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 255
        towers = [(colours - mean) / std for mean, std in zip(self._mean, self._std, strict=True)]
        return torch.cat(towers, dim=1)


def _rows(image: Image) -> np.ndarray:
    """Return (B, H, W, 3) uint8 of one camera's images in any supported form."""
    if hasattr(image, "convert"):  # a PIL image, known without importing PIL
        image = np.asarray(image.convert("RGB"))
    elif isinstance(image, Tensor):
        image = image.detach().cpu().numpy() if image.dtype == torch.uint8 else image
    found = image[None] if isinstance(image, np.ndarray) and image.ndim == 3 else image
    if (
        not isinstance(found, np.ndarray)
        or found.dtype != np.uint8
        or found.ndim != 4
        or found.shape[-1] != 3
        or not found.size
    ):
        what = f"{image.dtype} {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
        raise ObservationError(
            f"An image is (height, width, 3) RGB, or (rows, height, width, 3), of uint8 from 0 to 255; found {what}. "
            "Convert colours from 0 to 1 with (255 * image).round(), and put channels last."
        )
    return found


def _size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return (height, width) of the one treatment that is supported."""
    supported = "Supported is the published checkpoints' 'resize-naive': bicubic with antialiasing to one square size."
    strategy = config.get("image_resize_strategy", "resize-naive")
    if strategy != "resize-naive" or config.get("tvf_do_letterbox"):
        raise UnsupportedModelError(f"The image_resize_strategy is {strategy!r} (letterbox or crop). {supported}")
    sizes = [tuple(size)[-2:] for size in _entry(config, "input_sizes")]
    resizes = config.get("tvf_resize_params") or [{"size": size} for size in sizes]
    crops = config.get("tvf_crop_params") or [{"output_size": size} for size in sizes]
    targets = {*sizes, *(_pair(item["size"]) for item in resizes), *(_pair(item["output_size"]) for item in crops)}
    kinds = {item.get("interpolation", "bicubic") for item in resizes} | set(config.get("interpolations", ()))
    if len(targets) != 1 or not kinds <= {3, "bicubic"} or not all(item.get("antialias", True) for item in resizes):
        raise UnsupportedModelError(
            f"Images would be resized to {sorted(targets)} with interpolation {sorted(map(str, kinds))}. {supported}"
        )
    target = targets.pop()
    if target != (IMAGE_SIZE, IMAGE_SIZE):
        raise UnsupportedModelError(
            f"Images would be resized to {shown(target)}, and the vision towers take {IMAGE_SIZE} x {IMAGE_SIZE}. "
            f"{supported}"
        )
    return IMAGE_SIZE, IMAGE_SIZE


def _constants(config: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and standard deviation of each tower, (3, 1, 1) float32."""
    towers = config.get("tvf_normalize_params")
    if towers:
        means, stds = ([tower[name] for tower in towers] for name in ("mean", "std"))
    else:
        # They are the values that training started from; if the file has tvf_normalize_params, those were applied.
        means, stds = _entry(config, "means"), _entry(config, "stds")
    count = len(_entry(config, "input_sizes"))
    if not len(means) == len(stds) == count or any(len(values) != 3 for values in (*means, *stds)):
        raise CheckpointError(
            f"The image configuration has means {means} and stds {stds} for {count} vision towers; each tower needs "
            "three of both. Download preprocessor_config.json again."
        )
    here = Path(IMAGE_CONFIG_FILE)
    mean, std = (
        [torch.from_numpy(finite_row(here, name, values)).float()[:, None, None] for values in rows]
        for name, rows in (("a mean of colours", means), ("a deviation of colours", stds))
    )
    if any((values <= 0).any() for values in std):
        raise CheckpointError(
            f"The image configuration has deviations {shown(stds)}; images are divided by them, so they must be above "
            "0. Download preprocessor_config.json again."
        )
    return mean, std


def _entry(config: Mapping[str, Any], name: str) -> Any:
    if not config.get(name):
        raise CheckpointError(
            f"The image configuration has no {name}; found {', '.join(config) or 'nothing'}. "
            "Download preprocessor_config.json again."
        )
    return config[name]


def _pair(size: int | Sequence[int]) -> tuple[int, ...]:
    """Return (height, width); a single number stays alone, since it means the shorter side."""
    return (size,) if isinstance(size, int) else tuple(size)
