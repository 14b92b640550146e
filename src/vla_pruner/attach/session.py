"""A method attached to a model: owns the memory, the life of each control step, and what the last one left to read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vla_pruner.attach import attached
from vla_pruner.attach.arithmetic import own_arithmetic
from vla_pruner.attach.compiled import Compiled, check_not_compiled, encoders_of
from vla_pruner.attach.described import described
from vla_pruner.attach.entries import follow_resets, watch_steps
from vla_pruner.attach.family import Call, Family
from vla_pruner.attach.hooks import HookWiring
from vla_pruner.attach.layout import Shortening
from vla_pruner.attach.recorder import Attention
from vla_pruner.attach.remembering import check_memory, empty_memory
from vla_pruner.attach.reuse import Reuse
from vla_pruner.attach.stages import Planner, Stage, stages_of
from vla_pruner.attach.step import Step
from vla_pruner.attach.turn import Turn
from vla_pruner.errors import SessionError
from vla_pruner.methods.base import Evidence, Method
from vla_pruner.methods.memory import Memory
from vla_pruner.methods.numbers import plain
from vla_pruner.replacements import Replacements, undo

Clock = Callable[[str], AbstractContextManager[Any]]


class Session:
    """Made by `method.attach(model)`. A context manager; `detach()` leaves the model as it was, also after an
    exception. Where the policy has a `reset()` of its own, calling that is calling `session.reset()` too.

    Attributes:
        method: the method that chooses the tokens.
        clock: None, or a function that is entered as `with clock("pruning")` around scoring, selecting and gathering;
            for timing.
        stages: where the method prunes, by layer, the first one first.
        reuse: what is held of the last control step, for methods whose `pruned` is "reuse".
        turn: which thread is within a control step.
        whole: a control step that is one graph is running, or being traced; it was opened before.
    """

    def __init__(self, method: Method, model: Any, family: Family) -> None:
        self.method = method
        self.clock: Clock | None = None
        self.whole = False
        self.turn = Turn()
        self._family = family
        self._policy = model
        self._compiled: Compiled | None = None
        self._decoder = family.decoder
        self._episode: Tensor | None = None
        self._memory: Memory | None = None
        self._step: Step | None = None
        self.stages = stages_of(method, family)
        self._planner = Planner(family, self.stages)
        self.reuse = Reuse(family) if method.pruned == "reuse" else None
        attached.check_free(self._decoder, model)
        check_not_compiled(model, family)
        self._wiring = family.wiring(self) or HookWiring(self, family)
        self._replaced = Replacements()
        try:
            family.install()
            if self.reuse is not None:
                self.reuse.install()
            self._wiring.install()
            watch_steps(self, family, self._replaced)
            follow_resets(self, model, self._replaced)
        except BaseException:
            self._remove()
            raise
        attached.enter(self._decoder, self)

    def __repr__(self) -> str:
        return described(self, self._family)

    def __enter__(self) -> Session:
        if not self.attached:
            raise SessionError("This session is detached; attach the method anew.")
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def attached(self) -> bool:
        """Whether it still is: False once it was detached."""
        return attached.session_on(self._decoder) is self

    def compile(self, backend: str = "inductor") -> None:
        """Compile the decoder, experts and vision encoders as static graphs, what pruning adds included; of the
        reference policy the whole control step.

        Each kind of call is compiled when it is first made, so the first steps of the first episode take long:
        unpruned and pruned prompts are graphs of their own, and so is every other length of the prompt. On CUDA they
        are captured as CUDA graphs. Compiled code lives as long as the session.

        Args:
            backend: as in `torch.compile`.

        Raises:
            SessionError: it is detached, or compiled already.
            UnsupportedModelError: the family's calls, or what the method does in them, cannot be compiled.
        """
        if not self.attached:
            raise SessionError("This session is detached; attach the method anew.")
        if self._compiled is not None:
            raise SessionError("This session is compiled already.")
        compiled = Compiled(self._family, encoders_of(self._policy), backend, self)
        compiled.install()
        self._compiled = compiled

    def detach(self) -> None:
        """Leave the model as it was before. What the last control step left can still be read. Detaching twice does
        nothing.

        Whatever fails on the way, all is taken away; then the first error is raised.
        """
        if self.attached:
            attached.leave(self._decoder)
            undo(self._remove, *([] if self._step is None else [self._step.settle]))

    def reset(self, rows: list[int] | None = None) -> None:
        """Begin a new episode: forget what was seen, for all rows or for the named rows of a batch.

        Raises:
            SessionError: rows are named before the first control step, a row is not there, or another thread is within
                a control step.
        """
        self.turn.check()
        memory = self.memory
        if rows is None:
            if memory is not None:
                self._episode = memory.episode + 1
            self._memory = self._step = None
            if self.reuse is not None:
                self.reuse.forget()
            return
        if not isinstance(rows, list) or any(
            isinstance(row, bool) or not isinstance(row, int) for row in map(plain, rows)
        ):
            raise SessionError(f"reset(rows={rows!r}) was called; rows is a list of row numbers.")
        if memory is None:
            raise SessionError("reset(rows=...) was called before the first control step; call reset() without rows.")
        if any(not 0 <= row < memory.rows for row in rows):
            raise SessionError(f"reset(rows={rows}) was called, but the batch has rows 0 to {memory.rows - 1}.")
        self.memory = memory.reset(rows)

    def moved(self, distance: float | Tensor) -> None:
        """Say how far the arm moved in the last control step, for methods that prune by it (`Method.motion`). Call it
        once after each step, before the next one: whoever commands the robot knows, and the model does not.

        Args:
            distance: (B,), or one number where there is one row: the length of the path of the whole action chunk, the
                sum of |p_{t+1} - p_t| over the arm's positions, in whatever unit.

        Raises:
            SessionError: the method reads no motion, there was no step, this is the second call after it, or
                `distance` is negative, not finite, or of another number of rows.
        """
        if not self.method.motion:
            raise SessionError(
                f"moved(...) was called, but {type(self.method).__name__} as it was made prunes whatever the arm does; "
                "leave the call out, or attach a method with a motion gate, such as TextQuery(gate=3)."
            )
        memory = self.memory
        if memory is None:
            raise SessionError("moved(...) was called before the first control step; call it after each.")
        self.memory = memory.moved(distance)

    @property
    def kept(self) -> Tensor | None:
        """(B, k) int64, sorted ids of the visual tokens kept in the last control step; None where it was not pruned."""
        return None if self._step is None or self._step.kept is None else self._own(self._step.kept)

    @property
    def scores(self) -> dict[str, Tensor]:
        """Scores (B, M) float32 of the last control step, those of "semantic" and "action" that the method reads.

        A token counts 0 in the action score of every layer that lacks it.
        """
        if self._step is None:
            return {}
        found = {"semantic": self._step.semantic, "action": self._step.action}
        return {name: self._own(score) for name, score in found.items() if score is not None}

    @property
    def memory(self) -> Memory | None:
        """Everything carried from step to step, the last control step included; None before the first one.

        A value: save it, hand it to another session, or put it back later (one per robot). Setting it replaces all
        history.

        Raises:
            SessionError: what is set is no memory, or one of a method with another window.
        """
        step = self._step
        if step is None or step.closed:
            return self._memory
        keeps, needs = self.method.remembers_semantic, self.method.needs
        if step.running or (step.action is None and "action" in needs) or (step.semantic is None and keeps):
            # A call failed, or nothing acted: no control step came of it.
            return step.memory
        scores = self._scores_after(step) if step.remembered is None else step.remembered
        return step.memory.advance({name: self._own(score) for name, score in scores.items()}, step.kept is not None)

    @memory.setter
    def memory(self, memory: Memory | None) -> None:
        self.turn.check()
        if memory is not None:
            check_memory(memory, self.method)
        self._memory = memory
        if self.reuse is not None:
            self.reuse.forget()
        if self._step is not None:
            self._step.closed = True

    @property
    def step(self) -> Step | None:
        """The control step that is running, or the last one."""
        return self._step

    def timed(self) -> AbstractContextManager[Any]:
        """The clock's context for work that pruning adds."""
        no_clock = self.clock is None or torch.compiler.is_compiling()
        return nullcontext() if no_clock else self.clock("pruning")  # type: ignore[misc]

    def in_graph(self, name: str, function: Callable[..., Any], given: Tensor, *args: Any) -> Any:
        """`function(*args)`, as a program where the session is compiled; see `Compiled.run`."""
        if self._compiled is None or self.whole:
            return function(*args)
        return self._compiled.run(name, function, given, *args)

    def open_call(self, call: Call) -> bool:
        """A call of the decoder begins; returns whether it runs the prompt. A prefill closes the last control step and
        opens the next.

        Raises:
            SessionError: the batch or the number of visual tokens is not the memory's, no step is open for a decode
                call, or a decode call has more than one position.
        """
        step = self._step
        if self.whole:
            assert step is not None
            step.begin_call()
            return step.prefilling
        if not self._family.opens_step(call):
            if step is not None:
                step.check_thread()
            if step is not None and self._family.repeats_prompt(call):
                if step.layout.length != call.length:
                    raise SessionError(
                        f"The prompt of this control step has {step.layout.length} positions, but it was run again "
                        f"with {call.length}."
                    )
                step.prefilling = True
                step.begin_call()
                return True
            if step is None or step.prefilling:
                raise SessionError(
                    f"The decoder was called with {call.length} positions, too few to hold the visual tokens, while no "
                    "control step is open. With a session attached, each one begins with the whole prompt in one call."
                )
            if call.length != 1:
                raise SessionError(
                    f"The decoder was called with {call.length} positions after the prompt; it decodes one at a "
                    "time. A prompt in several pieces and speculative decoding are not supported."
                )
            step.begin_call()
            return False
        layout, rows, budgets = self._planner.plan(call)
        memory = self.memory
        if memory is None:
            memory = empty_memory(self.method, layout, call.device)
            if self._episode is not None and len(self._episode) == layout.rows:
                memory = replace(memory, episode=self._episode)
        if (memory.rows, memory.tokens) != (layout.rows, layout.tokens):
            raise SessionError(
                f"The memory holds {memory.rows} rows of {memory.tokens} visual tokens, but the model was called with "
                f"{layout.rows} rows of {layout.tokens}; call reset() first, or set session.memory to these rows' own."
            )
        if step is not None and self._memory is not None and step.layout.cameras != layout.cameras:
            raise SessionError(
                f"The cameras {self._family.cameras} had {step.layout.cameras} visual tokens and now have "
                f"{layout.cameras}, so what is remembered of them no longer fits. Call reset(), or have the policy put "
                "blank images in the places of absent cameras (LeRobot's SmolVLA: config.empty_cameras)."
            )
        self._memory = memory = memory.to(call.device)
        # Decided here, on the host, since the layers may run as a graph.
        prunes = self.method.prunes(memory)
        if self.reuse is not None:
            prunes = self.reuse.begin(layout, list(self.stages.values())[-1]) and prunes
        if self._compiled is not None:
            methods = [stage.method for stage in self.stages.values()]
            if any(method.queries in ("text", "raters") or "relevance" in method.needs for method in methods):
                layout.text()  # raises here what a graph cannot
            self._compiled.begin_step()
        steps = memory.steps.to(layout.valid.device, non_blocking=True)
        self._step = Step(layout, memory, steps, prunes, budgets, rows)
        return True

    def finish(self) -> None:
        """The last call of a control step that is one graph came back: what its memory will be is part of the graph."""
        assert self._step is not None
        self._step.remembered = self._scores_after(self._step)

    @own_arithmetic
    def _scores_after(self, step: Step) -> dict[str, Tensor]:
        semantic = step.semantic if self.method.remembers_semantic else None
        return step.memory.scores_after(step.action, step.seen, semantic)

    def choose(self, hidden: Tensor, layer: int) -> Shortening | None:
        """Decide, at a pruning layer, what becomes of the sequence; None: nothing changes.

        Args:
            hidden: (B, n, D) hidden states as they enter the layer, of all positions that are live so far.
            layer: its index.
        """
        step, stage = self._step, self.stages[layer]
        assert step is not None
        if layer in step.chosen:
            return step.shortening_at(layer)
        step.chosen.add(layer)
        budgets = step.budgets[layer]
        if sum(budgets) >= sum(step.counts) or not step.prunes:
            return step.shortening
        ids = self._select(stage, step, hidden, budgets)
        step.shorten(layer, ids, budgets, freeze=self.method.pruned != "drop")
        return step.shortening

    @own_arithmetic
    def _select(self, stage: Stage, step: Step, hidden: Tensor, budgets: tuple[int, ...]) -> Tensor:
        return stage.select(self._evidence(step, stage.method, hidden), step.counts, list(budgets))

    def _evidence(self, step: Step, method: Method, hidden: Tensor) -> Evidence:
        """What `method` reads, on the visual tokens that are live so far."""
        similarity = None if self.reuse is None else self.reuse.similarity
        evidence = Evidence(
            step.layout.valid, step.memory, step.semantic, step.embeddings, similarity, step.steps, step.relevance
        )
        if step.kept is not None:
            evidence = evidence.of(step.kept)
        return replace(evidence, features=step.visual_rows(hidden)) if "features" in method.needs else evidence

    @own_arithmetic
    def see_embeddings(self, hidden: Tensor) -> None:
        """The first layer's input (B, N, D) of a prefill, for methods that compare tokens there."""
        step = self._step
        if step is None:
            return
        for stage in self.stages.values():
            if stage.method.queries == "raters" or stage.method.needs & {"embeddings", "relevance"}:
                with self.timed():
                    step.see_embeddings(stage.method, hidden)

    @own_arithmetic
    def record_semantic(self, layer: int, attention: Attention) -> None:
        """The layer before the pruning layer `layer` attended; the prompt's first run in a control step counts."""
        step, method = self._step, self.stages[layer].method
        if step is not None and step.prefilling and (step.semantic is None or layer not in step.chosen):
            with self.timed():
                step.add_semantic(attention, method.queries, method.attention == "logits")

    @own_arithmetic
    def record_decoder(self, layer: int, attention: Attention) -> None:
        """A layer of the decoder whose rows act attended."""
        step = self._step
        if step is None or step.closed:
            return
        with self.timed():
            rows = step.action_rows_at(layer) if step.prefilling else None
            step.add_action(layer, attention, rows, decoding=True)

    @own_arithmetic
    def record_reader(self, layer: int, attention: Attention) -> None:
        """A layer of an expert attended to what the decoder's layer of this index cached."""
        step = self._step
        if step is None or step.closed:
            return
        with self.timed():
            rows = self._family.reader_rows(attention.query.shape[2], attention.query.shape[0], attention.query.device)
            step.add_action(layer, attention, rows)

    def _own(self, tensor: Tensor) -> Tensor:
        """A tensor that the next control step does not overwrite, as CUDA graphs do their results."""
        return tensor if self._compiled is None or tensor.device.type == "cpu" else tensor.clone()

    def _remove(self) -> None:
        compiled, self._compiled = self._compiled, None
        parts = (compiled, self._replaced, self._wiring, self.reuse, self._family)
        undo(*(part.remove for part in parts if part is not None))
