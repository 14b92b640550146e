"""Decoders, experts and vision encoders compiled in place: whole calls as static graphs.

Hooks and taps inside of a call are traced with it, so scoring, choosing and gathering are part of its graph. The
session's work around a call (opening a control step, adding the scores to the memory) stays outside.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from vla_pruner.anatomy import layers_of, norm_of
from vla_pruner.attach.adapters import Adapters
from vla_pruner.attach.deepstack import add_at_fixed_sizes
from vla_pruner.attach.family import Call, Family
from vla_pruner.attach.parts import Parts
from vla_pruner.caches import allocate, cache_in, cache_key, cache_of, filled_columns, held, lay_out, vary_length
from vla_pruner.errors import OptionError, UnsupportedModelError
from vla_pruner.methods.base import Method
from vla_pruner.replacements import WRITTEN, Replacements

if TYPE_CHECKING:
    from vla_pruner.attach.runner import Runner

_numbers = count()

_ON_CPU = {
    # Calls of small policies are short: Python between the kernels would take a third of them.
    "cpp_wrapper": True,
    # A value of more operations than this that is used again is computed once. The default of 50 would compute the
    # cosines and sines of the positions, and the mask, anew in every layer, a tenth of an unpruned step.
    "realize_opcount_threshold": 5,
}
"""Options of inductor for programs on the CPU."""

COPIED = "A compiled policy was copied or pickled; take that away first (remove(), or detach the session)."

_compiled: WeakKeyDictionary[nn.Module, ref[Compiled]] = WeakKeyDictionary()
"""The compiled calls of a policy, by its decoder."""


class Compiled:
    """Puts compiled calls in the places of a policy's own; `remove` takes them away, and with them the compiled code. A
    context manager.

    Every kind of call is a program of its own, compiled when it is first made: the prompt by its length, unpruned and
    pruned; decoding, where only the cache's length varies and stays a variable; an expert's call. If the family has a
    method that runs all calls of a control step, that is one program instead. On CUDA each is captured as a CUDA graph.

    Args:
        family: of the policy.
        backend: as in `torch.compile`.
        runner: of the session that is attached; None compiles the model as it is.

    Attributes:
        backend: as given.
    """

    def __init__(self, family: Family, backend: str = "inductor", runner: Runner | None = None) -> None:
        self._family = family
        self.backend = backend
        self._runner = runner
        self._programs: dict[Hashable, Callable[..., Any]] = {}
        self._replaced = Replacements(COPIED)
        self._parts = Parts(self._owners())
        self._adapters = Adapters(layers_of(family.decoder), self._owners)
        self._models: dict[Hashable, int] = {}
        self._model_key = 0

    def __enter__(self) -> Compiled:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def programs(self) -> int:
        """The number of kinds of calls that were compiled so far."""
        return len(self._programs)

    def install(self, model: Any = None) -> None:
        """Put the compiled calls in place.

        Args:
            model: the policy if no session is attached; a session has already set aside methods that others compiled.

        Raises:
            OptionError: torch has no such backend.
            UnsupportedModelError: the family's calls are none of modules, or the method keeps what a graph overwrites.
        """
        family = self._family
        check_backend(self.backend)
        refusal = why_not_compiled(family, None if self._runner is None else self._runner.method)
        if refusal is not None:
            raise UnsupportedModelError(refusal)
        set_aside(model, family, self._replaced)
        self._note_model()
        if family.acting is not None:
            self._replaced.put(*family.acting, self._act)
        else:
            add_at_fixed_sizes(family.decoder, self._replaced)
            family.put_around(family.decoder, self._decode, self._replaced)
        for index, expert in enumerate(family.anatomy.experts):
            family.put_around(expert, partial(self._read, index), self._replaced)
        if family.seeing is not None:
            self._replaced.put(*family.seeing, partial(self._see, "prompt"))
        else:
            for index, (owner, name) in enumerate(family.encoding):
                self._replaced.put(owner, name, partial(self._see, index))
            family.encode_together(self._replaced)
        for index, module in enumerate(family.denoising):
            self._replaced.put(module, "forward", partial(self._see, ("denoising", index)))
        _compiled[family.decoder] = ref(self)

    def remove(self) -> None:
        """Put the model's own calls back."""
        if compiled_on(self._family.decoder) is self:
            del _compiled[self._family.decoder]
        self._programs.clear()
        self._replaced.remove()

    def run(self, name: str, function: Callable[..., Any], given: Tensor, *args: Any) -> Any:
        """Run the work of a session around a call as a program, too.

        Args:
            name: of the program.
            function: it reads nothing that changes but its arguments and the step's state.
            given: the tensor that the call runs on.
            *args: for the function; a dict is arguments of the decoder's call.
        """
        kinds = tuple(cache_key(cache_in(value)) for value in args if isinstance(value, dict))
        return self._run((name, *given.shape[:2], self._step_key(), kinds), given, function, args, {})

    def begin_step(self) -> None:
        """Begin a control step. Graphs write to the memory of their last run: one step is one run of them all."""
        torch.compiler.cudagraph_mark_step_begin()
        self._note_model()

    def _owners(self) -> list[Any]:
        """Return everything whose calls are compiled."""
        family, anatomy = self._family, self._family.anatomy
        calls = (family.acting, family.seeing, *family.encoding)
        owners = [call[0] for call in calls if call is not None]
        return [anatomy.decoder, *anatomy.experts, *anatomy.towers, *anatomy.projectors, *family.denoising, *owners]

    def _note_model(self) -> None:
        """Note what the model consists of, and which adapters act, as a number: every call's key has it. It changes
        between control steps alone, so not every call looks.
        """
        key = (self._parts.graph_key, self._adapters.state())
        self._model_key = self._models.setdefault(key, len(self._models))

    def _act(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # The next step may overwrite another graph's outputs from its beginning on.
        args, kwargs = tuple(map(_own, args)), {name: _own(value) for name, value in kwargs.items()}
        given, runner = _first_tensor(args, kwargs), self._runner
        if runner is None:
            self.begin_step()
            return self._run(("step", *given.shape[:2]), given, original, args, kwargs)
        with runner.timed():
            runner.open_call(Call(given.shape[1], None, given.shape[0], given.device))

        def whole(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            runner.finish()
            return result

        with runner.as_one_graph():
            return self._run(("step", *given.shape[:2], self._step_key()), given, whole, args, kwargs)

    def _decode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._runner is not None and self._runner.aside:
            return original(*args, **kwargs)
        if self._family.denoises and held(cache_in(kwargs)):
            return self._read("decoder", original, *args, **kwargs)
        given, step = _first_tensor(args, kwargs), None if self._runner is None else self._runner.step
        prompt = given.shape[1] > 1 if step is None else step.in_prompt()
        if prompt:
            # Outside of the graph, whose own memory the next step would overwrite.
            allocate(cache_in(kwargs), self._family.decoder, given)
        if prompt and step is None:
            self.begin_step()
        key = ("decoder", prompt, *given.shape[:2], self._step_key(), cache_key(cache_in(kwargs)))
        return self._run(key, given, original, args, kwargs, varies=not prompt)

    def _read(self, index: Hashable, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given, cache = _first_tensor(args, kwargs), cache_in(kwargs)
        key = ("reader", index, *given.shape[:2], self._step_key(), cache_key(cache), filled_columns(cache))
        return self._run(key, given, original, args, kwargs)

    def _see(self, which: Hashable, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not isinstance(which, tuple):  # of an encoder, which runs before a step begins
            self._note_model()
        given = _first_tensor(args, kwargs)
        return self._run(("encoder", which, given.shape), given, original, args, kwargs)

    def _step_key(self) -> tuple[Hashable, ...] | None:
        step = None if self._runner is None else self._runner.step
        return None if step is None else step.graph_key

    def _run(
        self,
        key: Hashable,
        given: Tensor,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        varies: bool = False,
    ) -> Any:
        decoder = self._family.decoder
        weight = norm_of(decoder).weight  # the model may be moved, and its inputs need not show it
        placed = (given.dtype, given.device, weight.dtype, weight.device)
        autocast = torch.is_autocast_enabled(given.device.type) and torch.get_autocast_dtype(given.device.type)
        key = (key, *placed, decoder.training, torch.is_grad_enabled(), autocast, self._model_key)
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._program(given.device)
            if varies:
                _vary_lengths(kwargs)
        return program(original, args, kwargs)

    def _program(self, device: torch.device) -> Callable[..., Any]:
        def call(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = original(*args, **kwargs)
            lay_out(cache_of(result))
            return result

        # torch keeps what it compiled by code object: with one of its own, no program is mistaken for another whose
        # hooks differ, nor does it use up another's limit of recompilations. By its name torch keeps which shapes
        # varied, for all models of the process.
        call.__code__ = call.__code__.replace(co_name=f"call_{next(_numbers)}")
        options: dict[str, Any] = {"guard_filter_fn": _guards_of_arguments}
        if self.backend == "inductor":
            options |= {"cuda": {"triton.cudagraphs": True}, "cpu": _ON_CPU}.get(device.type, {})
        return torch.compile(call, backend=self.backend, options=options, fullgraph=True, dynamic=False)


def why_not_compiled(family: Family, method: Method | None) -> str | None:
    """Return why a policy, with or without a method attached, cannot be compiled, and what to do; None if it can."""
    if not family.compilable:
        return (
            f"{type(family).__name__} runs its layers or its action head in a loop of its own, outside of any call "
            "that is compiled with what pruning does in it; leave compile out."
        )
    if method is not None and method.fate.needs_last_step:
        return (
            f"{type(method).__name__} reuses keys and values of the last control step, which a static graph would "
            "overwrite; run it without compile()."
        )
    return None


def compiled_on(decoder: nn.Module) -> Compiled | None:
    """Return the compiled calls of the policy that has this decoder."""
    found = _compiled.get(decoder)
    return None if found is None else found()


def check_backend(backend: object) -> None:
    """Raise OptionError unless torch can compile with `backend`."""
    from torch._dynamo import list_backends

    known = list_backends(exclude_tags=())
    if not callable(backend) and backend not in known:
        raise OptionError(f"{backend!r} was given as what compiles; torch has {', '.join(known)}.")


def check_not_compiled(model: Any, family: Family) -> None:
    """Raise UnsupportedModelError if calls of a policy are compiled, or captured as graphs by another library: no hook
    inside would ever run.
    """
    module = model if isinstance(model, nn.Module) else getattr(model, "module", None)
    for name, part in module.named_modules() if isinstance(module, nn.Module) else ():
        compiled = getattr(part, "_compiled_call_impl", None) is not None
        if compiled and any(inner is family.decoder for inner in part.modules()):
            raise UnsupportedModelError(
                f"{name or type(model).__name__} is compiled and holds the decoder, so hooks on it would never run; "
                "attach to the policy before it is compiled."
            )
    if getattr(module, "_proprio_hook", None) is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} was prepared by lerobot-policy-proprio (its _proprio_hook), whose graphs replay "
            "what they captured, pruned or not, and whose trial calls would count as control steps. Set "
            "PROPRIO_ENGINE=off before LeRobot is imported, or uninstall it, and load the policy anew; "
            "attach(policy, compile=True) compiles it here."
        )
    if family.decoder in _compiled:
        raise UnsupportedModelError(
            f"{type(model).__name__} is compiled already; take that away first: remove(), or vla_pruner.detach(model)."
        )


def set_aside(model: Any, family: Family, replaced: Replacements) -> None:
    """Replace methods that others compiled on single instances, and that run the decoder, by the original functions.

    LeRobot compiles such methods (`compile_model=True`, `--use_torch_compile`), and so do users: `model.forward =
    torch.compile(model.forward)`. A program that was traced before the hooks were registered would bypass them.

    Args:
        model: the policy.
        family: of the policy.
        replaced: records the replacements, to restore the compiled methods.
    """
    module = model if isinstance(model, nn.Module) else getattr(model, "module", None)
    for part in module.modules() if isinstance(module, nn.Module) else ():
        names = [name for name, value in vars(part).items() if callable(value) and hasattr(value, WRITTEN)]
        if names and any(inner is family.decoder for inner in part.modules()):
            for name in names:
                replaced.put(part, name, _as_written)


def _as_written(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return getattr(original, WRITTEN)(*args, **kwargs)


def _guards_of_arguments(guards: Any) -> list[bool]:
    """Return True for each guard that is checked at every call: those of the arguments, and of the tensors in a cache.

    Those of the model, its hooks and the session would be thousands, a millisecond a call. Whatever may change there is
    in a program's key.
    """
    kept = []
    for guard in guards:
        given = guard.name.startswith(("args", "kwargs"))
        kept.append(not guard.name or (given and (guard.guard_type == "TENSOR_MATCH" or "." not in guard.name)))
    return kept


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the tensor that a call runs on: embeddings, ids or pixels."""
    named = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), kwargs.get("pixel_values"))
    return next(value for value in (*named, *args, *kwargs.values()) if isinstance(value, Tensor))


def _own(value: Any) -> Any:
    """Return a copy of a tensor that a CUDA graph may have made."""
    return value.clone() if isinstance(value, Tensor) and value.device.type != "cpu" else value


def _vary_lengths(kwargs: dict[str, Any]) -> None:
    """Have the lengths of a growing cache, and of its mask, be variables of the graph."""
    vary_length(cache_in(kwargs))
    masks = kwargs.get("attention_mask")
    for mask in masks.values() if isinstance(masks, dict) else (masks,):
        if isinstance(mask, Tensor):
            torch._dynamo.maybe_mark_dynamic(mask, mask.dim() - 1)
