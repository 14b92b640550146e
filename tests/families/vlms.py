"""Whole vision-language models of transformers, tiny and random, with two images and two prompts of unequal length."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from tests.families.matrix import Case

IMAGE, BEGIN, END, VIDEO = 60, 62, 63, 61
LAYERS, DECODED = 6, 3
PADDING = (0, 2)
"""Positions that are padding on the left of each prompt."""
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": LAYERS,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}
CLASSES = {
    "paligemma": "PaliGemma",
    "paligemma2": "PaliGemma",
    "smolvlm": "SmolVLM",
    "idefics3": "Idefics3",
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "internvl": "InternVL",
    "gemma3": "Gemma3",
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
}
EACH = {"smolvlm": 4, "idefics3": 4, "internvl": 4, "gemma3": 4, "llava_next": 9 + 36 + 6}
"""Tokens of an image, if these are not 9 or, for Qwen's models, 6."""
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
GLUED = ("paligemma", "paligemma2")


def each(kind: str) -> int:
    """Return the visual tokens of one image."""
    return EACH.get(kind, 6 if kind in QWEN else 9)


def vlm(kind: str, backend: str | None = None, inner: bool = False, **text: Any) -> Any:
    """Build a model of one kind; `inner`: without its head."""
    family = CLASSES[kind]
    make = getattr(transformers, family + ("Model" if inner else "ForConditionalGeneration"))
    # Not every class of transformers supports every backend.
    backend = backend or ("eager" if kind == "paligemma2" else "sdpa")
    torch.manual_seed(0)
    model = make._from_config(config_of(kind, **text), attn_implementation=backend).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.6 if "embed_tokens" in name else 0.22, generator=generator)
    return model


def config_of(kind: str, **text: Any) -> Any:
    """Return the configuration of one kind; `text` changes fields of the decoder's."""
    make = getattr(transformers, CLASSES[kind] + "Config")
    texts: dict[str, Any] = {**TEXT, **text}
    image = {"image_token_id": IMAGE}
    old = {"image_token_index": IMAGE}
    if kind in GLUED:
        texts |= {"model_type": "gemma"} if kind == "paligemma" else {"model_type": "gemma2", "sliding_window": 512}
        vision = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
        return make(text_config=texts, vision_config=vision, projection_dim=32, hidden_size=32, **old)
    if kind in ("smolvlm", "idefics3"):
        vision = {**VISION, "image_size": 32}
        return make(text_config={**texts, "model_type": "llama"}, vision_config=vision, scale_factor=2, **image)
    if kind in ("llava", "llava_next"):
        vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}
        grids = {"image_grid_pinpoints": [[48, 48]]} if kind == "llava_next" else {"image_seq_length": 9}
        return make(text_config={**texts, "model_type": "llama"}, vision_config=vision, **grids, **old)
    if kind == "internvl":
        vision = {**VISION, "image_size": [32, 32], "patch_size": [8, 8]}
        texts = {**texts, "model_type": "qwen2"}
        return make(text_config=texts, vision_config=vision, image_seq_length=4, downsample_ratio=0.5, **image)
    if kind == "gemma3":
        kinds = ["sliding_attention", "full_attention"] * (LAYERS // 2)
        texts = {"layer_types": kinds, "sliding_window": 512, **texts}
        marks = {"boi_token_index": BEGIN, "eoi_token_index": END, "mm_tokens_per_image": 4}
        vision = {**VISION, "image_size": 32, "vision_use_head": False}
        return make(text_config=texts, vision_config=vision, **marks, **old)
    return make(text_config=_qwen_text(kind, texts), vision_config=_qwen_vision(kind), video_token_id=VIDEO, **image)


def _qwen_text(kind: str, texts: dict[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1e6}
    if kind == "qwen3_vl":
        return {**texts, "rope_parameters": {**rope, "mrope_interleaved": True}}
    return {**{name: value for name, value in texts.items() if name != "head_dim"}, "rope_parameters": rope}


def _qwen_vision(kind: str) -> dict[str, Any]:
    vision: dict[str, Any] = {"depth": 4, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "in_channels": 3}
    vision["temporal_patch_size"] = 2
    if kind == "qwen2_vl":
        return vision | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    vision |= {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64}
    if kind == "qwen3_vl":
        return vision | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
    return vision | {"window_size": 16, "fullatt_block_indexes": [2], "tokens_per_second": 2}


def prompt_ids(kind: str, images: int = 2) -> Tensor:
    """Return the ids (2, N) of two prompts; the second lacks two words, and is padded on the left."""
    around = ([], []) if kind in GLUED else ([BEGIN], [END])
    image = [*around[0], *[IMAGE] * each(kind), *around[1]]
    before = [] if kind in GLUED else [1]
    rows = [[0] * padding + before + image * images + list(range(10 + padding, 16)) for padding in PADDING]
    return torch.tensor(rows)


def inputs(kind: str, scene: int = 0, rows: slice = slice(0, 2), images: int = 2) -> dict[str, Any]:
    """Return the model's inputs for two robots, each with different images in every scene."""
    generator = torch.Generator().manual_seed(scene)

    def pixels(*shape: int) -> Tensor:
        return torch.randn(2, images, *shape, generator=generator)[rows]

    ids = prompt_ids(kind, images)[rows]
    mask = torch.ones(2, ids.shape[1], dtype=torch.int64)
    mask[1, : PADDING[1]] = 0
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask[rows]}
    count = len(ids) * images
    if kind in QWEN:
        given["pixel_values"] = pixels(24, 3 * 2 * 16).flatten(0, 2)
        given["image_grid_thw"] = torch.tensor([[1, 6, 4]] * count)
        given["mm_token_type_ids"] = (ids == IMAGE).int()
    elif kind in ("smolvlm", "idefics3"):
        given["pixel_values"] = pixels(3, 32, 32)
        given["pixel_attention_mask"] = torch.ones(len(ids), images, 32, 32, dtype=torch.int64)
    elif kind == "llava_next":
        given["pixel_values"] = pixels(5, 3, 24, 24).flatten(0, 1)
        given["image_sizes"] = torch.tensor([[48, 48]] * count)
    else:
        side = 32 if kind in ("internvl", "gemma3") else 24
        given["pixel_values"] = pixels(3, side, side).flatten(0, 1)
    if kind in GLUED:
        given["token_type_ids"] = torch.zeros_like(ids)
    elif kind == "gemma3":
        given["token_type_ids"] = (ids == IMAGE).long()
    return given


def logits(model: Any, given: dict[str, Any], tokens: int = 1 + DECODED, **options: Any) -> Tensor:
    """Return the logits (B, n, V) of the tokens that `generate` decodes greedily."""
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **options}
    made = model.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, **options)
    return torch.stack(made.logits, dim=1)


def case(kind: str, **options: Any) -> Case:
    """Return a case of the matrix."""

    def step(model: Any, scene: int, rows: slice) -> Tensor:
        return logits(model, inputs(kind, scene, rows), **options)

    return Case(f"vlm-{kind}", lambda: vlm(kind), step, first=2 if kind == "gemma3" else 1)
