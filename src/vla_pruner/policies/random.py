"""Policies with random weights, tiny or at their published size, for use without a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vla_pruner.checks import is_seed
from vla_pruner.errors import OptionError, UnsupportedModelError
from vla_pruner.models.drawn import draw_weights
from vla_pruner.plugins import object_at
from vla_pruner.policies.base import Policy
from vla_pruner.policies.options import as_dtype, usable_device
from vla_pruner.registry import random_names, row_named
from vla_pruner.versions import check_transformers

SIZES = ("tiny", "full")


def random_policy(
    name: str,
    size: str = "tiny",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
) -> Policy:
    """Make an untrained policy that sees and attends, directly on its device.

    Args:
        name: of a row of `vla_pruner.registry` with random weights, or of a family of another distribution.
        size: "tiny" (seconds on a CPU), or "full": the published size.
        device: of the policy.
        dtype: of its weights, or its name; None: float32.
        seed: of its weights, which depend on the device too.

    Raises:
        OptionError: torch has no such device here, the dtype is none of weights, or the seed is no int of 0 or more.
        UnsupportedModelError: another name or size, or a package that the family needs is not installed, or not in a
            version that was tested.
        PluginError: the family of another distribution cannot be used.
    """
    check_transformers()
    row = row_named(name)
    if row is None or row.random is None:
        raise UnsupportedModelError(f"{name!r} was given; with random weights there are {', '.join(random_names())}.")
    if size not in SIZES:
        raise UnsupportedModelError(f"size={size!r} was given; it is 'tiny' or 'full'.")
    if not is_seed(seed):
        raise OptionError(f"seed={seed!r} was given; it is an int of 0 or more, and below 2**32.")
    return object_at(row.random)(size, usable_device(device), as_dtype(dtype) or torch.float32, seed)


def random_reference(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """Make the autoregressive reference policy; arguments as of `random_policy`."""
    from vla_pruner.checkpoints.files import read_json
    from vla_pruner.models.reference import ReferenceConfig, ReferencePolicy
    from vla_pruner.models.reference.loading import SHIPPED_WEIGHTS

    config = ReferenceConfig.from_dict(read_json(SHIPPED_WEIGHTS / "config.json"))
    if size == "tiny":
        config = replace(
            config,
            image_size=64,
            vision_width=32,
            vision_layers=1,
            hidden_size=32,
            num_layers=6,
            num_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
        )
    with torch.device(device):
        policy = ReferencePolicy(config)
    policy.to(device=device, dtype=dtype).eval()
    draw_weights(policy, seed)
    with torch.no_grad():
        # Only action tokens are read; their logits need margins that rounding does not close.
        policy.language_model.lm_head.weight.mul_(3.0)
    return policy


def random_chunk(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """Make the two-camera reference policy; arguments as of `random_policy`."""
    from vla_pruner.models.chunk import ChunkConfig, ChunkPolicy
    from vla_pruner.models.reference.tokenizer import vocabulary
    from vla_pruner.simulators.metaworld import TASKS

    words = {"words": vocabulary(TASKS.values()), "tasks": tuple(TASKS.items())}
    config = ChunkConfig(hidden_size=192, num_layers=10, intermediate_size=512, **words)
    if size == "tiny":
        config = replace(
            config,
            image_size=64,
            vision_width=32,
            vision_layers=1,
            hidden_size=32,
            num_layers=6,
            intermediate_size=64,
        )
    with torch.device(device):
        policy = ChunkPolicy(config)
    policy.to(device=device, dtype=dtype).eval()
    draw_weights(policy, seed)
    generator = torch.Generator(policy.device).manual_seed(seed + 1)
    with torch.no_grad():
        # Without these the cameras' tokens, and the actions of a chunk, would be those of torch's own generator.
        for parameter in (policy.visual_position, policy.action_rows):
            parameter.normal_(std=0.5, generator=generator)
    return policy


def random_openvla_7b(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """Make an OpenVLA; arguments as of `random_policy`."""
    from vla_pruner.models.openvla import random_openvla

    return random_openvla(size, oft=False, device=device, dtype=dtype, seed=seed)  # type: ignore[arg-type]


def random_openvla_oft(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """Make an OpenVLA-OFT; arguments as of `random_policy`."""
    from vla_pruner.models.openvla import random_openvla

    return random_openvla(size, oft=True, device=device, dtype=dtype, seed=seed)  # type: ignore[arg-type]


def random_pi0(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """Make a pi0 of transformers; arguments as of `random_policy`."""
    from transformers import PI0Config

    from vla_pruner.models.openvla.tokenizer import StandInTokenizer
    from vla_pruner.policies.pi0 import CAMERAS, TransformersPI0, build

    config: Any = PI0Config() if size == "full" else PI0Config(**tiny_pi0())
    module = build(config, device, dtype)
    draw_weights(module, seed)
    cameras = CAMERAS if size == "full" else ("base", "wrist")
    return TransformersPI0(module, cameras, StandInTokenizer(config.vlm_config.text_config.vocab_size))


def tiny_pi0() -> dict[str, Any]:
    """Return the sizes of a pi0 that runs in seconds on a CPU."""
    gemma = {
        "model_type": "gemma",
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 512,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 112,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return {
        "vlm_config": {
            "model_type": "paligemma",
            "text_config": {**gemma, "hidden_size": 64, "intermediate_size": 128},
            "vision_config": vision,
            "projection_dim": 64,
            "image_token_index": 500,
        },
        "dit_config": {**gemma, "hidden_size": 32, "intermediate_size": 64},
        "chunk_size": 10,
        "num_inference_steps": 4,
    }
