"""OpenVLA and OpenVLA-OFT with random weights, at a tiny or at the published size, if there is no checkpoint."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from transformers.initialization import no_init_weights

from vla_pruner.errors import UnsupportedModelError
from vla_pruner.models.openvla.configuration import OpenVLAConfig
from vla_pruner.models.openvla.heads import (
    DDIM,
    DiffusionActionHead,
    L1ActionHead,
    NoisyActionProjector,
    ProprioProjector,
)
from vla_pruner.models.openvla.network import OpenVLAForActionPrediction
from vla_pruner.models.openvla.oft import OpenVLAOFT
from vla_pruner.models.openvla.processing import PUBLISHED_IMAGE_CONFIG, OpenVLAProcessor
from vla_pruner.models.openvla.robots import camera_names
from vla_pruner.models.openvla.tokenizer import StandInTokenizer

ACTION_DIM, PROPRIO_DIM, CHUNK = 7, 8, 8
TINY: dict[str, Any] = {
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 32064,
    },
    "timm_model_ids": ["tiny_dinov2", "tiny_siglip"],
    "tiny_timm_args": {
        "tiny_dinov2": {
            "embed_dim": 48,
            "depth": 3,
            "num_heads": 4,
            "patch_size": 14,
            "reg_tokens": 4,
            "no_embed_class": True,
            "init_values": 1e-5,
        },
        "tiny_siglip": {
            "embed_dim": 64,
            "depth": 3,
            "num_heads": 4,
            "patch_size": 14,
            "mlp_ratio": 3.5,
            "class_token": False,
        },
    },
}
_LIMITS = {"q01": -0.5, "q99": 0.5, "min": -0.6, "max": 0.6, "mean": 0.0, "std": 0.2}


def random_openvla(
    size: Literal["tiny", "full"] = "tiny",
    oft: bool = False,
    head: Literal["l1", "diffusion"] | None = "l1",
    cameras: tuple[str, ...] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    seed: int = 0,
    denoising_steps: int = 4,
    **text: Any,
) -> OpenVLAForActionPrediction | OpenVLAOFT:
    """Make an untrained policy that sees and attends: `act` works, and its actions depend on image and words.

    Weights are drawn so that attention is peaked, every layer counts, and decoded tokens are action tokens. They are
    made on their final device, so the published size needs no more memory than the policy itself.

    Args:
        size: "tiny" (3 million weights), or "full": the published 7.5 billion.
        oft: OpenVLA-OFT for LIBERO, with a proprio projector, instead of OpenVLA.
        head: of OFT; None for discrete actions.
        cameras: names of the images; one for OpenVLA and two for OFT if None.
        device: the policy's device.
        dtype: of all weights.
        attn_implementation: of the language model.
        seed: of the weights, which depend on the device too.
        denoising_steps: of the diffusion head.
        text: changes to the language model's configuration, for instance `num_key_value_heads=2`.
    """
    if size not in ("tiny", "full"):
        raise UnsupportedModelError(f"size={size!r} was given; it is 'tiny' or 'full'.")
    settings = dict(TINY) if size == "tiny" else {}
    settings["text_config"] = {**settings.get("text_config", {}), **text}
    config = OpenVLAConfig(norm_stats=_statistics(), **settings)
    kind = OpenVLAOFT if oft else OpenVLAForActionPrediction
    with torch.device(device), no_init_weights():
        policy = kind._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        if isinstance(policy, OpenVLAOFT):
            _equip(policy, head, denoising_steps)
            for module in (policy.action_head, policy.proprio_projector, policy.noisy_action_projector):
                _ = module and module.to(dtype)
    policy.cameras = camera_names(2 if oft else 1, cameras)
    tokenizer = StandInTokenizer(config.text_config.vocab_size)
    policy.processor = OpenVLAProcessor(PUBLISHED_IMAGE_CONFIG, tokenizer, config.pad_token_id)
    _draw(policy, torch.Generator(device=torch.device(device)).manual_seed(seed))
    return policy.eval()


def _equip(policy: OpenVLAOFT, head: str | None, denoising_steps: int) -> None:
    width = policy.llm_dim
    if head == "l1":
        policy.action_head = L1ActionHead(width, width, ACTION_DIM)
    elif head == "diffusion":
        policy.action_head = DiffusionActionHead(width, width, ACTION_DIM)
        policy.noisy_action_projector = NoisyActionProjector(width)
        policy.ddim = DDIM(50, denoising_steps)
    elif head is not None:
        raise UnsupportedModelError(f"head={head!r} was given; it is 'l1', 'diffusion' or None.")
    policy.proprio_projector = ProprioProjector(PROPRIO_DIM, width)
    policy.chunk, policy.action_dim = CHUNK, ACTION_DIM


@torch.no_grad()
def _draw(policy: OpenVLAForActionPrediction, generator: torch.Generator) -> None:
    vocabulary = policy.action_vocabulary
    for name, weight in policy.named_parameters():
        if name.endswith("lm_head.weight"):
            # Only action tokens can win, by a margin that rounding does not close.
            weight.normal_(0.0, 0.15 / math.sqrt(policy.llm_dim), generator=generator)
            bins = weight[vocabulary - policy.config.n_action_bins : vocabulary]
            bins.normal_(0.0, 3.0 / math.sqrt(policy.llm_dim), generator=generator)
        elif name.endswith("scale_factor"):
            weight.uniform_(0.3, 0.8, generator=generator)
        elif name.endswith(("embed_tokens.weight", "pos_embed", "cls_token", "reg_token")):
            weight.normal_(0.0, 0.5, generator=generator)
        elif weight.dim() == 1:
            weight.normal_(0.0 if name.endswith("bias") else 1.0, 0.1, generator=generator)
        else:
            gain = 1.6 if ".qkv." in name or "q_proj" in name or "k_proj" in name else 1.0
            weight.normal_(0.0, gain / math.sqrt(weight[0].numel()), generator=generator)


def _statistics() -> dict[str, Any]:
    action = {name: [value] * ACTION_DIM for name, value in _LIMITS.items()}
    proprio = {name: [value] * PROPRIO_DIM for name, value in _LIMITS.items()}
    mask = [True] * (ACTION_DIM - 1) + [False]
    return {"random": {"action": {**action, "mask": mask}, "proprio": proprio}}
