"""FLOPs of a control step: formulas for any decoder, and a counter of a call's real ones.

Every table of the project takes its FLOPs from here. Conventions: a multiply-add is 2 FLOPs; attention between q
queries and n keys costs the full rectangle 4 q n d_q (scores and weighted sum), masked or not, because that is what
dense kernels compute; norms, rotary embeddings, softmax and activations are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from vla_pruner.fate import Fate


@dataclass(frozen=True)
class Flops:
    """FLOPs, split into a part that grows linearly with the sequence and one that grows with its square."""

    linear: float = 0.0
    quadratic: float = 0.0

    @property
    def total(self) -> float:
        return self.linear + self.quadratic

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.quadratic + other.quadratic)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.linear * times, self.quadratic * times)

    __rmul__ = __mul__


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder-only transformer that decide its cost."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int = 0
    """Rows of the output head; 0 leaves the head out."""
    matrices: int = 3
    """Matrices of the feed-forward block: 3 gated (Llama, Gemma, Qwen), 2 plain."""

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """Return the shape of a transformers configuration of the Llama kind (Llama, Mistral, Gemma, Qwen2, Qwen3)."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            feed_forward=config.intermediate_size,
            vocabulary=config.vocab_size,
        )

    def layer(self, live: int, keys: int, frozen: int = 0) -> Flops:
        """Return the FLOPs of one layer.

        Args:
            live: tokens that pass through the whole layer (they query, and have an MLP).
            keys: tokens that each of them attends to.
            frozen: tokens of which only keys and values are computed.
        """
        queries_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        key_and_value = 2 * 2 * self.hidden * kv_width
        query_and_output = 2 * 2 * self.hidden * queries_width
        feed_forward = 2 * self.matrices * self.hidden * self.feed_forward
        linear = live * (query_and_output + key_and_value + feed_forward) + frozen * key_and_value
        return Flops(linear, 4 * live * keys * queries_width)


@dataclass(frozen=True)
class StepShape:
    """The inputs of the decoder in one control step of an autoregressive policy."""

    visual: int
    """M, visual tokens."""
    other: int
    """N, the other tokens of the prompt."""
    actions: int
    """N', action tokens; the prefill emits the first."""


def decoder_flops(
    decoder: DecoderShape,
    step: StepShape,
    kept: int | None = None,
    layer: int = 0,
    pruned: Literal["drop", "freeze", "reuse"] | Fate = Fate.DROP,
    then: Sequence[tuple[int, int]] = (),
) -> Flops:
    """Return the FLOPs of the decoder in one control step, prefill and decode: the floor, without choosing the tokens.

    Args:
        kept: k, visual tokens kept; None does not prune.
        layer: K, layers 0..K-1 run on every token.
        pruned: the fate of the others (dropped; frozen: their keys and values are still computed; or reused: they have
            those of the last control step, which cost nothing).
        then: if pruning is progressive, the later pruning layers and the visual tokens kept from each on.

    Raises:
        ValueError: `kept`, `layer` or `then` is outside of the range that the shapes allow.
        BudgetError: `pruned` is no fate.
    """
    flops, fate = Flops(), Fate.of(pruned)
    for visual in visual_tokens_at(decoder.layers, step.visual, kept, layer, then):
        live = visual + step.other
        seen = step.visual + step.other if fate.readable else live
        flops += decoder.layer(live, seen, seen - live if fate.projects else 0)
        for position in range(1, step.actions):
            flops += decoder.layer(1, seen + position)
    return flops + Flops(linear=2 * decoder.hidden * decoder.vocabulary * step.actions)


def visual_tokens_at(
    layers: int, visual: int, kept: int | None, layer: int, then: Sequence[tuple[int, int]] = ()
) -> list[int]:
    """Return the number of visual tokens that pass through each layer. Arguments as in `decoder_flops`.

    Raises:
        ValueError: a number is outside of the range that the shapes allow.
    """
    found, first = [visual] * layers, 0
    for start, count in ((layer, visual if kept is None else kept), *then):
        most = found[first] if first < layers else visual
        if not 0 < count <= most:
            raise ValueError(f"kept is {count}; it must lie between 1 and the {most} visual tokens.")
        if not first <= start <= layers:
            raise ValueError(f"layer is {start}; it must lie between {first} and the decoder's {layers} layers.")
        found[start:] = [count] * (layers - start)
        first = start
    return found


@dataclass(frozen=True)
class Tower:
    """A vision encoder: its sizes, the tokens of one image, the number of its layers that run, the FLOPs of cutting one
    image into patches, and the number of tokens that each token attends to (`window`; None: all of them).
    """

    shape: DecoderShape
    tokens: int
    layers: int
    patching: float = 0.0
    window: int | None = None


@dataclass(frozen=True)
class Expert:
    """An expert that reads the prompt's keys and values: its sizes, the tokens of one pass, and the passes.

    Layers named in `cross` attend to the prompt alone, whose keys and values they project first.
    """

    shape: DecoderShape
    tokens: int
    passes: int
    cross: frozenset[int] = frozenset()

    def layer(self, index: int, prompt: int) -> Flops:
        """Return the FLOPs of one layer in one pass over a cache of `prompt` tokens."""
        if index not in self.cross:
            return self.shape.layer(self.tokens, prompt + self.tokens)
        width = self.shape.kv_heads * self.shape.head_dim
        own = self.shape.layer(0, 0, frozen=self.tokens)
        whole = self.shape.layer(self.tokens, prompt)
        return Flops(whole.linear - own.linear + 2 * 2 * prompt * width * width, whole.quadratic)

    def once(self, index: int, prompt: int) -> Flops:
        """Return the FLOPs that one layer spends on a cache of `prompt` tokens once per control step, before all
        passes.
        """
        return Flops()

    def weights(self) -> float:
        """Return the number of weights in the matrices that one pass reads."""
        return self.shape.layers * replace(self, tokens=1).layer(0, 0).linear / 2


@dataclass(frozen=True)
class ContextExpert(Expert):
    """An expert whose layers attend to their own rows and then, in a second attention, to the prompt. Once per control
    step, each layer projects the keys and values that the decoder cached.

    Attributes:
        context: width of the cached keys, and of the cached values.
    """

    context: int = 0

    def layer(self, index: int, prompt: int) -> Flops:
        width = self.shape.heads * self.shape.head_dim
        second = Flops(2 * 2 * self.tokens * self.shape.hidden * width, 4 * self.tokens * prompt * width)
        return self.shape.layer(self.tokens, self.tokens) + second

    def once(self, index: int, prompt: int) -> Flops:
        return Flops(2 * 2 * prompt * self.context * self.shape.heads * self.shape.head_dim)


@dataclass(frozen=True)
class FeatureExpert(Expert):
    """An expert that reads the output of the decoder's last layer. Layers of self-attention run over it once per
    control step; then, in each pass, every second block attends to it and projects it anew, and the other blocks attend
    to their own rows.

    Attributes:
        last: index of the decoder's last layer.
        context: width of that layer's output.
        before: the layers of self-attention; None: there are none.
    """

    last: int = 0
    context: int = 0
    before: DecoderShape | None = None

    def layer(self, index: int, prompt: int) -> Flops:
        if index != self.last:
            return Flops()
        width = self.shape.heads * self.shape.head_dim
        own = self.shape.layer(self.tokens, self.tokens)
        projected = self.shape.layer(0, 0, frozen=self.tokens).linear
        reading = Flops(
            own.linear - projected + 2 * 2 * prompt * self.context * width, 4 * self.tokens * prompt * width
        )
        return (self.shape.layers // 2) * (own + reading)

    def once(self, index: int, prompt: int) -> Flops:
        if index != self.last or self.before is None:
            return Flops()
        return self.before.layers * self.before.layer(prompt, prompt)

    def weights(self) -> float:
        own, projected = self.shape.layer(1, 0).linear / 2, self.shape.layer(0, 0, frozen=1).linear / 2
        width = self.shape.heads * self.shape.head_dim
        return self.shape.layers // 2 * (2 * own - projected + 2 * self.context * width)


@dataclass(frozen=True)
class ControlStep:
    """The parts of a policy that run in one control step, for any of the three ways to act.

    Attributes:
        decoder: the decoder whose layers are shortened.
        visual: visual tokens of all cameras.
        other: other tokens of the prompt.
        towers: vision encoders; each sees the image of every camera.
        cameras: images.
        projector: FLOPs of the projector for one visual token.
        decoded: tokens decoded after the prompt, one pass each (so one less than tokens that act).
        expert: an expert that reads the prompt's cache.
        prompt_passes: how often the prompt runs (a diffusion head around the decoder: once a denoising step).
    """

    decoder: DecoderShape
    visual: int
    other: int
    towers: tuple[Tower, ...] = ()
    cameras: int = 1
    projector: float = 0.0
    decoded: int = 0
    expert: Expert | None = None
    prompt_passes: int = 1

    def flops(
        self,
        kept: int | None = None,
        layer: int = 0,
        pruned: str = "drop",
        then: Sequence[tuple[int, int]] = (),
        encoded: int | None = None,
    ) -> dict[str, float]:
        """Return the FLOPs of the parts by name. Other arguments and errors as in `decoder_flops`.

        Args:
            encoded: patches of each image that run through the layers of the towers, in a control step that reuses the
                others; they attend to all. None: all of them. Towers that attend in windows cannot reuse any.

        Raises:
            ValueError: `encoded` is no number of a tower's patches.
        """
        shape, fate = self.decoder, Fate.of(pruned)
        vision = Flops(self.projector * self.visual)
        for tower in self.towers:
            live = tower.tokens if encoded is None else encoded
            if not 0 < live <= tower.tokens:
                raise ValueError(
                    f"encoded is {encoded}; it must lie between 1 and the {tower.tokens} tokens of a tower."
                )
            image = tower.layers * tower.shape.layer(live, tower.window or tower.tokens)
            image += Flops(tower.patching)
            vision += self.cameras * image
        head = Flops(2 * shape.hidden * shape.vocabulary)
        before, deep, after = Flops(), head, self.decoded * head
        for index, (live, seen) in enumerate(self._lengths(kept, layer, pruned, then)):
            one = shape.layer(live, seen, seen - live if fate.projects else 0)
            if index < layer:
                before += one
            else:
                deep += one
            for position in range(1, self.decoded + 1):
                after += shape.layer(1, seen + position)
            if self.expert is not None:
                after += self.expert.passes * self.expert.layer(index, seen) + self.expert.once(index, seen)
        return {
            "vision": vision.total,
            "prompt, layers before": (self.prompt_passes * before).total,
            "prompt, layers pruned": (self.prompt_passes * deep).total,
            "decoding or denoising": after.total,
        }

    def cache_elements(
        self, kept: int | None = None, layer: int = 0, pruned: str = "drop", then: Sequence[tuple[int, int]] = ()
    ) -> dict[str, int]:
        """Return the numbers of elements in the key-value cache that the prompt writes, and that all passes after it
        read together.
        """
        shape = self.decoder
        cached = sum(seen for _, seen in self._lengths(kept, layer, pruned, then))
        width = 2 * shape.kv_heads * shape.head_dim
        passes = self.decoded + (0 if self.expert is None else self.expert.passes)
        tails = shape.layers * self.decoded * (self.decoded - 1) // 2
        return {"written": width * cached, "read": width * (passes * cached + tails)}

    def _lengths(
        self, kept: int | None, layer: int, pruned: str, then: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Return for each layer the tokens that pass through it and those that can be attended to there."""
        found, fate = [], Fate.of(pruned)
        for visual in visual_tokens_at(self.decoder.layers, self.visual, kept, layer, then):
            live = visual + self.other
            found.append((live, self.visual + self.other if fate.readable else live))
        return found


def count_flops(call: Callable[[], Any]) -> float:
    """Return the FLOPs that `call` really computes (matrix products, convolutions, attention), by torch's dispatcher.

    Unlike the formulas this sees everything: the vision encoder, scoring and selecting, and waste.
    """
    with flop_reading() as read:
        call()
        return read()


@contextmanager
def flop_reading() -> Iterator[Callable[[], float]]:
    """Yield a function that returns the FLOPs computed since the context was entered; see `count_flops`."""
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten
    mapping = {aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter:
        yield lambda: float(counter.get_total_flops())


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of the CPU's fused attention, which torch's counter does not know; shapes are (B, heads, tokens,
    D).
    """
    B, heads, queries, width = query
    keys, value_width = key[-2], value[-1]
    return 2 * B * heads * queries * keys * (width + value_width)
