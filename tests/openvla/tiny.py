"""Tiny checkpoints in the published layout, and golden inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from vla_pruner.models import openvla
from vla_pruner.models.openvla import OpenVLAOFT
from vla_pruner.models.openvla.processing import PUBLISHED_IMAGE_CONFIG

load_openvla: Any = openvla.load_openvla
"""Untyped, since each test expects one of the two policies."""
random_openvla: Any = openvla.random_openvla
HEADS = ("action_head", "proprio_projector", "noisy_action_projector")
OFT_PROPRIO = np.linspace(-0.4, 0.4, 8)


def weights_of(policy: Any) -> dict[str, torch.Tensor]:
    """Return the policy's weights as a published checkpoint holds them: without heads, with unused ones."""
    weights = {k: v.clone() for k, v in policy.state_dict().items() if not k.startswith(HEADS)}
    for name, tower in zip(("featurizer", "fused_featurizer"), policy.vision_towers, strict=True):
        size: Any = tower.size
        prefix = f"vision_backbone.{name}"
        first = {k: v for k, v in weights.items() if k.startswith(f"{prefix}.blocks.0.")}
        weights.update({k.replace(".blocks.0.", f".blocks.{size.depth - 1}."): v.clone() for k, v in first.items()})
        weights.update({f"{prefix}.norm.{part}": torch.ones(size.width) for part in ("weight", "bias")})
    weights["vision_backbone.fused_featurizer.attn_pool.latent"] = torch.ones(1, 1, 64)
    weights["vision_backbone.fused_featurizer.attn_pool.mlp.fc1.weight"] = torch.ones(224, 64)
    return weights


def write_checkpoint(
    folder: Path,
    policy: Any,
    weights: dict[str, torch.Tensor] | None = None,
    shards: int = 1,
    prefix: str = "module.",
) -> Path:
    """`policy` as a folder in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(policy.config.to_dict(), default=str))
    (folder / "preprocessor_config.json").write_text(json.dumps(PUBLISHED_IMAGE_CONFIG))
    weights = weights_of(policy) if weights is None else weights
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = sorted(weights)
        index = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = names[number::shards]
            save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(part, file))
        size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    if isinstance(policy, OpenVLAOFT):
        for name in HEADS:
            head = getattr(policy, name)
            if head is not None:
                state = {f"{prefix}{key}": value for key, value in head.state_dict().items()}
                torch.save(state, folder / f"{name}--5_checkpoint.pt")
        statistics = {"libero_tiny": policy.norm_stats["random"]}
        (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    return folder


def tiny_inputs(policy: Any, instruction: str = "pick up the cup", seed: int = 0) -> dict[str, Any]:
    """Return the arguments of `predict_action` of a random policy: one row, noise for its images."""
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in policy.cameras]
    ids, mask = policy.processor.tokenize([policy.processor.prompt(instruction)])
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": policy.processor.pixel_values(images)}
    if isinstance(policy, OpenVLAOFT):
        inputs["proprio"] = OFT_PROPRIO + 0.1 * seed
    return inputs


def padded(rows: list[torch.Tensor], side: str, pad: int = 32000) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts (1, T_i) of different lengths as one batch: ids and mask (B, max T)."""
    longest = max(row.shape[1] for row in rows)
    ids, mask = [], []
    for row in rows:
        gap = torch.full((1, longest - row.shape[1]), pad)
        parts = (row, gap) if side == "right" else (gap, row)
        ids.append(torch.cat(parts, dim=1))
        ones, zeros = torch.ones_like(row), torch.zeros_like(gap)
        mask.append(torch.cat((ones, zeros) if side == "right" else (zeros, ones), dim=1))
    return torch.cat(ids), torch.cat(mask)


__all__ = ["OFT_PROPRIO", "load_openvla", "padded", "random_openvla", "tiny_inputs", "weights_of", "write_checkpoint"]
