"""A method attached to a model: owns the memory, the life of each control step, and what the last one left to read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from vla_pruner.attach.family import Call, Family
from vla_pruner.attach.layout import Layout, Shortening
from vla_pruner.attach.recorder import Attention, Recorder
from vla_pruner.attach.shortener import Shortener
from vla_pruner.attach.step import Step
from vla_pruner.errors import BudgetError, SessionError
from vla_pruner.methods.base import Evidence, Method
from vla_pruner.methods.memory import Memory

Clock = Callable[[str], AbstractContextManager[Any]]

_attached: WeakSet[nn.Module] = WeakSet()


class Session:
    """Made by `method.attach(model)`. A context manager; `detach()` leaves the model as it was, also after an
    exception.

    Attributes:
        method: the method that chooses the tokens.
        clock: None, or a function that is entered as `with clock("pruning")` around scoring, selecting and gathering;
            for timing.
    """

    def __init__(self, method: Method, model: nn.Module, family: Family) -> None:
        self.method = method
        self.clock: Clock | None = None
        self._family = family
        self._decoder = family.decoder
        self._episodes = 0
        self._memory: Memory | None = None
        self._step: Step | None = None
        self._in_prefill = False
        self._check_depth()
        if family.tokens is not None:
            method.budget(family.tokens)
        if self._decoder in _attached:
            raise SessionError(f"{type(model).__name__} has a session already; detach that one first.")
        self._recorder = Recorder()
        self._shortener = Shortener(self, family, method.layer)
        try:
            family.install()
            self._watch()
            self._shortener.install()
        except BaseException:
            self._remove()
            raise
        _attached.add(self._decoder)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Leave the model as it was before. What the last control step left can still be read. Detaching twice does
        nothing.
        """
        if self._decoder in _attached:
            _attached.discard(self._decoder)
            self._remove()

    def reset(self, rows: list[int] | None = None) -> None:
        """Begin a new episode: forget what was seen, for all rows or for the named rows of a batch.

        Raises:
            SessionError: rows are named before the first control step, or a row is not there.
        """
        memory = self.memory
        if rows is None:
            self._episodes = self._episodes + 1 if memory is None else int(memory.episode.max()) + 1
            self._memory = self._step = None
            return
        if memory is None:
            raise SessionError("reset(rows=...) was called before the first control step; call reset() without rows.")
        if any(not 0 <= row < memory.rows for row in rows):
            raise SessionError(f"reset(rows={rows}) was called, but the batch has rows 0 to {memory.rows - 1}.")
        self.memory = memory.reset(rows)

    @property
    def kept(self) -> Tensor | None:
        """(B, k) int64, sorted ids of the visual tokens kept in the last control step; None where it was not pruned."""
        return None if self._step is None else self._step.kept

    @property
    def scores(self) -> dict[str, Tensor]:
        """Scores (B, M) float32 of the last control step that the method reads: "semantic" and "action" (0 where
        dropped).
        """
        if self._step is None:
            return {}
        found = {"semantic": self._step.semantic, "action": self._step.action}
        return {name: score for name, score in found.items() if score is not None}

    @property
    def memory(self) -> Memory | None:
        """Everything carried from step to step, the last control step included; None before the first one.

        A value: save it, hand it to another session, or put it back later (one per robot). Setting it replaces all
            history.
        """
        step = self._step
        if step is None or step.closed:
            return self._memory
        if step.action is None and "action" in self.method.needs:
            # The call failed before anything acted: no control step came of it.
            return step.memory
        return step.memory.push(step.action, step.seen)

    @memory.setter
    def memory(self, memory: Memory | None) -> None:
        self._memory = memory
        if self._step is not None:
            self._step.closed = True

    @property
    def step(self) -> Step | None:
        """The control step that is running, or the last one."""
        return self._step

    def timed(self) -> AbstractContextManager[Any]:
        """The clock's context for work that pruning adds."""
        return nullcontext() if self.clock is None else self.clock("pruning")

    def open_call(self, call: Call, prefill: bool) -> None:
        """A call of the decoder begins. A prefill closes the last control step and opens the next.

        Raises:
            SessionError: the batch or the number of visual tokens is not the memory's, or no step is open for a decode
                call.
        """
        self._in_prefill = prefill
        if not prefill:
            if self._step is None:
                raise SessionError(
                    f"The decoder was called with {call.length} positions, too few to hold the visual tokens, "
                    "before any "
                    "prefill. While a session is attached, each control step begins with the prompt in one call."
                )
            return
        layout = self._family.layout(call)
        memory = self.memory
        if memory is None:
            memory = Memory.empty(layout.rows, self.method.history, layout.tokens, call.device, self._episodes)
        if (memory.rows, memory.tokens) != (layout.rows, layout.tokens):
            raise SessionError(
                f"The memory holds {memory.rows} rows of {memory.tokens} visual tokens, but the model was called with "
                f"{layout.rows} rows of {layout.tokens}; call reset() first, or set session.memory to these rows' own."
            )
        self._memory = memory = memory.to(call.device)
        self._step = Step(layout=layout, memory=memory)

    def choose(self, hidden: Tensor) -> Shortening | None:
        """Decide, at the pruning layer, what becomes of the sequence; `hidden` is (B, N, D). None: nothing changes."""
        step = self._step
        assert step is not None
        layout = step.layout
        k = self.method.budget(layout.tokens)
        if k >= layout.tokens or not self.method.prunes(step.memory):
            return None
        features = step.embeddings
        if "features" in self.method.needs:
            features = visual_rows(hidden, layout)
        evidence = Evidence(valid=layout.valid, memory=step.memory, semantic=step.semantic, features=features)
        with torch.no_grad():
            step.kept = self.method.select(evidence, k)
            step.shortening = Shortening(layout, step.kept, freeze=self.method.pruned == "freeze")
        return step.shortening

    def see_embeddings(self, hidden: Tensor) -> None:
        """The first layer's input (B, N, D) of a prefill, for methods that compare visual tokens there."""
        if self._step is not None and "embeddings" in self.method.needs:
            self._step.embeddings = visual_rows(hidden, self._step.layout)

    def _watch(self) -> None:
        layers = self._decoder.layers
        needs = self.method.needs
        if "semantic" in needs:
            self._recorder.watch(layers[self.method.layer - 1].self_attn, self._record_semantic)
        if "action" in needs:
            for actor in self._family.readers or (self._decoder,):
                record = self._record_reader if self._family.readers else self._record_decoder
                for index in self.method.action_layers(len(actor.layers)):
                    attention = actor.layers[index].self_attn
                    self._recorder.watch(attention, partial(record, index >= self.method.layer))

    @torch.no_grad()
    def _record_semantic(self, attention: Attention) -> None:
        if self._step is not None and self._in_prefill:
            with self.timed():
                self._step.add_semantic(attention, self._step.layout.query_weights(self.method.queries))

    @torch.no_grad()
    def _record_decoder(self, shortened: bool, attention: Attention) -> None:
        step = self._step
        if step is None or step.closed:
            return
        with self.timed():
            rows = None
            if self._in_prefill:
                rows = self._family.action_rows(step.layout)
                if shortened and step.shortening is not None and rows is not None:
                    rows = step.shortening.row_index(rows)
            step.add_action(attention, rows, shortened)

    @torch.no_grad()
    def _record_reader(self, shortened: bool, attention: Attention) -> None:
        step = self._step
        if step is None or step.closed:
            return
        with self.timed():
            rows = self._family.reader_rows(attention.query.shape[2], attention.query.shape[0], attention.query.device)
            step.add_action(attention, rows, shortened)

    def _check_depth(self) -> None:
        layers = len(self._decoder.layers)
        if self.method.layer >= layers:
            raise BudgetError(
                f"layer={self.method.layer} was given, but the decoder has {layers} layers; give a layer from 1 "
                f"to {layers - 1}."
            )

    def _remove(self) -> None:
        self._shortener.remove()
        self._recorder.remove()
        self._family.remove()


def visual_rows(hidden: Tensor, layout: Layout) -> Tensor:
    """The visual tokens (B, M, D) of hidden states (B, N, D)."""
    return hidden.gather(1, layout.visual[..., None].expand(-1, -1, hidden.shape[2]))
