"""Random weights under which attention is peaked and actions depend on the images.

With the usual small starts attention is uniform, and pruning would have no visible effect.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def draw_weights(module: nn.Module, seed: int) -> None:
    """Draw every matrix so that outputs are as large as inputs, queries and keys larger; biases and norms stay as they
    are made.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def draw(weight: Tensor, std: float) -> None:
        if weight.device not in generators:
            generators[weight.device] = torch.Generator(weight.device).manual_seed(seed)
        weight.normal_(std=std, generator=generators[weight.device])

    for name, part in module.named_modules():
        projection = getattr(part, "mm_input_projection_weight", None)
        if projection is not None:  # Gemma 3 multiplies by it from the right, and makes it of zeros
            draw(projection, 1 / math.sqrt(len(projection)))
        weight = getattr(part, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        if not isinstance(part, (nn.Linear, nn.Conv2d, nn.Embedding)):
            part_of_norm: Any = getattr(part, "reset_parameters", None)
            if part_of_norm is not None:
                part_of_norm()  # LayerNorm and GroupNorm of torch: ones and zeros
            elif weight.dim() == 1:
                # transformers' norms: Gemma's multiply by 1 + weight, the others by weight.
                weight.fill_(0.0 if "Gemma" in type(part).__name__ else 1.0)
            continue
        gain = 2.0 if name.endswith(("q_proj", "k_proj")) else 1.0
        draw(weight, gain / math.sqrt(weight[0].numel()))
        bias = getattr(part, "bias", None)
        if bias is not None:
            bias.zero_()
