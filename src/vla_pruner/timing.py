"""Milliseconds of a control step, split into its stages, measured from outside the model and without a trace.

    with StageTimer(policy) as timer, method.attach(policy) as session:
        session.clock = timer.stage
        with timer.step():
            policy.predict_action(...)
        timer.steps[-1].prefill  # milliseconds

A policy has `vision`, `projector` and `language_model`. Vision is the time inside the first two; a call of the language
model with more than one query token is the prefill, one with a single query token is decode; pruning is what the
session itself reports, taken out of the prefill it happens in. The rest of the step (preprocessing, embedding,
sampling) is `other`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import nn

from vla_pruner.errors import UnsupportedModelError

STAGES = ("vision", "prefill", "pruning", "decode", "other")


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
    """A stage that has begun; `inside` is the time of the stages within it, in seconds."""

    name: str
    start: float
    inside: float = 0.0


class StageTimer:
    """Times the control steps of `policy` while it is open.

    Args:
        policy: a module with the submodules `vision`, `projector` and `language_model`.

    Raises:
        UnsupportedModelError: if one of the three is missing.
    """

    def __init__(self, policy: nn.Module) -> None:
        missing = [name for name in ("vision", "projector", "language_model") if not hasattr(policy, name)]
        if missing:
            raise UnsupportedModelError(
                f"{type(policy).__name__} has no submodule {', '.join(missing)}. The stage timer supports policies "
                "with `vision`, `projector` and `language_model`; time whole steps of others."
            )
        self.steps: list[StepTime] = []
        self._policy: Any = policy
        self._handles: list[Any] = []
        self._seconds: dict[str, float] = {}
        self._open: list[_Open] = []
        # Work on a GPU is queued; a stage has ended only when the queue is empty.
        on_gpu = any(parameter.is_cuda for parameter in policy.parameters())
        self._synchronize: Callable[[], None] = torch.cuda.synchronize if on_gpu else _nothing

    def __enter__(self) -> StageTimer:
        for name in ("vision", "projector"):
            self._watch(getattr(self._policy, name), lambda _: "vision")
        self._watch(self._policy.language_model, _prefill_or_decode)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, module: nn.Module, stage: Callable[[tuple[Any, dict[str, Any]]], str]) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._enter(stage((args, kwargs)))

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
            self._exit()

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _now(self) -> float:
        self._synchronize()
        return perf_counter()

    def _enter(self, name: str) -> None:
        self._open.append(_Open(name, self._now()))

    def _exit(self) -> float:
        """Closes the innermost stage; its time less that of the stages inside goes to its name. Returns all of it."""
        stage = self._open.pop()
        elapsed = self._now() - stage.start
        self._seconds[stage.name] = self._seconds.get(stage.name, 0.0) + elapsed - stage.inside
        if self._open:
            self._open[-1].inside += elapsed
        return elapsed

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time inside to the stage `name`, and takes it out of the stage around it; a session's `clock`."""
        self._enter(name)
        try:
            yield
        finally:
            self._exit()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Times one control step, and appends it to `steps` unless it raises."""
        self._seconds.clear()
        self._open.clear()
        self._enter("other")
        yield
        total = self._exit()
        stages = {name: 1e3 * self._seconds.get(name, 0.0) for name in STAGES}
        self.steps.append(StepTime(total=1e3 * total, **stages))


def _nothing() -> None:
    pass


def _prefill_or_decode(call: tuple[Any, dict[str, Any]]) -> str:
    """Which of the two a call of a language model is, from the number of its query tokens."""
    args, kwargs = call
    tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = args[0]
    return "prefill" if tokens.shape[1] > 1 else "decode"
