"""Hooks that make the layers from the pruning layer on short, in the prefill, in decode steps and in experts that
read the cache.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vla_pruner.attach.before import short_prompt, short_token
from vla_pruner.attach.caches import check_held, check_prompt_cache, filled
from vla_pruner.attach.family import Call, Family
from vla_pruner.attach.layout import Shortening, in_each, restored
from vla_pruner.caches import cache_in, cache_name, cache_of
from vla_pruner.errors import SessionError, UnsupportedModelError

if TYPE_CHECKING:
    from vla_pruner.attach.session import Session
    from vla_pruner.attach.step import Step


class Shortener:
    """Forward pre-hooks on a family's decoders; `remove` takes all of them away.

    Args:
        session: told when a call begins and asked what to keep.
        family: whose decoders are hooked.
        layer: the pruning layer.
    """

    def __init__(self, session: Session, family: Family, layer: int) -> None:
        self._session = session
        self._family = family
        self._layer = layer
        self._signature = inspect.signature(family.decoder.forward)
        self._backend = family.backend
        self._cache_name = cache_name(family.decoder.layers[0])
        self._handles: list[Any] = []
        self._length = 0
        self._prompt_cache: Any = None
        self._held: int | None = None
        self._memo: dict[str, list[tuple[Any, Any]]] = {}
        self._scratch: Any = None
        self._frozen_positions: Any = None

    def install(self) -> None:
        """Put the hooks in place.

        Raises:
            UnsupportedModelError: the pruning layer comes before masks are sized, or the decoder is compiled.
        """
        decoder = self._family.decoder
        if getattr(decoder, "_compiled_call_impl", None) is not None or hasattr(decoder, "_orig_mod"):
            raise UnsupportedModelError(
                "The decoder is compiled, so hooks on it would never run; attach before compiling."
            )
        self._check_caches_order(decoder)
        self._handles.append(decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
        self._handles.append(decoder.register_forward_hook(self._leave_decoder))
        self._handles.append(decoder.register_forward_hook(self._call_over, always_call=True))
        if self._layer:
            self._handles.append(decoder.layers[0].register_forward_pre_hook(self._enter_first, with_kwargs=True))
        self._hook_layers(decoder, self._shorten)
        for reader in self._family.readers:
            self._handles.append(reader.register_forward_pre_hook(self._enter_reader, with_kwargs=True))
            self._handles.append(reader.register_forward_hook(self._leave_reader))
            self._handles.append(reader.register_forward_hook(self._call_over, always_call=True))
            self._hook_layers(reader, self._read_transient)

    def remove(self) -> None:
        """Take every hook away."""
        for handle in reversed(self._handles):
            handle.remove()
        self._handles.clear()
        self._memo.clear()
        self._scratch = None

    def __deepcopy__(self, memo: Any) -> Any:
        # The copy would be pruned with no session to detach it.
        raise SessionError("A model with a session attached was copied or pickled; detach first.")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__deepcopy__(None)

    def _hook_layers(self, decoder: Any, hook: Callable[..., Any]) -> None:
        for index in range(self._layer, len(decoder.layers)):
            handle = decoder.layers[index].register_forward_pre_hook(partial(hook, index), with_kwargs=True)
            self._handles.append(handle)

    def _check_caches_order(self, decoder: Any) -> None:
        # Mask and position lengths are read from the first cache layer of each attention type, so these must stay full.
        if not self._layer:
            return  # All caches are short alike.
        types = getattr(decoder.config, "layer_types", None) or []
        first = max((types.index(kind) for kind in set(types)), default=0)
        if self._layer <= first:
            raise UnsupportedModelError(
                f"layer={self._layer} was given, but this model's first {types[first]!r} layer is layer {first}, and "
                f"masks are sized from it; give layer={first + 1} or more."
            )

    def _enter_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._session.whole:
            self._session.turn.begin_call()
        self._memo.clear()
        self._scratch = None
        given = kwargs
        if args:
            given = self._signature.bind_partial(*args, **kwargs).arguments
            given = {**given, **given.get("kwargs", {})}
        inputs = given.get("inputs_embeds")
        inputs = given.get("input_ids") if inputs is None else inputs
        assert inputs is not None
        call = Call(inputs.shape[1], given.get("attention_mask"), inputs.shape[0], inputs.device)
        with self._session.timed():
            prompt = self._session.open_call(call)
        self._length = call.length if prompt else self._length + call.length
        self._check_model()
        cache = cache_in(given)
        if prompt:
            check_prompt_cache(cache)
            self._remember_cache(cache)
        elif not self._same_cache(cache):
            raise SessionError("A decode call was given another cache than the prompt; steps cannot be interleaved.")
        elif not self._session.whole:
            check_held(cache, self._held)
        if self._layer:
            return None
        if prompt:
            return self._session.in_graph("shorten", self._shorten_prompt, inputs, given, inputs)
        return self._shorten_token(given, inputs)

    def _shorten_token(self, given: dict[str, Any], inputs: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a call that decodes a token after a prompt that was made short."""
        step = self._session.step
        assert step is not None
        if step.shortening is None:
            return None
        with self._session.timed():
            return (), short_token(given, step.shortening, self._length - 1, inputs.device)

    def _shorten_prompt(self, given: dict[str, Any], inputs: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the first layer there is nothing left to gather later: the call itself is made short."""
        step, decoder = self._session.step, self._family.decoder
        assert step is not None
        with self._session.timed():
            embeds = inputs if inputs.dim() == 3 else decoder.embed_tokens(inputs)
            self._session.see_embeddings(embeds)
            shortening = self._session.choose(embeds, 0)
            if shortening is None:
                return None
            short = short_prompt(given, embeds, shortening, decoder, self._backend != "sdpa")
            if shortening.frozen is not None:
                step.frozen_hidden = shortening.frozen_rows(embeds)
                positions = given.get("position_ids")
                if positions is None:
                    positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
                self._frozen_positions = in_each(
                    lambda one: shortening.frozen_rows(one.expand(len(embeds), -1)), positions, 2
                )
            return (), short

    def _check_model(self) -> None:
        config = self._family.decoder.config
        if config._attn_implementation != self._backend:
            raise SessionError(
                f"The attention backend was changed from {self._backend!r} to {config._attn_implementation!r} "
                "while a session is attached; detach, change it, and attach again."
            )
        window = getattr(config, "sliding_window", None)
        if window is not None and self._length >= window:
            raise UnsupportedModelError(
                f"The sequence has {self._length} positions, but this model's sliding window is {window}; a "
                "window that cuts the sequence is not supported."
            )

    def _enter_first(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open_step().prefilling:
            self._session.see_embeddings(_hidden(args, kwargs))

    def _open_step(self) -> Step:
        step = self._session.step
        if step is None:
            raise SessionError(
                "A layer of the decoder ran while no control step is open: it was called by itself, or the method was "
                "attached while a step ran in another thread. Run the whole policy, or detach first."
            )
        return step

    def _same_cache(self, cache: Any) -> bool:
        # Within one graph it can be no other.
        return self._session.whole or (self._prompt_cache is not None and cache is self._prompt_cache())

    def _remember_cache(self, cache: Any) -> None:
        if self._session.whole:
            return
        self._prompt_cache = None if cache is None else weakref.ref(cache)

    def _shorten(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a layer of the decoder from the pruning layer on."""
        step = self._open_step()
        if not step.prefilling:
            return self._read(index, module, args, kwargs) if self._layer else None
        if not self._layer:
            return self._freeze_at(index, module, args, kwargs)
        with self._session.timed():
            if index in self._session.stages:
                before = step.shortening_at(index - 1)
                hidden = _hidden(args, kwargs)
                shortening = self._session.choose(hidden, index)
                if shortening is not None and shortening is not before:
                    self._memo.clear()
                    live, step.frozen_hidden = shortening.enter(hidden, step.frozen_hidden)
                    args, kwargs = _with_hidden(args, kwargs, live)
            shortening = step.shortening_at(index)
            if shortening is None:
                # A prompt that runs without a cache gets one where the next control step may reuse what is in it.
                return (args, {**kwargs, self._cache_name: self._cache(kwargs)}) if self._session.reuse else None
            return args, self._short_arguments(index, module, kwargs, shortening, step.frozen_hidden)

    def _freeze_at(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a layer of a call that is short already: frozen tokens still offer keys and values."""
        step = self._session.step
        assert step is not None
        if step.frozen_hidden is None:
            return None
        with self._session.timed():
            cache, frozen, positions = self._cache(kwargs), step.frozen_hidden, self._frozen_positions
            # Layers that are given the same angles share those of the frozen tokens too.
            given = kwargs["position_embeddings"]
            angles = self._once("frozen", given, lambda: self._family.angles(index, frozen, positions))
            cache.update(*self._family.keys_values(module, frozen, angles), index)
        return args, {**kwargs, self._cache_name: cache}

    def _short_arguments(
        self, index: int, module: nn.Module, kwargs: dict[str, Any], shortening: Shortening, frozen: Tensor | None
    ) -> dict[str, Any]:
        rotary = kwargs["position_embeddings"]
        short = dict(kwargs)
        short["position_embeddings"] = self._once("live", rotary, lambda: _angles(shortening.live_rows, rotary))
        if kwargs.get("position_ids") is not None:
            ids = kwargs["position_ids"]
            short["position_ids"] = self._once("live", ids, lambda: shortening.live_rows(ids))
        if frozen is not None:
            cache = self._cache(kwargs)
            short[self._cache_name] = cache
            if self._session.reuse is not None and shortening.frozen is not None:
                held = self._session.reuse.keys_values(index, shortening.frozen)
            else:
                angles = self._once("frozen", rotary, lambda: _angles(shortening.frozen_rows, rotary))
                held = self._family.keys_values(module, frozen, angles)
            cache.update(*held, index)
        mask = kwargs.get("attention_mask")
        causal = getattr(module.self_attn, "is_causal", True)
        buffer = _buffer(kwargs, index)
        short["attention_mask"] = self._once(
            f"mask {buffer}", mask, lambda: shortening.prefill_mask(mask, bool(causal), buffer)
        )
        return short

    def _enter_reader(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._session.turn.begin_call()
        self._memo.clear()
        if self._session.step is not None:
            self._session.step.check_thread()
            self._session.step.begin_call()

    def _leave_reader(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._end_call()

    def _call_over(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._session.whole:
            self._session.turn.end_call()

    def _end_call(self) -> Step | None:
        step = self._session.step
        if step is not None:
            with self._session.timed():
                step.end_call()
        return step

    def _read(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a layer that reads the shortened cache and adds to it: a decode step."""
        step = self._session.step
        shortening = None if step is None else step.shortening_at(index)
        if shortening is None:
            return None
        if index in self._session.stages:
            self._memo.clear()
        mask = kwargs.get("attention_mask")
        if mask is None:
            return None
        with self._session.timed():
            buffer = _buffer(kwargs, index)
            short = self._once(f"mask {buffer}", mask, lambda: shortening.reader_mask(mask, buffer))
        return args, {**kwargs, "attention_mask": short}

    def _read_transient(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a layer of an expert, whose own keys and values do not stay in the cache."""
        step = self._session.step
        shortening = None if step is None else step.shortening_at(index)
        if shortening is not None:
            _truncate(kwargs, index, shortening.prefix.shape[1])
        return self._read(index, module, args, kwargs)

    def _leave_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        step = self._end_call()
        self._memo.clear()
        if step is not None and step.prefilling and self._prompt_cache is None:
            self._remember_cache(cache_of(output))
        if not self._session.whole:
            self._held = filled(self._prompt_cache and self._prompt_cache())
        if step is None or not step.prefilling:
            return None
        if self._session.reuse is not None:
            cache = self._scratch or (self._prompt_cache and self._prompt_cache())
            self._session.reuse.keep(cache, step, self._layer)
        step.prefilling = False
        step.frozen_hidden = self._scratch = None
        return restored(output, step.shortenings) if step.shortenings else None

    def _once(self, purpose: str, source: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once per call of the decoder for each source object; layers share most of their
        inputs.
        """
        known = self._memo.setdefault(purpose, [])
        for seen, made in known:
            if seen is source:
                return made
        made = make()
        known.append((source, made))
        return made

    def _cache(self, kwargs: dict[str, Any]) -> Any:
        """The call's cache, or one that lives for this call alone: frozen tokens offer their keys and values through
        it.
        """
        cache = cache_in(kwargs)
        if cache is not None:
            return cache
        if self._scratch is None:
            from transformers import DynamicCache

            self._scratch = DynamicCache()
        return self._scratch


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _angles(function: Callable[[Tensor], Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`function` of (cos, sin), (B or 1, N, d) each, or (3, B or 1, N, d) for positions in time, height and width."""
    return tuple(in_each(function, tensor, 3) for tensor in tensors)


def _cache_layer(kwargs: dict[str, Any], index: int) -> Any:
    layers = getattr(cache_in(kwargs), "layers", [])
    return layers[index] if index < len(layers) else None


def _buffer(kwargs: dict[str, Any], index: int) -> int | None:
    """Width of a static cache's key buffer, None for a cache that grows."""
    return getattr(_cache_layer(kwargs, index), "max_cache_len", None)


def _truncate(kwargs: dict[str, Any], index: int, length: int) -> None:
    """Cut a growing cache layer back to the prompt.

    An expert's columns of the denoising step before are removed by its model, but up to transformers 5.22 to the
    length of the full layers, which leaves them in the shorter ones.
    """
    layer = _cache_layer(kwargs, index)
    if layer is None or hasattr(layer, "max_cache_len") or layer.keys is None or layer.keys.shape[-2] <= length:
        return
    layer.keys = layer.keys[..., :length, :]
    layer.values = layer.values[..., :length, :]
