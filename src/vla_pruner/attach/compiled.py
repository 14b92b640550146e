"""Decoders, experts and vision encoders compiled in place, whole calls as static graphs.

Hooks and taps inside of a call are traced with it, so scoring, choosing and gathering are part of its graph. What a
session does around a call (opening a control step, adding what was read to the memory) stays outside.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vla_pruner.attach.family import Family
from vla_pruner.attach.replacements import Replacements

if TYPE_CHECKING:
    from vla_pruner.attach.session import Session


class Compiled:
    """Puts compiled calls in the places of a policy's own; `remove` takes them away, and with them what was compiled.

    Every kind of call is a program of its own, compiled once: the prompt by its length, unpruned and pruned; decoding,
    where only the cache's length varies and stays a variable; an expert's call. On CUDA each is captured as a graph.

    Args:
        family: of the policy.
        encoders: its vision encoders.
        backend: as in `torch.compile`.
        session: the session that is attached; None compiles the model as it is.
    """

    def __init__(
        self, family: Family, encoders: Iterable[nn.Module], backend: str, session: Session | None = None
    ) -> None:
        self._family = family
        self._encoders = tuple(encoders)
        self._backend = backend
        self._session = session
        self._programs: dict[Hashable, Callable[..., Any]] = {}
        self._replaced = Replacements()

    def install(self) -> None:
        """Put the compiled calls in place."""
        self._replaced.put(self._family.decoder, "forward", self._decode)
        for index, reader in enumerate(self._family.readers):
            self._replaced.put(reader, "forward", _bound(self._read, index))
        for index, encoder in enumerate(self._encoders):
            self._replaced.put(encoder, "forward", _bound(self._see, index))

    def remove(self) -> None:
        """Put the model's own calls back."""
        self._replaced.remove()
        self._programs.clear()

    def _decode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rows, length = _size(args, kwargs)
        step = None if self._session is None else self._session.step
        prompt = length > 1 if step is None else step.prefilling
        if prompt:
            # Graphs write where their last run wrote: one control step is one run of all of them.
            torch.compiler.cudagraph_mark_step_begin()
        else:
            _vary_lengths(kwargs)
        key = ("decoder", rows, length, prompt, step is not None and step.prunes)
        return self._run(key, original, args, kwargs)

    def _read(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        step = None if self._session is None else self._session.step
        return self._run(("reader", index, _size(args, kwargs), step is not None and step.prunes), original, args, kwargs)

    def _see(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._run(("encoder", index), original, args, kwargs)

    def _run(self, key: Hashable, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._program()
        return program(original, args, kwargs)

    def _program(self) -> Callable[..., Any]:
        def call(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = original(*args, **kwargs)
            _lay_out(result)
            return result

        # torch keeps what it compiled by code object: with one of its own, no program's limit of recompilations counts
        # another's, and none is mistaken for another whose hooks differ.
        call.__code__ = call.__code__.replace(co_name=f"call_{len(self._programs)}")
        options: dict[str, Any] = {"guard_filter_fn": _guards_of_inputs}
        if self._backend == "inductor" and next(self._family.decoder.parameters()).device.type == "cuda":
            options["triton.cudagraphs"] = True
        return torch.compile(call, backend=self._backend, options=options, fullgraph=True)


def _guards_of_inputs(guards: Any) -> list[bool]:
    """Which guards are checked at every call: those of the arguments, and of the tensors in a cache.

    Those of the model, its hooks and the session would be thousands, a millisecond a call. What may change there is in a
    program's key.
    """
    kept = []
    for guard in guards:
        given = guard.name.startswith(("args", "kwargs"))
        kept.append(not guard.name or (given and (guard.guard_type == "TENSOR_MATCH" or "." not in guard.name)))
    return kept


def _bound(function: Callable[..., Any], index: int) -> Callable[..., Any]:
    def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(index, original, *args, **kwargs)

    return around


def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Rows and positions of a decoder's call."""
    given = next(
        value
        for value in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args)
        if isinstance(value, Tensor)
    )
    return given.shape[0], given.shape[1]


def _lay_out(output: Any) -> None:
    """A grown cache is contiguous from the first call on, so that decoding is one graph."""
    for layer in getattr(getattr(output, "past_key_values", None), "layers", []):
        if not hasattr(layer, "max_cache_len") and layer.keys is not None:
            layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()


def _vary_lengths(kwargs: dict[str, Any]) -> None:
    """Have the lengths of a cache that grows, and of its mask, be variables of the graph."""
    for layer in getattr(kwargs.get("past_key_values"), "layers", []):
        if not hasattr(layer, "max_cache_len") and layer.keys is not None:
            torch._dynamo.maybe_mark_dynamic(layer.keys, 2)
            torch._dynamo.maybe_mark_dynamic(layer.values, 2)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor):
        torch._dynamo.maybe_mark_dynamic(mask, mask.dim() - 1)
