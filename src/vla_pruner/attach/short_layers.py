"""Everything that happens at a layer whose sequence is short: choose, gather, freeze, reuse, permute and cut. Every
wiring maps its model's calls onto this.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.attach.family import Family
from vla_pruner.attach.host import Host
from vla_pruner.attach.layout import in_each
from vla_pruner.attach.short_call import short_prompt, short_token
from vla_pruner.attach.shortening import restored
from vla_pruner.caches import buffer_width, cut_back, new_cache


@dataclass
class LayerInput:
    """The arguments of a decoder layer's call in the prompt, by names that hold for every model.

    Attributes:
        index: of the layer.
        layer: the layer itself.
        hidden: (B, n, D) hidden states.
        angles: rotations of the keys, tensors (B or 1, N, d) of the whole prompt, or (3, B or 1, N, d) for positions
            in time, height and width; the very object that the other layers of the call are given, if they share it.
        positions: (B or 1, N) position ids, if the layer is given any.
        mask: (B or 1, H or 1, N, W) bool or additive float, or None; shared like `angles`.
        causal: whether no mask means causal.
        cache: the call's cache, or None.
    """

    index: int
    layer: nn.Module
    hidden: Tensor
    angles: tuple[Tensor, ...]
    positions: Tensor | None
    mask: Tensor | None
    causal: bool
    cache: Any


class ShortLayers:
    """Makes the input of layers short from the pruning layer on, in prompts and in calls that read their cache.

    Args:
        host: decides which tokens stay.
        family: of the model; makes keys and values of frozen tokens.

    Attributes:
        layer: the first pruning layer.
    """

    def __init__(self, host: Host, family: Family) -> None:
        self._host = host
        self._family = family
        self.layer = host.method.layer
        self._shared: dict[Hashable, list[tuple[Any, Any]]] = {}
        self._scratch: Any = None
        self._frozen_positions: Any = None

    def forget(self) -> None:
        """Forget the shared inputs: a call of a decoder begins, or all is removed."""
        self._shared.clear()
        self._scratch = None

    def once(self, purpose: Hashable, source: Any, make: Callable[[], Any]) -> Any:
        """The result of `make`, made once per call of a decoder for each source object, since layers share most of
        their inputs.
        """
        known = self._shared.setdefault(purpose, [])
        for seen, made in known:
            if seen is source:
                return made
        made = make()
        known.append((source, made))
        return made

    # From layer 1 on: the layers' own calls are made short.

    def shorten(self, given: LayerInput) -> bool:
        """Make the input of a prompt's layer short, in place; returns whether anything changed."""
        host = self._host
        step = host.open_step()
        with host.timed():
            if given.index in host.stages:
                before = step.shortening_at(given.index - 1)
                chosen = host.choose(given.hidden, given.index)
                if chosen is not None and chosen is not before:
                    given.hidden = step.enter(chosen, given.hidden)
            short, stage = step.shortening_at(given.index), step.stage_at(given.index)
            if short is None:
                if host.reuse is None:
                    return False
                # A prompt that runs without a cache gets one: the next control step may reuse its content.
                given.cache = self._cache(given.cache)
                return True
            angles, positions, mask = given.angles, given.positions, given.mask
            if step.frozen_hidden is not None:
                given.cache = self._cache(given.cache)
                if host.reuse is not None and short.frozen is not None:
                    held = host.reuse.keys_values(given.index, short.frozen)
                else:
                    frozen = self.once(("frozen", stage), angles, lambda: _angles(short.frozen_rows, angles))
                    held = self._family.keys_values(given.layer, step.frozen_hidden, frozen)
                given.cache.update(*held, given.index)
            given.angles = self.once(("live", stage), angles, lambda: _angles(short.live_rows, angles))
            if positions is not None:
                given.positions = self.once(("live", stage), positions, lambda: short.live_rows(positions))
            width, causal = buffer_width(given.cache, given.index), given.causal
            given.mask = self.once(
                ("prompt's mask", stage, width), mask, lambda: short.prefill_mask(mask, causal, width)
            )
            return True

    def read(self, index: int, mask: Tensor | None, cache: Any) -> Tensor | None:
        """Return the mask (B, H or 1, Q, W) of a layer that reads a cache which may be short; None if nothing changes.

        Args:
            index: of the layer.
            mask: as it was made for the full length.
            cache: the call's cache.
        """
        step = self._host.step
        short = None if step is None else step.shortening_at(index)
        if step is None or short is None or mask is None:
            return None
        with self._host.timed():
            width = buffer_width(cache, index)
            purpose = ("reader's mask", step.stage_at(index), width)
            return self.once(purpose, mask, lambda: short.reader_mask(mask, width))

    def cut(self, index: int, cache: Any) -> None:
        """Cut a layer of the cache back to the prompt, before an expert reads it.

        The expert's own columns of the denoising step before are removed by its model, but to the length of the full
        layers (up to transformers 5.22, and by LeRobot), which leaves them in the shorter ones.
        """
        step = self._host.step
        short = None if step is None else step.shortening_at(index)
        if short is not None:
            cut_back(cache, index, short.prefix.shape[1])

    def leave_prompt(self, output: Any, cache: Any) -> Any:
        """A prompt's call came back: its output at the prompt's own length; None if nothing changes.

        Args:
            output: of the decoder.
            cache: that the prompt filled; None if it had none but that of this call.
        """
        step = self._host.open_step()
        if self._host.reuse is not None:
            self._host.reuse.keep(self._scratch or cache, step, self.layer)
        self.forget()
        return restored(output, step.shortenings.values()) if step.shortenings else None

    # At layer 0 nothing is left to gather later: the call of the decoder itself is made short.

    def short_prompt(self, given: dict[str, Any], inputs: Tensor) -> dict[str, Any] | None:
        """Arguments of a decoder's call that runs the prompt, for the tokens alone that are kept; None if all are.

        Args:
            given: the call's arguments by name.
            inputs: (B, N) ids or (B, N, D) embeddings.
        """
        host, decoder = self._host, self._family.decoder
        with host.timed():
            embeds = inputs if inputs.dim() == 3 else decoder.embed_tokens(inputs)
            host.see_embeddings(embeds)
            short = host.choose(embeds, 0)
            if short is None:
                return None
            if short.frozen is not None:
                frozen = short.frozen_rows(embeds)
                host.open_step().freeze(frozen)
                positions = given.get("position_ids")
                if positions is None:
                    positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
                self._frozen_positions = in_each(
                    lambda one: short.frozen_rows(one.expand(len(embeds), -1)), positions, 2
                )
            return short_prompt(given, embeds, short, decoder, self._family.backend != "sdpa")

    def short_token(self, given: dict[str, Any], past: int, device: torch.device) -> dict[str, Any] | None:
        """Return the arguments of a call that decodes a token after a prompt that was made short; None if it was not.

        Args:
            given: the call's arguments by name.
            past: positions before this one, dropped ones included.
            device: of the input.
        """
        short = self._host.open_step().shortening
        if short is None:
            return None
        self._family.check_short_token()
        with self._host.timed():
            return short_token(given, short, past, device)

    def freeze(self, index: int, layer: nn.Module, given: tuple[Tensor, ...], cache: Any) -> Any:
        """The cache of a layer of a prompt that was made short, to which frozen tokens offer their keys and values;
        None if nothing changes.

        Args:
            index: of the layer.
            layer: the layer itself.
            given: the rotations that the layer is given, the very object that other layers are given too.
            cache: the call's cache, or None.
        """
        frozen = self._host.open_step().frozen_hidden
        if frozen is None:
            return None
        with self._host.timed():
            cache = self._cache(cache)
            positions = self._frozen_positions
            # Layers that are given the same angles share those of the frozen tokens too.
            angles = self.once("frozen", given, lambda: self._family.angles(index, frozen, positions))
            cache.update(*self._family.keys_values(layer, frozen, angles), index)
        return cache

    def _cache(self, cache: Any) -> Any:
        """The call's cache, or one that lives for this call alone: frozen tokens offer keys and values through it."""
        if cache is not None:
            return cache
        if self._scratch is None:
            self._scratch = new_cache()
        return self._scratch


def _angles(function: Callable[[Tensor], Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return `function` of the rotations of keys; see `LayerInput.angles`."""
    return tuple(in_each(function, tensor, 3) for tensor in tensors)
