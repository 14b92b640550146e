"""The policies that are benchmarked: published sizes with random weights made on the device, or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vla_pruner.benching.settings import BenchSettings
from vla_pruner.errors import OptionError, UnsupportedModelError
from vla_pruner.models.drawn import draw_weights
from vla_pruner.plugins import object_at
from vla_pruner.policies.loading import load_policy
from vla_pruner.policies.random import random_policy, tiny_pi0

_CAMERA_NAMES = ("image", "wrist_image", "side_image")


def build(settings: BenchSettings, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the policy, or the bare language model, that the settings name.

    Raises:
        UnsupportedModelError: the family does not offer the settings, or is not installed.
        CheckpointError: a checkpoint that cannot be read.
    """
    row = settings.row
    if row is None:
        return load_policy(settings.model, device, dtype, **settings.options)
    if row.bench is None or row.bench.build is None:
        return random_policy(row.name, settings.size, device, dtype, settings.seed)
    return object_at(row.bench.build, "function")(settings, device, dtype)


def reference(settings: BenchSettings, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the autoregressive reference policy: the weights that ship, or tiny ones that are drawn."""
    if settings.size == "tiny":
        return random_policy("reference", "tiny", device, dtype, settings.seed)
    return load_policy("reference:autoregressive", device, dtype)


def llama(settings: BenchSettings, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a Llama of the sizes that are named."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    size = settings.llama()
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    with torch.device(device), no_init_weights():
        model: Any = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    draw_weights(model, settings.seed)
    return model.eval()


def openvla(settings: BenchSettings, device: torch.device, dtype: torch.dtype) -> Any:
    """OpenVLA or OpenVLA-OFT."""
    from vla_pruner.models.openvla import random_openvla

    if settings.cameras is not None and settings.cameras > len(_CAMERA_NAMES):
        raise OptionError(f"--cameras is {settings.cameras}; OpenVLA has one to {len(_CAMERA_NAMES)}.")
    text: dict[str, Any] = {} if settings.layers is None else {"num_hidden_layers": settings.layers}
    return random_openvla(
        settings.size,  # type: ignore[arg-type]
        oft=settings.kind == "openvla-oft",
        cameras=None if settings.cameras is None else _CAMERA_NAMES[: settings.cameras],
        device=device,
        dtype=dtype,
        seed=settings.seed,
        **text,
    )


def pi0(settings: BenchSettings, device: torch.device, dtype: torch.dtype) -> Any:
    """pi0 of transformers."""
    from transformers import PI0Config

    from vla_pruner.models.openvla.tokenizer import StandInTokenizer
    from vla_pruner.policies.pi0 import TransformersPI0
    from vla_pruner.policies.pi0 import build as build_pi0

    sizes = PI0Config().to_dict() if settings.size == "full" else tiny_pi0()
    if settings.layers is not None:
        # The expert reads the decoder's cache layer by layer, so both have one depth.
        sizes["dit_config"]["num_hidden_layers"] = settings.layers
        sizes["vlm_config"]["text_config"]["num_hidden_layers"] = settings.layers
    config: Any = PI0Config(**sizes)
    module: Any = build_pi0(config, device, dtype)
    draw_weights(module, settings.seed)
    if settings.denoise_steps is not None:
        module.config.num_inference_steps = settings.denoise_steps
    tokenizer = StandInTokenizer(config.vlm_config.text_config.vocab_size)
    return TransformersPI0(module, _cameras(settings.cameras or 3), tokenizer)


def vlm(settings: BenchSettings, device: torch.device, dtype: torch.dtype) -> Any:
    """Build a vision-language model of transformers."""
    from vla_pruner.policies.vlm import CAMERAS, random_vlm

    cameras = CAMERAS if settings.cameras is None else _cameras(settings.cameras)
    return random_vlm(settings.kind, settings.size, device, dtype, settings.seed, settings.layers, cameras)


def lerobot(settings: BenchSettings, device: torch.device, dtype: torch.dtype) -> Any:
    """One of LeRobot's policies."""
    from vla_pruner.families.lerobot_common import check_version
    from vla_pruner.policies.lerobot_random import random_lerobot

    kind = settings.kind.removeprefix("lerobot-").replace("-", "_")
    check_version(kind)
    if dtype == torch.float16:
        raise UnsupportedModelError("--dtype is float16; LeRobot has its policies in float32 and bfloat16.")
    fields: dict[str, Any] = {}
    if settings.decode_tokens is not None:
        fields["max_decoding_steps"] = settings.decode_tokens
    if settings.denoise_steps is not None:
        fields["num_steps" if kind == "smolvla" else "num_inference_steps"] = settings.denoise_steps
    cameras = None if settings.cameras is None else _cameras(settings.cameras)
    return random_lerobot(kind, settings.size, device, dtype, settings.seed, settings.layers, cameras, **fields)


def molmoact2(settings: BenchSettings, device: torch.device, dtype: torch.dtype) -> Any:
    """Build LeRobot's MolmoAct2."""
    from vla_pruner.policies.molmoact2_random import random_molmoact2_policy

    return _denoising(random_molmoact2_policy, "num_inference_steps", settings, device, dtype)


def eo1(settings: BenchSettings, device: torch.device, dtype: torch.dtype) -> Any:
    """Build LeRobot's EO-1."""
    from vla_pruner.policies.eo1_random import random_eo1_policy

    return _denoising(random_eo1_policy, "num_denoise_steps", settings, device, dtype)


def _denoising(
    make: Callable[..., Any], steps: str, settings: BenchSettings, device: torch.device, dtype: torch.dtype
) -> Any:
    """Make a policy that denoises; `steps` names the field of its config that says how often."""
    cameras = None if settings.cameras is None else _cameras(settings.cameras)
    fields = {} if settings.denoise_steps is None else {steps: settings.denoise_steps}
    return make(settings.size, device, dtype, settings.seed, settings.layers, cameras, **fields)


def groot(settings: BenchSettings, device: torch.device, dtype: torch.dtype) -> Any:
    """Build LeRobot's GR00T N1.7."""
    from vla_pruner.policies.groot_random import random_groot_policy

    cameras = None if settings.cameras is None else _cameras(settings.cameras)
    policy: Any = random_groot_policy(settings.size, device, dtype, settings.seed, cameras)
    if settings.denoise_steps is not None:
        policy.module._groot_model.action_head.num_inference_timesteps = settings.denoise_steps
    return policy


def vla_jepa(settings: BenchSettings, device: torch.device, dtype: torch.dtype) -> Any:
    """Build LeRobot's VLA-JEPA."""
    from vla_pruner.policies.vla_jepa_random import random_vla_jepa_policy

    cameras = None if settings.cameras is None else _cameras(settings.cameras)
    return random_vla_jepa_policy(settings.size, device, dtype, settings.seed, cameras)


def _cameras(count: int) -> tuple[str, ...]:
    return tuple(f"camera{number}" for number in range(1, count + 1))
