"""The package's only access to transformers' key-value caches: the names of their argument, the layout of their layers,
and the caches that a session refuses.

The argument is "past_key_values" up to transformers 5.23, and "cache" from 5.24 on, which warns of the old name. A
growing cache (DynamicCache) holds as many columns as positions were seen; a static one holds a buffer of fixed width.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.errors import SessionError, UnsupportedModelError
from vla_pruner.wording import a_type

NAMES = ("cache", "past_key_values")
"""The names of the cache, as an argument and as an attribute of the output, the newest first."""


def cache_name(module: nn.Module) -> str:
    """Return the name by which `module`, or a layer of a decoder, takes its cache.

    Raises:
        UnsupportedModelError: its `forward` takes none by a known name.
    """
    for kind in type(module).__mro__:
        # The wrappers of accelerate or of a session on the instance need not show the arguments.
        known = inspect.signature(vars(kind)["forward"]).parameters if "forward" in vars(kind) else ()
        for name in NAMES:
            if name in known:
                return name
    raise UnsupportedModelError(
        f"{type(module).__name__}.forward takes no key-value cache by the name of {' or '.join(NAMES)}, so what is "
        "attached could not find it; supported are the decoders of transformers as they are."
    )


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a call, by whichever name the caller used; None if there is none."""
    for name in NAMES:
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def with_cache(arguments: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """Return the arguments of a call with `cache` in the place of theirs, by the name that the caller used."""
    return {name: cache if name in NAMES and given is not None else given for name, given in arguments.items()}


def cache_of(output: Any) -> Any:
    """Return the cache that a decoder's call returned; None if it returned none."""
    for name in NAMES:
        # The first name that is there: an output that has the new name warns if the old one is read.
        if hasattr(output, name):
            return getattr(output, name)
    return None


def new_cache() -> Any:
    """Return an empty growing cache. This may be called in a compiled call."""
    from transformers.cache_utils import DynamicCache  # up to torch 2.11 compilers cannot trace lazy modules

    return DynamicCache()


def layers_of(cache: Any) -> list[Any]:
    """Return the layers of a cache; empty if there is no cache, or if a growing one holds nothing yet."""
    return getattr(cache, "layers", [])


def buffer_width(cache: Any, index: int = 0) -> int | None:
    """Return the width of a static cache's key buffer for a layer; None for a cache that grows."""
    layers = layers_of(cache)
    return getattr(layers[index], "max_cache_len", None) if index < len(layers) else None


def columns_of(cache: Any, index: int, length: int) -> tuple[Tensor, Tensor]:
    """Return the first `length` columns of a layer: keys and values (B, G, length, d) that later writes do not
    change.
    """
    layer = layers_of(cache)[index]
    key, value = (part[..., :length, :] for part in (layer.keys, layer.values))
    # A static cache writes into the same buffers again.
    return (key.clone(), value.clone()) if _is_static(layer) else (key, value)


def cut_back(cache: Any, index: int, length: int) -> None:
    """Cut a layer of a growing cache back to its first `length` columns."""
    layers = layers_of(cache)
    layer = layers[index] if index < len(layers) else None
    if layer is None or _is_static(layer) or layer.keys is None or layer.keys.shape[-2] <= length:
        return
    layer.keys = layer.keys[..., :length, :]
    layer.values = layer.values[..., :length, :]


def lent(cache: Any) -> Any:
    """Return a copy of a cache with the same tensors; columns that are added to the copy do not reach the original."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in layers_of(cache)]
    return other


def held(cache: Any) -> int | None:
    """Return the number of positions that a cache holds; None without one, and if the host would have to wait to
    know.
    """
    count = None if cache is None else cache.get_seq_length()
    if count is None or (isinstance(count, Tensor) and count.device.type != "cpu"):
        return None
    return int(count)


class PromptCache:
    """The cache that the prompt of a control step filled, and the number of positions that it must hold by now."""

    def __init__(self) -> None:
        self._cache: Any = None
        self._held: int | None = None

    def remember(self, cache: Any) -> None:
        """Remember the cache that the prompt fills (None: one that is not known yet)."""
        self._cache = None if cache is None else weakref.ref(cache)

    def get(self) -> Any:
        """Return the cache, as long as something else holds it; else None."""
        return None if self._cache is None else self._cache()

    def is_known(self) -> bool:
        """Return True if one was remembered since the prompt began."""
        return self._cache is not None

    def check_same(self, cache: Any, message: str) -> None:
        """Raise SessionError with `message` unless `cache` is the prompt's."""
        if self._cache is None or cache is not self._cache():
            raise SessionError(message)

    def note_held(self) -> None:
        """Note the number of positions after a call of the decoder; the next call must find the same."""
        self._held = held(self.get())

    def check_held(self, cache: Any) -> None:
        """Raise SessionError if `cache` holds another number of positions than the call before left in it."""
        found = held(cache)
        if found is not None and self._held is not None and found != self._held:
            raise SessionError(
                f"The cache holds {found} positions, but the call before left {self._held} in it: it was reset or "
                "cropped within a control step. Decode one token after the other, without speculative decoding (prompt "
                "lookup, an assistant), and reset a cache between control steps."
            )


def check_prompt_cache(cache: Any) -> None:
    """Raise unless a prompt may be run with this cache.

    Raises:
        UnsupportedModelError: it is of a type that was not tested.
        SessionError: it holds something already.
    """
    if cache is None:
        return
    from transformers.cache_utils import DynamicCache, StaticCache

    if not isinstance(cache, (DynamicCache, StaticCache)) or getattr(cache, "offloading", False):
        raise UnsupportedModelError(
            f"The prefill was given {a_type(cache)}; supported are DynamicCache and StaticCache, not offloaded."
        )
    found = held(cache)
    if found:
        raise SessionError(
            f"The prefill was given a cache that holds {found} positions already; each control step needs an empty one "
            "(a new cache, or reset() the static one)."
        )


def cache_key(cache: Any) -> tuple[Hashable, ...]:
    """Return the cache's part of a compiled call's key: its type, and whether it is filled.

    Layers with a sliding window count their positions as numbers, which are constants of a graph.
    """
    layers = layers_of(cache)
    kinds: list[Hashable] = [type(cache), len(layers)]
    # Types alternate, or change once: the first and the last layer show them all.
    for layer in (*layers[:1], *layers[-1:]):
        length = getattr(layer, "cumulative_length", None)
        positions = length if isinstance(length, int) else getattr(layer, "cumulative_length_int", None)
        kinds += [type(layer), layer.is_initialized, getattr(layer, "max_cache_len", None), positions]
    return tuple(kinds)


def filled_columns(cache: Any) -> int | None:
    """Return the number of columns of the first layer of a cache; None if it has none yet."""
    layers = layers_of(cache)
    return layers[0].keys.shape[2] if layers and layers[0].is_initialized else None


def allocate(cache: Any, decoder: Any, given: Tensor) -> None:
    """Allocate the buffers of a static cache for a call of `decoder` on `given`, ids or embeddings (B, N, ...)."""
    layers = layers_of(cache)
    if layers and _is_static(layers[0]) and not layers[0].is_initialized:
        config = decoder.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dtype = given.dtype if given.is_floating_point() else decoder.dtype
        cache.early_initialization(len(given), config.num_key_value_heads, width, dtype, given.device)


def lay_out(cache: Any) -> None:
    """Make a growing cache contiguous, as it is after every later call, so that decoding is one graph."""
    for layer in layers_of(cache):
        if not _is_static(layer) and layer.keys is not None:
            layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()


def vary_length(cache: Any) -> None:
    """Have the length of a growing cache be a variable of the graph that is traced next."""
    for layer in layers_of(cache):
        if not _is_static(layer) and layer.keys is not None:
            torch._dynamo.maybe_mark_dynamic(layer.keys, 2)
            torch._dynamo.maybe_mark_dynamic(layer.values, 2)


def _is_static(layer: Any) -> bool:
    return hasattr(layer, "max_cache_len")
