"""The common parts of families that are built on transformers' decoders."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vla_pruner.attach.encoder import Encoder
from vla_pruner.attach.family import Family
from vla_pruner.errors import OptionError, UnsupportedModelError
from vla_pruner.versions import check_transformers
from vla_pruner.wording import a_type

BACKENDS = ("sdpa", "eager")
MROPE_TYPES = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
"""Decoders whose positions are in time, height and width."""
DECODER_TYPES = ("llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3", "gemma3_text", *MROPE_TYPES)


class TransformersFamily(Family):
    """A family whose decoders are those of transformers, or have their parts: `self_attn` with projections, and
    `input_layernorm`.
    """

    def keys_values(
        self, layer: nn.Module, hidden: Tensor, position_embeddings: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        attention: Any = layer.self_attn
        normed = self.normed(layer, hidden)
        shape = (*hidden.shape[:-1], -1, attention.head_dim)
        key = attention.k_proj(normed).view(shape)
        if hasattr(attention, "k_norm"):
            key = attention.k_norm(key)
        value = attention.v_proj(normed).view(shape).transpose(1, 2)
        return self.rotated(attention, key.transpose(1, 2), position_embeddings), value

    def normed(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Return hidden states (B, F, D) as the projections of a layer get them."""
        norm: Any = layer.input_layernorm
        return norm(hidden)

    def rotated(self, attention: nn.Module, key: Tensor, position_embeddings: tuple[Tensor, ...]) -> Tensor:
        """Return keys (B, G, F, d) with their positions."""
        here = sys.modules[type(attention).__module__]
        if hasattr(here, "apply_multimodal_rotary_pos_emb"):  # Qwen2-VL and Qwen2.5-VL before transformers 5.6 or so
            config: Any = attention.config
            sections = config.rope_parameters["mrope_section"]
            return here.apply_multimodal_rotary_pos_emb(key, key, *position_embeddings, sections)[1]
        return here.apply_rotary_pos_emb(key, key, *position_embeddings)[1]

    def angles(self, index: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        config = self.decoder.config
        if config.model_type in MROPE_TYPES:
            # The first of four rows counts the text and makes masks.
            positions = positions[-3:] if positions.dim() == 3 else positions.expand(3, *positions.shape)
            return self.decoder.rotary_emb(hidden, positions)
        if config.model_type == "gemma3_text":
            return self.decoder.rotary_emb(hidden, positions, config.layer_types[index])
        return super().angles(index, hidden, positions)


def tiles(images: Tensor, tokens: int) -> Tensor:
    """Square images (B, 3, S, S) cut into as many square tiles as there are tokens, in raster order: (B, tokens, P)."""
    size = images.shape[-1] // math.isqrt(tokens)
    return nn.functional.unfold(images.float(), kernel_size=size, stride=size).transpose(1, 2)


def siglip_encoder(tower: Any, seeing: tuple[Any, str], config: Any, **options: Any) -> Encoder:
    """Return the parts of a SigLIP of transformers, which has no token besides the patches.

    Args:
        tower: `SiglipVisionModel`.
        seeing: as of `Encoder`.
        config: of the tower.
        **options: other attributes of `Encoder`.
    """
    patches = (config.image_size // config.patch_size) ** 2
    layers = getattr(tower, "vision_model", tower).encoder.layers  # one module less in newer versions
    return Encoder(tower, layers, config.patch_size, seeing, **{"patches": patches, **options})


def is_one_of(model: nn.Module, classes: Collection[tuple[str, str]]) -> bool:
    """Return True if the class of `model`, or one that it inherits from, is in `classes` by its module and name."""
    return any((kind.__module__, kind.__name__) in classes for kind in type(model).__mro__)


def check_cameras(cameras: Sequence[str]) -> tuple[str, ...]:
    """Return the cameras' names as a tuple.

    Raises:
        OptionError: `cameras` is not a sequence of distinct names.
    """
    names = () if isinstance(cameras, str) or not isinstance(cameras, Sequence) else tuple(cameras)
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise OptionError(f"cameras={cameras!r} was given; it is a sequence of distinct names, one a camera.")
    return names


def check_decoder(decoder: nn.Module, owner: nn.Module) -> nn.Module:
    """Return the decoder itself, if its type, its attention backend and the installed transformers are supported.

    Raises:
        UnsupportedModelError: saying what was found, what is supported and what to do.
    """
    check_transformers()
    config: Any = getattr(decoder, "config", None)
    name = getattr(config, "model_type", None)
    if not hasattr(decoder, "layers") or name not in DECODER_TYPES:
        raise UnsupportedModelError(
            f"{type(owner).__name__} has a decoder of type {name!r}; supported are {', '.join(DECODER_TYPES)} of "
            "transformers. See CONTRIBUTING.md on how a family is added."
        )
    backend = config._attn_implementation
    if backend not in BACKENDS:
        raise UnsupportedModelError(
            f"{type(owner).__name__} uses the attention backend {backend!r}; supported are {' and '.join(BACKENDS)}. "
            "Load the model with attn_implementation='sdpa'."
        )
    return decoder


def check_example(example: Mapping[str, Any], names: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return an example of a policy's call as a dict, by the names of its arguments.

    Raises:
        OptionError: an argument is missing or unknown.
    """
    if not isinstance(example, Mapping):
        raise OptionError(f"The example is {a_type(example)}; give a mapping with {', '.join(names)}.")
    known = (*names, *optional)
    unknown = [str(name) for name in example if name not in known]
    missing = [name for name in names if name not in example]
    if unknown or missing:
        told = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(unknown)}"] * bool(unknown)
        raise OptionError(f"The example {' and '.join(told)}; give {', '.join(known)}.")
    return dict(example)


def shape_of(value: Any) -> str:
    """Describe a value for an error message: a tensor by its shape, anything else by its type."""
    return f"of the shape {tuple(value.shape)}" if isinstance(value, Tensor) else a_type(value)
