"""Keys and values that cross control steps: those that a prompt left in the caches, and the likeness of the images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vla_pruner.anatomy import layers_of as decoder_layers
from vla_pruner.anatomy import norm_of
from vla_pruner.attach.adapters import Adapters
from vla_pruner.attach.arithmetic import autocast_on, own_arithmetic
from vla_pruner.attach.family import Family
from vla_pruner.attach.layout import Layout
from vla_pruner.attach.stages import Stage
from vla_pruner.caches import columns_of, layers_of
from vla_pruner.errors import SessionError, UnsupportedModelError

if TYPE_CHECKING:
    from vla_pruner.attach.control_step import ControlStep


@dataclass
class Held:
    """The images, keys and values that one control step leaves to the next.

    Attributes:
        pixels: (B, M, P) float32, the pixels that each visual token covers.
        keys, values: (B, G, S, d) by layer, as the prompt left them in the cache.
        places: (B, N) int64 by layer, the column of each prompt position in these.
        like: types, device and adapters of the decoder; keys and values of others do not fit.
    """

    pixels: Tensor
    like: tuple[Any, ...]
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    places: dict[int, Tensor] = field(default_factory=dict)


class Reuse:
    """Holds the last control step's images, keys and values, for methods whose `pruned` is "reuse".

    They belong to the rows as they are: to reset rows or exchange their memory is to `forget`.

    Args:
        family: of the model; it must have `patches` of its visual tokens.

    Attributes:
        similarity: (B, M) float32, cosine similarity of the pixels that each visual token covers to those of the last
            control step; None if there is none.

    Raises:
        UnsupportedModelError: the family has none.
    """

    def __init__(self, family: Family) -> None:
        if family.eye is None:
            raise UnsupportedModelError(
                "The method compares the pixels under each visual token with those of the last control step, and it is "
                f"not known where {type(family).__name__} has them; supported are the reference policy, OpenVLA, and "
                "OpenVLA-OFT without a diffusion head. Others: choose a method that drops or freezes."
            )
        self._family = family
        self._eye = family.eye
        self._adapters = Adapters(decoder_layers(family.decoder), lambda: (family.decoder,))
        self._handle: Any = None
        self._pixels: Tensor | None = None
        self._last: Held | None = None
        self._now: Held | None = None
        self.similarity: Tensor | None = None

    def install(self) -> None:
        """Begin to look at the images."""
        self._handle = self._eye.register_forward_pre_hook(self._look)

    def remove(self) -> None:
        """Leave the model as it was."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self.forget()

    def forget(self) -> None:
        """Forget the last control step: the next one has none before it."""
        self._last = self._now = self.similarity = None

    def begin(self, layout: Layout, stage: Stage) -> bool:
        """Begin a control step, whose images were seen; return whether there is one before it that the method can reuse
        enough of.

        Args:
            layout: of the step.
            stage: the last one, which reuses most.

        Raises:
            SessionError: no images were seen.
        """
        pixels, self._pixels = self._pixels, None
        if pixels is None:
            raise SessionError(
                "The decoder was called with a prompt, but no images went through the vision encoder since the last "
                "one; call predict_action or act."
            )
        weight = norm_of(self._family.decoder).weight
        like = (weight.dtype, weight.device, autocast_on(weight.device), self._adapters.state())
        return self._begin(pixels, like, layout, stage)

    @own_arithmetic
    def _begin(self, pixels: Tensor, like: tuple[Any, ...], layout: Layout, stage: Stage) -> bool:
        if self._now is not None and self._now.keys:
            self._last = self._now
        self._now = Held(self._family.patches(pixels).float(), like)
        if self._last is None or self._last.like != like:
            self._last = self.similarity = None
            return False
        self.similarity = pixel_similarity(self._now.pixels, self._last.pixels)
        computed = sum(stage.budgets(layout.cameras, layout.absent, self._family.camera_tokens))
        return stage.method.reuses(self.similarity, layout.tokens - computed)

    def keys_values(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, G, F, d) of the prompt positions (B, F) at a layer in the last control step."""
        assert self._last is not None
        key, value = self._last.keys[layer], self._last.values[layer]
        columns = self._last.places[layer].gather(1, positions).to(key.device)[:, None, :, None]
        key, value = (part.gather(2, columns.expand(-1, part.shape[1], -1, part.shape[3])) for part in (key, value))
        return key, value

    def keep(self, cache: Any, step: ControlStep, first: int) -> None:
        """Keep the cache's content for the next step: the prompt went through the layers from `first` on."""
        assert self._now is not None
        whole = torch.arange(step.layout.length, device=step.layout.visual.device).expand(step.layout.rows, -1)
        places = {0: whole}
        for index in range(first, len(layers_of(cache))):
            stage, short = step.stage_at(index), step.shortening_at(index)
            if stage not in places:
                assert short is not None
                places[stage] = short.columns()
            key, value = columns_of(cache, index, step.layout.length)
            # With their graphs, each step would hold all steps of the episode before it.
            self._now.keys[index], self._now.values[index] = key.detach(), value.detach()
            self._now.places[index] = places[stage]

    def _look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._pixels = args[0]


def pixel_similarity(pixels: Tensor, before: Tensor) -> Tensor:
    """Return the cosine similarity (B, M) of each token's pixels (B, M, P) in two images; 1 where they are equal."""
    equal = (pixels == before).all(dim=-1)
    # Black pixels have no direction.
    return torch.where(equal, 1.0, torch.nn.functional.cosine_similarity(pixels, before, dim=-1))
