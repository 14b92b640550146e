"""Vision-language models of transformers with random weights as policies, for audits and benchmarks.

From the images of all cameras and an instruction they decode seven tokens, each of which stands for a number. Real
checkpoints act through heads and code of their own: a method then attaches to the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_pruner.errors import ObservationError
from vla_pruner.models.drawn import draw_weights
from vla_pruner.models.openvla.tokenizer import StandInTokenizer
from vla_pruner.observations import check_images, check_instruction
from vla_pruner.policies.pi0 import prepare_image

ACTION_TOKENS = 7
CAMERAS = ("image", "wrist_image")
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
GLUED = ("paligemma",)
TILES = 5
"""Images that LLaVA-NeXT's tower encodes of one camera: the whole image, and its quarters at twice the resolution."""
MERGED = 2
"""Side, in patches, of the square that Qwen-VL merges into one token; it also repeats each image so often in time."""


@dataclass(frozen=True)
class Kind:
    """The names of a vision-language model's classes, and its sizes.

    Attributes:
        classes: the beginning of the classes' names.
        tiny, full: arguments of the configuration; "full" is the model in `published`.
        side: side of the square images in pixels, tiny and full.
        published: the checkpoint with the full sizes.
        attention: the implementation of attention, of those that transformers has for this model.
    """

    classes: str
    tiny: Mapping[str, Any]
    full: Mapping[str, Any]
    side: tuple[int, int]
    published: str
    attention: str = "sdpa"


_TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 14,
}
_TINY_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}
_ROPE = {"rope_type": "default", "mrope_section": [16, 24, 24]}
_QWEN_TEXT = {name: value for name, value in _TEXT.items() if name != "head_dim"}
_TINY_BLOCKS = {
    "depth": 4,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": MERGED,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
_TINY_QWEN_VISION = {**_TINY_BLOCKS, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
_QWEN_IDS = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_TINY_CLIP = {**_VISION, "model_type": "clip_vision_model", "projection_dim": 32}
_TINY_SIGLIP = {**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
_TINY_TILED = {
    "text_config": {**_TEXT, "model_type": "llama"},
    "vision_config": _VISION,
    "scale_factor": 2,
    "image_token_id": 500,
}
_TINY_GLUED = {"vision_config": _TINY_SIGLIP, "projection_dim": 64, "hidden_size": 64, "image_token_index": 500}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "vision_use_head": False,
}

KINDS = {
    "llava": Kind(
        "Llava",
        tiny={
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": _TINY_CLIP,
            "image_token_index": 500,
        },
        full={
            "text_config": {
                "model_type": "llama",
                "vocab_size": 32064,
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "max_position_embeddings": 4096,
                "pad_token_id": 0,
            },
            "vision_config": _CLIP,
            "image_token_index": 32000,
        },
        side=(112, 336),
        published="llava-hf/llava-1.5-7b-hf",
    ),
    "paligemma": Kind(
        "PaliGemma",
        tiny={**_TINY_GLUED, "text_config": {**_TEXT, "model_type": "gemma"}},
        full={
            "text_config": {
                "model_type": "gemma",
                "vocab_size": 257216,
                "hidden_size": 2048,
                "intermediate_size": 16384,
                "num_hidden_layers": 18,
                "num_attention_heads": 8,
                "num_key_value_heads": 1,
                "head_dim": 256,
            },
            "vision_config": _SIGLIP,
            "projection_dim": 2048,
            "hidden_size": 2048,
            "image_token_index": 257152,
        },
        side=(112, 224),
        published="google/paligemma-3b-pt-224",
    ),
    "smolvlm": Kind(
        "SmolVLM",
        tiny=_TINY_TILED,
        full={
            "text_config": {
                "model_type": "llama",
                "vocab_size": 49280,
                "hidden_size": 960,
                "intermediate_size": 2560,
                "num_hidden_layers": 32,
                "num_attention_heads": 15,
                "num_key_value_heads": 5,
                "head_dim": 64,
                "max_position_embeddings": 8192,
                "pad_token_id": 2,
            },
            "vision_config": {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "image_size": 512,
                "patch_size": 16,
            },
            "scale_factor": 4,
            "image_token_id": 49190,
        },
        side=(112, 512),
        published="HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    ),
    "qwen2.5-vl": Kind(
        "Qwen2_5_VL",
        tiny={
            "text_config": {**_QWEN_TEXT, "rope_parameters": _TINY_ROPE},
            "vision_config": {**_TINY_QWEN_VISION, "window_size": 56, "fullatt_block_indexes": [2]},
            **_QWEN_IDS,
        },
        full={
            "text_config": {
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 11008,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128000,
                "rope_parameters": {**_ROPE, "rope_theta": 1e6},
            },
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "out_hidden_size": 2048,
                "num_heads": 16,
                "patch_size": 14,
                "spatial_merge_size": MERGED,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "tokens_per_second": 2,
            },
            "tie_word_embeddings": True,
        },
        side=(112, 448),
        published="Qwen/Qwen2.5-VL-3B-Instruct",
    ),
    "qwen3-vl": Kind(
        "Qwen3VL",
        tiny={
            "text_config": {**_TEXT, "rope_parameters": {**_TINY_ROPE, "mrope_interleaved": True}},
            "vision_config": {
                **_TINY_QWEN_VISION,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1, 2],
            },
            **_QWEN_IDS,
        },
        full={
            "text_config": {
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "max_position_embeddings": 262144,
                "rope_parameters": {
                    **_ROPE,
                    "rope_theta": 5e6,
                    "mrope_section": [24, 20, 20],
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "out_hidden_size": 2048,
                "num_heads": 16,
                "patch_size": 16,
                "spatial_merge_size": MERGED,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [5, 11, 17],
            },
            "tie_word_embeddings": True,
        },
        side=(112, 448),
        published="Qwen/Qwen3-VL-2B-Instruct",
    ),
    "llava-next": Kind(
        "LlavaNext",
        tiny={
            "text_config": {**_TEXT, "model_type": "mistral"},
            "vision_config": _TINY_CLIP,
            "image_grid_pinpoints": [[224, 224]],
            "image_token_index": 500,
        },
        full={
            "text_config": {
                "model_type": "mistral",
                "vocab_size": 32064,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 32768,
                "sliding_window": None,
            },
            "vision_config": _CLIP,
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
            "image_token_index": 32000,
        },
        side=(224, 672),
        published="llava-hf/llava-v1.6-mistral-7b-hf",
    ),
    "internvl": Kind(
        "InternVL",
        tiny={
            "text_config": {**_QWEN_TEXT, "model_type": "qwen2"},
            "vision_config": {**_VISION, "image_size": [112, 112], "patch_size": [14, 14]},
            "image_seq_length": 16,
            "downsample_ratio": 0.5,
            "image_token_id": 500,
        },
        full={
            "text_config": {
                "model_type": "qwen2",
                "vocab_size": 151674,
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "max_position_embeddings": 32768,
            },
            "vision_config": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": [448, 448],
                "patch_size": [14, 14],
            },
            "image_seq_length": 256,
            "downsample_ratio": 0.5,
            "image_token_id": 151667,
        },
        side=(112, 448),
        published="OpenGVLab/InternVL3-1B-hf",
    ),
    "gemma3": Kind(
        "Gemma3",
        tiny={
            # Every second layer is a full one, or pruning would begin at layer 6, where this decoder ends.
            "text_config": {**_TEXT, "sliding_window": 4096, "sliding_window_pattern": 2},
            "vision_config": _TINY_SIGLIP,
            "mm_tokens_per_image": 16,
            "image_token_index": 500,
        },
        full={
            "text_config": {
                "vocab_size": 262208,
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "sliding_window": 1024,
                "max_position_embeddings": 131072,
            },
            "vision_config": {**_SIGLIP, "image_size": 896},
            "mm_tokens_per_image": 256,
            "image_token_index": 262144,
        },
        side=(112, 896),
        published="google/gemma-3-4b-it",
    ),
    "paligemma2": Kind(
        "PaliGemma",
        tiny={**_TINY_GLUED, "text_config": {**_TEXT, "model_type": "gemma2", "sliding_window": 4096}},
        full={
            "text_config": {
                "model_type": "gemma2",
                "vocab_size": 257216,
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "sliding_window": 4096,
            },
            "vision_config": _SIGLIP,
            "projection_dim": 2304,
            "hidden_size": 2304,
            "image_token_index": 257152,
        },
        side=(112, 224),
        published="google/paligemma2-3b-pt-224",
        attention="eager",
    ),
    "idefics3": Kind(
        "Idefics3",
        tiny=_TINY_TILED,
        full={
            "text_config": {
                "model_type": "llama",
                "vocab_size": 128259,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "pad_token_id": 128002,
            },
            "vision_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 364,
                "patch_size": 14,
            },
            "scale_factor": 2,
            "image_token_id": 128257,
        },
        side=(112, 364),
        published="HuggingFaceM4/Idefics3-8B-Llama3",
    ),
    "qwen2-vl": Kind(
        "Qwen2VL",
        tiny={
            "text_config": {**_QWEN_TEXT, "rope_parameters": _TINY_ROPE},
            "vision_config": {**_TINY_BLOCKS, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
            **_QWEN_IDS,
        },
        full={
            "text_config": {
                "vocab_size": 151936,
                "hidden_size": 1536,
                "intermediate_size": 8960,
                "num_hidden_layers": 28,
                "num_attention_heads": 12,
                "num_key_value_heads": 2,
                "max_position_embeddings": 32768,
                "rope_parameters": {**_ROPE, "rope_theta": 1e6},
            },
            "vision_config": {
                "depth": 32,
                "embed_dim": 1280,
                "hidden_size": 1536,
                "mlp_ratio": 4,
                "num_heads": 16,
                "patch_size": 14,
                "spatial_merge_size": MERGED,
            },
            "tie_word_embeddings": True,
        },
        side=(112, 448),
        published="Qwen/Qwen2-VL-2B-Instruct",
    ),
}
"""The models, by the names of their rows in `vla_pruner.registry`."""


class RandomVLM:
    """A policy around a vision-language model with random weights: `ACTION_TOKENS` decoded tokens are one action.

    Args:
        module: a `...ForConditionalGeneration` of transformers.
        side: side in pixels of the square images that the model takes.
        cameras: names of the images.
    """

    proprio_size = None

    def __init__(self, module: nn.Module, side: int, cameras: Sequence[str] = CAMERAS) -> None:
        self.module: Any = module
        self.side = side
        self.cameras = tuple(cameras)
        self.tokenizer = StandInTokenizer(module.config.get_text_config().vocab_size)  # type: ignore[union-attr]

    @property
    def vision_towers(self) -> tuple[nn.Module, ...]:
        """The vision encoder."""
        inner = self.module.model
        names = ("vision_tower", "visual", "vision_model")
        return tuple(getattr(inner, name) for name in names if hasattr(inner, name))

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens of one image."""
        config = self.module.config
        kind, patch = config.model_type, config.vision_config.patch_size
        if kind == "gemma3":
            return config.mm_tokens_per_image
        if kind == "internvl":
            return config.image_seq_length
        if kind == "llava_next":
            # The whole image, and its quarters as one image whose rows each end in a token of their own.
            across = self.side // patch
            return (across // 2) ** 2 + across * (across + 1)
        merged = MERGED if kind in QWEN else getattr(config, "scale_factor", 1)
        return (self.side // patch // merged) ** 2

    @property
    def tiles(self) -> int:
        """Images that the vision encoder sees of one camera."""
        return TILES if self.module.config.model_type == "llava_next" else 1

    @property
    def camera_tokens(self) -> tuple[int, ...]:
        """Visual tokens of each camera."""
        return (self.tokens_per_image,) * len(self.cameras)

    def reset(self) -> None:
        """Begin a new episode. The policy itself has no memory."""

    def act(self, images: Mapping[str, np.ndarray], instruction: str, proprio: np.ndarray | None = None) -> np.ndarray:
        """Run one control step: return an action (1, 7) float32 in [-1, 1].

        Args:
            images: (H, W, 3) uint8 of each camera; they are resized to fit and padded with black.
            instruction: the task in words.
            proprio: ignored; the model reads no state.

        Raises:
            ObservationError: images or instruction do not fit the policy.
        """
        check_images(images, self.cameras)
        check_instruction(instruction)
        if set(images) != set(self.cameras):
            raise ObservationError(
                f"The images are {', '.join(map(repr, images)) or 'none'}; this policy takes exactly "
                f"{', '.join(map(repr, self.cameras))}."
            )
        pixels = torch.stack([prepare_image(images[camera], self.side) for camera in self.cameras])[None]
        text = torch.tensor([self.tokenizer(instruction, add_special_tokens=False)["input_ids"]])
        tokens = self.decode(self.inputs(pixels, text), ACTION_TOKENS)
        return (2 * tokens.cpu().numpy() / self.tokenizer.vocab_size - 1).astype(np.float32)

    def inputs(self, pixels: Tensor, text: Tensor) -> dict[str, Tensor]:
        """Return the model's inputs.

        Args:
            pixels: (B, cameras, 3, side, side) float in [-1, 1].
            text: (B, T) ids.
        """
        ids = torch.cat([self._image_ids().expand(len(text), -1), text], dim=1)
        config = self.module.config
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        kind, flat = config.model_type, pixels.flatten(0, 1)
        if kind in QWEN:
            side = self.side // config.vision_config.patch_size
            given["pixel_values"] = _patches(flat, config.vision_config).flatten(0, 1)
            given["image_grid_thw"] = torch.tensor([[1, side, side]] * len(flat))
            given["mm_token_type_ids"] = (ids == config.image_token_id).int()
        elif kind in ("smolvlm", "idefics3"):
            given["pixel_values"] = pixels
            given["pixel_attention_mask"] = torch.ones(*pixels.shape[:2], *pixels.shape[3:], dtype=torch.int64)
        elif kind == "llava_next":
            given["pixel_values"] = _tiles(flat)
            given["image_sizes"] = torch.tensor([[self.side, self.side]] * len(flat))
        else:
            given["pixel_values"] = flat
        if kind in GLUED:
            given["token_type_ids"] = torch.zeros_like(ids)
        elif kind == "gemma3":
            given["token_type_ids"] = (ids == config.image_token_id).long()
        weight = self.module.get_input_embeddings().weight
        given["pixel_values"] = given["pixel_values"].to(weight.dtype)
        return {name: value.to(weight.device) for name, value in given.items()}

    def decode(self, given: dict[str, Tensor], tokens: int) -> Tensor:
        """Decode ids (B, tokens) greedily."""
        made = self.module.generate(
            **given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        return made[:, -tokens:]

    def _image_ids(self) -> Tensor:
        """Return the ids (1, n) before the text: the images and, except for `GLUED` models, BOS and a token on either
        side of each image.
        """
        config = self.module.config
        start, end = ([], []) if config.model_type in GLUED else ([2], [2])
        image = [*start, *[config.image_token_id] * self.tokens_per_image, *end]
        return torch.tensor([[*([] if config.model_type in GLUED else [1]), *image * len(self.cameras)]])


class RandomPaliGemma2(RandomVLM):
    """A `RandomVLM` around a PaliGemma 2, which transformers builds of the class of PaliGemma."""


def random_vlm(
    name: str,
    size: str,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    layers: int | None = None,
    cameras: Sequence[str] = CAMERAS,
) -> RandomVLM:
    """Make one of `KINDS` with random weights and `layers` layers in its decoder (None: as many as its size has).

    Other arguments as of `random_policy`.
    """
    import transformers
    from transformers.initialization import no_init_weights

    kind = KINDS[name]
    settings = dict(kind.full if size == "full" else kind.tiny)
    if layers is not None:
        settings["text_config"] = {**settings["text_config"], "num_hidden_layers": layers}
    config = getattr(transformers, f"{kind.classes}Config")(**settings)
    make = getattr(transformers, f"{kind.classes}ForConditionalGeneration")
    with torch.device(device), no_init_weights():
        module: Any = make._from_config(config, dtype=dtype, attn_implementation=kind.attention).eval()
    draw_weights(module, seed)
    policy = RandomPaliGemma2 if name == "paligemma2" else RandomVLM
    return policy(module, kind.side[size == "full"], cameras)


def random_llava(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> RandomVLM:
    """Make a LLaVA; arguments as of `random_policy`."""
    return random_vlm("llava", size, device, dtype, seed)


def random_paligemma(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> RandomVLM:
    """Make a PaliGemma; arguments as of `random_policy`."""
    return random_vlm("paligemma", size, device, dtype, seed)


def random_smolvlm(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> RandomVLM:
    """Make a SmolVLM; arguments as of `random_policy`."""
    return random_vlm("smolvlm", size, device, dtype, seed)


def random_qwen2_5_vl(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> RandomVLM:
    """Make a Qwen2.5-VL; arguments as of `random_policy`."""
    return random_vlm("qwen2.5-vl", size, device, dtype, seed)


def random_qwen3_vl(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> RandomVLM:
    """Make a Qwen3-VL; arguments as of `random_policy`."""
    return random_vlm("qwen3-vl", size, device, dtype, seed)


def random_llava_next(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> RandomVLM:
    """Make a LLaVA-NeXT; arguments as of `random_policy`."""
    return random_vlm("llava-next", size, device, dtype, seed)


def random_internvl(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> RandomVLM:
    """Make an InternVL; arguments as of `random_policy`."""
    return random_vlm("internvl", size, device, dtype, seed)


def random_gemma3(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> RandomVLM:
    """Make a Gemma 3; arguments as of `random_policy`."""
    return random_vlm("gemma3", size, device, dtype, seed)


def random_paligemma2(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> RandomVLM:
    """Make a PaliGemma 2; arguments as of `random_policy`."""
    return random_vlm("paligemma2", size, device, dtype, seed)


def random_idefics3(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> RandomVLM:
    """Make an Idefics3; arguments as of `random_policy`."""
    return random_vlm("idefics3", size, device, dtype, seed)


def random_qwen2_vl(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> RandomVLM:
    """Make a Qwen2-VL; arguments as of `random_policy`."""
    return random_vlm("qwen2-vl", size, device, dtype, seed)


def _tiles(images: Tensor) -> Tensor:
    """Return (n, `TILES`, 3, S/2, S/2) of images (n, 3, S, S): the whole image, and its quarters by rows."""
    half = images.shape[-1] // 2
    whole = torch.nn.functional.avg_pool2d(images, 2)
    quarters = images.unflatten(3, (2, half)).unflatten(2, (2, half)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return torch.cat([whole[:, None], quarters], dim=1)


def _patches(images: Tensor, vision: Any) -> Tensor:
    """Cut images (n, 3, S, S) into patches (n, patches, 3 x time x P x P) for Qwen-VL, a token's patches together."""
    patch, merge, time = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    side = images.shape[-1] // patch // merge
    cut = images.reshape(len(images), 3, side, merge, patch, side, merge, patch)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, time, -1, -1)
    return cut.reshape(len(images), (side * merge) ** 2, -1)
