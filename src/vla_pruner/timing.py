"""Milliseconds of a control step, split into its stages, measured from outside the model and without a trace.

    with StageTimer(policy) as timer, method.attach(policy) as session:
        session.clock = timer.stage
        with timer.step():
            policy.predict_action(...)
        timer.steps[-1].prefill  # milliseconds

A policy has `vision`, `projector` and `language_model` (or `decoder`); for others `watched` names the modules of each
stage. Vision is the time inside the first two; a call of the language model with more than one query token is the
prefill, one with a single query token is decode, and so is all that an expert does after the prompt; pruning is the
time that the session itself reports, taken out of the stage around it. The rest of the step (preprocessing, embedding,
sampling) is `other`. If prompt and decoding are compiled as one graph, both are the prefill: nothing can be timed
inside of a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import nn

from vla_pruner.accelerators import accelerators_of, now
from vla_pruner.anatomy import Anatomy, entry_of, layers_of
from vla_pruner.errors import UnsupportedModelError
from vla_pruner.replacements import Replacements

STAGES = ("vision", "prefill", "pruning", "decode", "other")

StageOf = Callable[[tuple[Any, ...], dict[str, Any]], str]
"""A function from the arguments of a module's call to the stage of that call."""

Watched = Sequence[tuple[Any, str, StageOf]]
"""Owners and names of methods whose calls are stages: `forward` of modules, mostly."""

COPIED = "A policy was copied or pickled while a stage timer is open on it; close the timer first."

_WHOLE = {"embed_prompt": "vision", "decode": "prefill"}
"""The stages of methods that a reference policy compiled as a whole has replaced on itself."""


@dataclass(frozen=True)
class StepTime:
    """One control step in milliseconds. The five stages add up to `total`."""

    total: float
    vision: float
    prefill: float
    pruning: float
    decode: float
    other: float


@dataclass
class _Open:
    """A stage that has begun; `inside` is the time of the stages within it."""

    name: str
    start: float
    inside: float = 0.0


class StageMeter:
    """Splits the growth of a reading in a control step among its stages, while it is open.

    The watched methods are replaced on the instances: some policies call a module's `forward` past every hook.

    Args:
        watched: the methods, and the stage of each one's calls.
        read: something that only grows: seconds, or FLOPs counted so far.

    Attributes:
        last: by stage, of the last step that ended; the stages add up to the whole step.
    """

    def __init__(self, watched: Watched, read: Callable[[], float]) -> None:
        self.last: dict[str, float] = {}
        self._watched = watched
        self._read = read
        self._replaced = Replacements(COPIED)
        self._open: list[_Open] = []
        self._found: dict[str, float] = {}

    def __enter__(self) -> Any:
        for owner, name, stage in self._watched:
            self._replaced.put(owner, name, self._staged(stage))
        return self

    def __exit__(self, *_: object) -> None:
        self._replaced.remove()

    def _staged(self, stage: StageOf) -> Callable[..., Any]:
        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return original(*args, **kwargs)
            with self.stage(stage(args, kwargs)):
                return original(*args, **kwargs)

        return forward

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block to the stage `name`, and take it out of the stage around it; a session's `clock`."""
        self._open.append(_Open(name, self._read()))
        try:
            yield
        finally:
            self._close()

    def _close(self) -> float:
        """Close the innermost stage; its time less the stages inside goes to its name. Return all of it."""
        stage = self._open.pop()
        grown = self._read() - stage.start
        self._found[stage.name] = self._found.get(stage.name, 0.0) + grown - stage.inside
        if self._open:
            self._open[-1].inside += grown
        return grown

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure one control step; it counts unless it raises."""
        self._found.clear()
        self._open.clear()
        self._open.append(_Open("other", self._read()))
        yield
        self._ended(self._close(), dict(self._found))

    def _ended(self, total: float, stages: dict[str, float]) -> None:
        self.last = stages


class StageTimer(StageMeter):
    """Times the control steps of `policy` while it is open. Compile before it is opened, not inside.

    Args:
        policy: a module with the submodules `vision`, `projector` and `language_model` or `decoder`, or any with
            `watched`.
        watched: the methods that are timed instead of these three.

    Attributes:
        steps: one entry for each step that ended.

    Raises:
        UnsupportedModelError: one of the three is missing.
    """

    def __init__(self, policy: Any, watched: Watched | None = None) -> None:
        watched = _parts(policy) if watched is None else watched
        self.steps: list[StepTime] = []
        # Work on an accelerator is queued; a stage has ended only when the queues are empty.
        devices = accelerators_of(parameter for owner, _, _ in watched for parameter in owner.parameters())
        super().__init__(watched, lambda: max((now(device) for device in devices), default=perf_counter()))

    def _ended(self, total: float, stages: dict[str, float]) -> None:
        super()._ended(total, stages)
        self.steps.append(StepTime(total=1e3 * total, **{name: 1e3 * stages.get(name, 0.0) for name in STAGES}))


def prefill_or_decode(args: tuple[Any, ...], kwargs: dict[str, Any], acting_rows: int = 1) -> str:
    """Return the stage of a call of a language model, prefill or decode, from the number of its query tokens."""
    tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = args[0]
    return "prefill" if tokens.shape[1] > acting_rows else "decode"


def always(stage: str) -> StageOf:
    """Return a stage function for a module whose every call is this stage."""
    return lambda args, kwargs: stage


class Family(Protocol):
    """The part of a model family (`attach.family.Family`) that a timer needs."""

    @property
    def anatomy(self) -> Anatomy: ...
    @property
    def seeing(self) -> tuple[Any, str] | None: ...
    @property
    def acting(self) -> tuple[Any, str] | None: ...


def watched_of(family: Family) -> Watched:
    """Return the calls of a policy's stages, if its family is known."""
    anatomy = family.anatomy
    seen = [(part, "forward", always("vision")) for part in (*anatomy.towers, *anatomy.projectors)]
    if anatomy.loop is not None:
        return [*seen, (anatomy.loop, "forward", _prefix_or_suffix)]
    for method, stage in ((family.seeing, "vision"), (family.acting, "prefill")):
        # Compiled as a whole it stands on the owner itself, and the calls inside it are not seen.
        if method is not None and method[1] in vars(method[0]):
            seen.append((*method, always(stage)))
    owner = anatomy.decoder if anatomy.language_model is None else anatomy.language_model
    acting = anatomy.expert_calls or [(expert, "forward") for expert in anatomy.experts]
    experts = [(*call, always("decode")) for call in acting]
    stage = partial(prefill_or_decode, acting_rows=anatomy.acting_rows)
    return [*seen, (owner, "forward", stage), *experts]


def _prefix_or_suffix(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    inputs = kwargs.get("inputs_embeds")
    return "decode" if inputs is not None and inputs[0] is None else "prefill"


def _parts(policy: Any) -> Watched:
    language = "decoder" if hasattr(policy, "decoder") else "language_model"
    missing = [name for name in ("vision", "projector", language) if not hasattr(policy, name)]
    if missing:
        raise UnsupportedModelError(
            f"{type(policy).__name__} has no submodule {', '.join(missing)}. The stage timer supports policies "
            "with `vision`, `projector` and `language_model` or `decoder`; time whole steps of others."
        )
    seen = [(module, "forward", always("vision")) for module in (policy.vision, policy.projector)]
    seen += [(policy, name, always(stage)) for name, stage in _WHOLE.items() if name in vars(policy)]
    return [*seen, (getattr(policy, language), "forward", prefill_or_decode)]


class Span:
    """Time between the norm that layer `layer` begins with and the end of the last layer's feed-forward part, in calls
    of more than one position: the prompt's. A context manager around hooks.

    Attributes:
        seconds: in all calls so far.
    """

    def __init__(self, decoder: Any, layer: int, device: torch.device) -> None:
        layers = layers_of(decoder)
        self._first, self._last = entry_of(layers[layer]), layers[-1].mlp
        self._device = device
        self._handles: list[Any] = []
        self._start: float | None = None
        self.seconds = 0.0

    def __enter__(self) -> Span:
        self._handles = [
            self._first.register_forward_pre_hook(self._open),
            self._last.register_forward_hook(self._close),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _open(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._start = now(self._device) if args[0].shape[-2] > 1 else None

    def _close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._start is not None:
            self.seconds += now(self._device) - self._start
            self._start = None
