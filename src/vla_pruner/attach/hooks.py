"""The usual wiring: hooks on the calls of transformers decoders and of their layers, and taps on attention modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from vla_pruner.anatomy import layers_of
from vla_pruner.attach.aside import Aside
from vla_pruner.attach.deepstack import DeepStack
from vla_pruner.attach.family import Call, Family
from vla_pruner.attach.host import Host
from vla_pruner.attach.recorder import Recorder
from vla_pruner.attach.short_layers import LayerInput, ShortLayers
from vla_pruner.caches import PromptCache, cache_in, cache_name, cache_of, check_prompt_cache
from vla_pruner.errors import SessionError, UnsupportedModelError
from vla_pruner.replacements import undo

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class HookWiring:
    """Maps the calls of a family's decoders onto `ShortLayers`, and the reads of their attention modules onto the host.

    Args:
        host: called with every event.
        family: whose decoders are hooked.
    """

    def __init__(self, host: Host, family: Family) -> None:
        self._host = host
        self._family = family
        self._short = ShortLayers(host, family)
        self._recorder = Recorder()
        self._deepstack = DeepStack(host, family.decoder)
        self._signature = inspect.signature(family.decoder.forward)
        self._backend = family.backend
        self._cache_name = cache_name(layers_of(family.decoder)[0])
        self._handles: list[Any] = []
        self._length = 0
        self._prompt_cache = PromptCache()
        self._aside = Aside()

    def install(self) -> None:
        """Put taps and hooks in place.

        Raises:
            UnsupportedModelError: the pruning layer comes before masks are sized, or the decoder is compiled or has one
                module as two of its layers.
        """
        for actor in (self._family.decoder, *self._family.readers):
            _check_distinct(actor)
        self._tap()
        decoder, layer = self._family.decoder, self._short.layer
        if getattr(decoder, "_compiled_call_impl", None) is not None or hasattr(decoder, "_orig_mod"):
            raise UnsupportedModelError(
                "The decoder is compiled, so hooks on it would never run; attach before compiling."
            )
        self._check_caches_order(decoder)
        self._handles.append(decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
        self._handles.append(decoder.register_forward_hook(self._leave_decoder))
        self._handles.append(decoder.register_forward_hook(self._end_turn, always_call=True))
        if layer:
            self._handles.append(layers_of(decoder)[0].register_forward_pre_hook(self._enter_first, with_kwargs=True))
        self._hook_layers(decoder, self._enter_layer)
        for reader in self._family.readers:
            self._handles.append(reader.register_forward_pre_hook(self._enter_reader, with_kwargs=True))
            self._handles.append(reader.register_forward_hook(self._leave_reader))
            self._handles.append(reader.register_forward_hook(self._end_turn, always_call=True))
            self._hook_layers(reader, self._enter_reader_layer)
        self._deepstack.install()

    def remove(self) -> None:
        """Remove all of it."""
        undo(self._deepstack.remove, self._unhook, self._recorder.remove)

    def __deepcopy__(self, memo: Any) -> Any:
        # The copy would be pruned with no session to detach it.
        raise SessionError("A model with a session attached was copied or pickled; detach first.")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__deepcopy__(None)

    def _tap(self) -> None:
        host, family = self._host, self._family
        layers = layers_of(family.decoder)
        for layer, stage in host.stages.items():
            if "semantic" in stage.method.needs:
                attention = layers[stage.method.semantic_layer].self_attn
                callback = partial(host.record_semantic, layer)
                self._recorder.watch(attention, family.backend, callback, family.kernel)
        if "action" in host.method.needs:
            self._tap_action()

    def _tap_action(self) -> None:
        host, family = self._host, self._family
        record = host.record_reader if family.readers else host.record_decoder
        for actor in family.readers or (family.decoder,):
            layers = layers_of(actor)
            for index in host.method.action_layers(len(layers)):
                self._recorder.watch(layers[index].self_attn, family.backend, partial(record, index))

    def _hook_layers(self, decoder: Any, hook: Callable[..., Any]) -> None:
        layers = layers_of(decoder)
        for index in range(self._short.layer, len(layers)):
            handle = layers[index].register_forward_pre_hook(partial(hook, index), with_kwargs=True)
            self._handles.append(handle)

    def _unhook(self) -> None:
        for handle in reversed(self._handles):
            handle.remove()
        self._handles.clear()
        self._short.forget()

    def _check_caches_order(self, decoder: Any) -> None:
        # Mask and position lengths are read from the first cache layer of each attention type, so these must stay full.
        layer = self._short.layer
        if not layer:
            return  # All caches are short alike.
        types = getattr(decoder.config, "layer_types", None) or []
        first = max((types.index(kind) for kind in set(types)), default=0)
        if layer <= first:
            raise UnsupportedModelError(
                f"layer={layer} was given, but this model's first {types[first]!r} layer is layer {first}, and masks "
                f"are sized from it; give layer={first + 1} or more."
            )

    # Calls of the decoder.

    def _enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        self._short.forget()
        given = kwargs
        if args:
            given = self._signature.bind_partial(*args, **kwargs).arguments
            given = {**given, **given.get("kwargs", {})}
        inputs = given.get("inputs_embeds")
        inputs = given.get("input_ids") if inputs is None else inputs
        assert inputs is not None
        call = Call(inputs.shape[1], given.get("attention_mask"), inputs.shape[0], inputs.device)
        cache = cache_in(given)
        if self._family.shows_nothing(call) and self._aside.takes(cache, self._prompt_cache.get()):
            self._host.enter_aside()
            return None
        prompt = self._host.enter_decoder(call)
        self._length = call.length if prompt else self._length + call.length
        self._check_model()
        if not self._host.whole:  # within one graph the cache can be no other
            self._check_cache(cache, prompt)
        if self._short.layer:
            return None
        if prompt:
            short = self._host.in_graph("shorten", self._short.short_prompt, inputs, given, inputs)
        else:
            short = self._short.short_token(given, self._length - 1, inputs.device)
        return None if short is None else ((), short)

    def _check_cache(self, cache: Any, prompt: bool) -> None:
        if prompt:
            check_prompt_cache(cache)
            self._aside.forget(cache)
            self._prompt_cache.remember(cache)
        else:
            self._prompt_cache.check_same(
                cache, "A decode call was given another cache than the prompt; steps cannot be interleaved."
            )
            self._prompt_cache.check_held(cache)

    def _check_model(self) -> None:
        config = self._family.decoder.config
        if config._attn_implementation != self._backend:
            raise SessionError(
                f"The attention backend was changed from {self._backend!r} to {config._attn_implementation!r} "
                "while a session is attached; detach, change it, and attach again."
            )
        for actor in (self._family.decoder, *self._family.readers):
            _check_keeps_cache(actor)
        window = getattr(config, "sliding_window", None)
        if window is not None and self._length >= window:
            raise UnsupportedModelError(
                f"The sequence has {self._length} positions, but this model's sliding window is {window}; a "
                "window that cuts the sequence is not supported."
            )

    def _leave_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._host.aside:
            self._aside.remember(cache_of(output))
            return None
        step = self._host.step
        prompt = step is not None and step.in_prompt()
        self._host.leave_call()
        if not self._host.whole:
            if prompt and not self._prompt_cache.is_known():
                self._prompt_cache.remember(cache_of(output))
            self._prompt_cache.note_held()
        if not prompt:
            self._short.forget()
            return None
        return self._short.leave_prompt(output, None if self._host.whole else self._prompt_cache.get())

    def _end_turn(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._host.end_turn()

    # Layers of the decoder.

    def _enter_first(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._host.aside and self._host.open_step().in_prompt():
            self._host.see_embeddings(_hidden(args, kwargs))

    def _enter_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        if self._host.aside:
            return None
        prompt = self._host.open_step().in_prompt()
        if not self._short.layer:
            cache = None
            if prompt:
                cache = self._short.freeze(index, module, kwargs["position_embeddings"], cache_in(kwargs))
            return None if cache is None else (args, {**kwargs, self._cache_name: cache})
        if not prompt:
            return self._read(index, args, kwargs)
        attention: Any = module.self_attn
        given = LayerInput(
            index=index,
            layer=module,
            hidden=_hidden(args, kwargs),
            angles=kwargs["position_embeddings"],
            positions=kwargs.get("position_ids"),
            mask=kwargs.get("attention_mask"),
            causal=bool(getattr(attention, "is_causal", True)),
            cache=cache_in(kwargs),
        )
        return self._with(given, args, kwargs) if self._short.shorten(given) else None

    def _with(self, given: LayerInput, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Return the layer's arguments, with the shortened ones in their places."""
        short = {**kwargs, "position_embeddings": given.angles, "attention_mask": given.mask}
        if given.positions is not None:
            short["position_ids"] = given.positions
        if given.cache is not cache_in(kwargs):
            short[self._cache_name] = given.cache
        if args:
            return (given.hidden, *args[1:]), short
        return args, {**short, "hidden_states": given.hidden}

    def _read(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        mask = self._short.read(index, kwargs.get("attention_mask"), cache_in(kwargs))
        return None if mask is None else (args, {**kwargs, "attention_mask": mask})

    # Calls of an expert, whose own keys and values do not stay in the cache.

    def _enter_reader(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._short.forget()
        self._host.enter_reader()

    def _leave_reader(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._host.leave_call()

    def _run_reader(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a call of an expert that is a method, on which no hook can be placed."""
        try:
            self._host.enter_reader()
            result = original(*args, **kwargs)
            self._host.leave_call()
        finally:
            self._host.end_turn()
        return result

    def _enter_reader_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        self._short.cut(index, cache_in(kwargs))
        return self._read(index, args, kwargs)


def _check_keeps_cache(decoder: Any) -> None:
    """Raise SessionError if a decoder recomputes its layers in the backward pass: they are then run without a cache."""
    for module in (decoder, *layers_of(decoder)[:1]):
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise SessionError(
                f"{type(decoder).__name__} is in training mode with gradient checkpointing, so its layers keep no "
                "cache, which pruned control steps read. Call model.eval(), or model.gradient_checkpointing_disable()."
            )


def _check_distinct(decoder: Any) -> None:
    """Raise UnsupportedModelError if a module is several layers of a decoder: hooks could not tell which one runs."""
    first: dict[int, int] = {}
    for index, layer in enumerate(layers_of(decoder)):
        if first.setdefault(id(layer), index) != index:
            raise UnsupportedModelError(
                f"Layers {first[id(layer)]} and {index} of {type(decoder).__name__} are one and the same module, so "
                "where a call of it stands is not known. Give each layer a module of its own; they may share weights."
            )


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
