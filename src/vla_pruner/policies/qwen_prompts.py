"""Prompts in Qwen-VL's form for policies with random weights, which have no tokenizer: images, then numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def pictured(config: Any, side: int, images: list[list[Tensor]], tails: list[list[int]]) -> dict[str, Tensor]:
    """Return a Qwen-VL's inputs for rows of images, each followed by its ids; padded on the left.

    Args:
        config: of the model.
        side: side in pixels to which images are resized: a multiple of a merged patch.
        images: (3, H, W) in [0, 1] each, as many in every row.
        tails: ids that follow the images, by row.

    Returns:
        input_ids and attention_mask (B, N), pixel_values (patches, values), image_grid_thw (images, 3).
    """
    vision = config.vision_config
    patch, merge = vision.patch_size, vision.spatial_merge_size
    grid = side // patch
    flat = [image.float()[None] for row in images for image in row]  # of sizes of their own
    seen = [nn.functional.interpolate(image, (side, side), mode="bilinear", antialias=True) for image in flat]
    resized = torch.cat(seen).clamp(0, 1)
    twice = (resized * 2 - 1)[:, None].expand(-1, vision.temporal_patch_size, -1, -1, -1)
    blocks = grid // merge
    cut = twice.unflatten(4, (blocks, merge, patch)).unflatten(3, (blocks, merge, patch))
    # The patches of a merge block are consecutive; each is (channels, time, rows, columns).
    pixels = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(len(flat) * grid * grid, -1)
    image = [config.vision_start_token_id, *[config.image_token_id] * blocks**2, config.vision_end_token_id]
    rows = [[1, *image * len(row), *tail] for row, tail in zip(images, tails, strict=True)]
    length = max(map(len, rows))
    ids = torch.tensor([[-1] * (length - len(row)) + row for row in rows], device="cpu")
    return {
        "input_ids": ids.clamp_min(0),
        "attention_mask": (ids >= 0).long(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, grid, grid]] * len(flat), device="cpu"),
    }
