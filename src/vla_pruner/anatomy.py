"""The parts of a policy's model, named by its family and read by timers, benchmarks and compilers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Anatomy:
    """The parts of a policy.

    Attributes:
        decoder: the decoder (`layers_of`, `norm_of`, `.config`) that reads the prompt.
        experts: decoders that read its cache, if there are any.
        cross_layers: layers of the experts that attend to the prompt alone, and not to their own rows.
        towers: vision encoders; each is given every camera's image once a control step.
        projectors: modules that bring vision features to the decoder's width.
        language_model: the module that calls the decoder and then `lm_head`, its head over the vocabulary; None: no
            tokens are decoded.
        expert_calls: owners and names of the methods that do all of the experts' computation; empty: the experts' own
            calls do.
        acting_rows: rows of each call of the decoder after the prompt's.
        patched: whether the towers take images that are already cut into patches, (B, images, patches, values) instead
            of (..., C, H, W).
        loop: the module whose `forward` runs the layers of decoder and expert itself, so that theirs never run; None:
            they are called as modules.
    """

    decoder: Any
    experts: tuple[Any, ...] = ()
    cross_layers: frozenset[int] = frozenset()
    towers: tuple[nn.Module, ...] = ()
    projectors: tuple[nn.Module, ...] = ()
    language_model: Any = None
    expert_calls: tuple[tuple[Any, str], ...] = ()
    acting_rows: int = 1
    patched: bool = False
    loop: Any = None

    @property
    def head(self) -> nn.Module | None:
        """The head over the vocabulary."""
        return None if self.language_model is None else self.language_model.lm_head


def layers_of(decoder: Any) -> Any:
    """Return the layers of a decoder or an expert: `layers`, as in transformers, or Molmo's `blocks`."""
    return decoder.layers if hasattr(decoder, "layers") else decoder.blocks


def norm_of(decoder: Any) -> Any:
    """Return the norm after the last layer of a decoder."""
    return decoder.norm if hasattr(decoder, "norm") else decoder.ln_f


def entry_of(layer: Any) -> Any:
    """Return the module from whose input a layer computes queries, keys and values: its first norm, or its attention
    if the layer normalises the attention's output instead.
    """
    if hasattr(layer, "input_layernorm"):
        return layer.input_layernorm
    return layer.self_attn if layer.config.norm_after else layer.attn_norm


def projection_of(layer: Any) -> Any:
    """Return the projection that computes the queries of a layer, alone or together with keys and values."""
    attention = layer.self_attn
    return attention.q_proj if hasattr(attention, "q_proj") else attention.att_proj
