"""Runs the control steps of a session: opens them, has the method choose, gathers its evidence, and remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vla_pruner.attach.arithmetic import own_arithmetic
from vla_pruner.attach.control_step import NOT_OPEN, ControlStep, Phase
from vla_pruner.attach.encoder import PatchReuse, encoder_of
from vla_pruner.attach.family import Call, Family
from vla_pruner.attach.layout import Layout
from vla_pruner.attach.recorder import Attention
from vla_pruner.attach.reuse import Reuse
from vla_pruner.attach.shortening import Shortening
from vla_pruner.attach.stages import Planner, Stage, stages_of
from vla_pruner.attach.turn import Turn
from vla_pruner.errors import SessionError
from vla_pruner.methods.base import Evidence, Method
from vla_pruner.methods.encoder_reuse import EncoderReuse
from vla_pruner.methods.memory import Memory
from vla_pruner.wording import a_type

if TYPE_CHECKING:
    from vla_pruner.attach.compiled import Compiled
    from vla_pruner.attach.session import Session
    from vla_pruner.attach.trial import Trial

Clock = Callable[[str], AbstractContextManager[Any]]


class Runner:
    """The host of a session's wiring (`attach.host.Host`): owns the memory and the control step that is running.

    Args:
        method: chooses the tokens.
        family: of the model.
        encoder: the choice of the patches that the vision encoder encodes; None: all.

    Attributes:
        stages: the stages of the method by their layer, the first one first.
        reuse: the keys and values of the last control step, for methods that reuse them.
        encoder: the patches that the vision encoder reuses; None: it is as it was.
        turn: lets one thread at a time into a control step.
        clock: None, or a function that is entered as `with clock("pruning")` around scoring, selecting and gathering.
        compiled: the compiled calls of the model; None if they are not compiled.
        trial: times unpruned and pruned control steps in turns; None if no trial was requested.
        whole: True while a control step that is one graph runs, or is traced; it was opened before.
        aside: True while a call runs that is no part of a control step.
        session: the session while it is attached. Every hook leads to this runner, so that a session whose handle is
            lost lives on the model, where `detach(model)` finds it.

    Raises:
        BudgetError: the method does not fit the model.
        UnsupportedModelError: the method reuses keys and values, and the family does not know its images; or patches
            are to be reused, and it does not know its vision encoder.
        OptionError: `encoder` is no EncoderReuse, or does not go with the method.
    """

    def __init__(self, method: Method, family: Family, encoder: EncoderReuse | None = None) -> None:
        self.method = method
        self.family = family
        self.stages = stages_of(method, family)
        self.reuse = Reuse(family) if method.fate.needs_last_step else None
        self.encoder = None
        if encoder is not None:
            self.encoder = PatchReuse(encoder, encoder_of(family, method, encoder), self._last_action)
        self.turn = Turn()
        self.clock: Clock | None = None
        self.compiled: Compiled | None = None
        self.trial: Trial | None = None
        self.whole = False
        self.aside = False
        self.session: Session | None = None
        self._planner = Planner(family, self.stages)
        self._episode: Tensor | None = None
        self._memory: Memory | None = None
        self._step: ControlStep | None = None

    @property
    def step(self) -> ControlStep | None:
        """The control step that is running, or the last one."""
        return self._step

    def open_step(self) -> ControlStep:
        """Return the control step that is running.

        Raises:
            SessionError: there is none.
        """
        if self._step is None:
            raise SessionError(
                "A layer of the decoder ran while no control step is open: it was called by itself, or the method was "
                "attached while a step ran in another thread. Run the whole policy, or detach first."
            )
        return self._step

    def timed(self) -> AbstractContextManager[Any]:
        """Return the clock's context for work that pruning adds."""
        no_clock = self.clock is None or torch.compiler.is_compiling()
        return nullcontext() if no_clock else self.clock("pruning")  # type: ignore[misc]

    def in_graph(self, name: str, function: Callable[..., Any], given: Tensor, *args: Any) -> Any:
        """Return `function(*args)`, as a program if the session is compiled; see `Compiled.run`."""
        if self.compiled is None or self.whole:
            return function(*args)
        return self.compiled.run(name, function, given, *args)

    @contextmanager
    def as_one_graph(self) -> Iterator[None]:
        """Within it, a control step that was opened runs as one graph."""
        self.whole = True
        try:
            yield
        finally:
            self.whole = False

    # Calls of the model.

    def enter_decoder(self, call: Call) -> bool:
        """Begin a call of the decoder; return whether it runs the prompt.

        Raises:
            SessionError: see `open_call`; or another thread is within a control step.
        """
        if self.whole:
            step = self.open_step()
            if step.in_prompt():
                return True  # its call began as the step was opened
            step.enter_call(call.length)
            return False
        self.turn.begin_call()
        with self.timed():
            return self.open_call(call)

    def enter_aside(self) -> None:
        """Begin a call of the decoder that is no part of a control step.

        Raises:
            SessionError: another thread is within a control step.
        """
        self.turn.begin_call()
        if self._step is not None and self._step.running:
            self._step.close()  # its own call failed, and attention of this call is no part of it
        self.aside = True

    def enter_reader(self) -> None:
        """Begin a call of an expert.

        Raises:
            SessionError: no prompt came back before; or another thread is within a control step.
        """
        self.turn.begin_call()
        if self._step is not None:
            self._step.check_thread()
            self._step.enter_call()

    def leave_call(self) -> None:
        """End the call."""
        if self._step is not None:
            with self.timed():
                self._step.leave_call()

    def end_turn(self) -> None:
        """End the turn of a call that came back or failed."""
        if not self.whole and self.turn.end_call():
            self.aside = False

    def open_call(self, call: Call) -> bool:
        """Begin a call of the decoder; returns whether it runs the prompt. A prefill closes the last control step and
        opens the next.

        Raises:
            SessionError: the batch or the number of visual tokens is not the memory's, no step is open for a decode
                call, or a decode call has more than one position.
        """
        if self.family.opens_step(call):
            self._open(call)
            return True
        step = self._step
        if step is None:
            raise SessionError(NOT_OPEN.format(length=call.length))
        step.check_thread()
        if self.family.repeats_prompt(call):
            step.repeat_prompt(call.length)
            return True
        if call.length != 1 and step.phase is Phase.ACTING:
            raise SessionError(
                f"The decoder was called with {call.length} positions after the prompt; it decodes one at a time. A "
                "prompt in several pieces and speculative decoding are not supported."
            )
        step.enter_call(call.length, self.family.still_acting())
        return False

    def _open(self, call: Call) -> None:
        layout, rows, budgets = self._planner.plan(call)
        self._memory = memory = self._memory_for(layout, call.device)
        # Decided here, on the host, since the layers may run as a graph.
        prunes = self.method.prunes(memory)
        if self.reuse is not None:
            prunes = self.reuse.begin(layout, list(self.stages.values())[-1]) and prunes
        if self.trial is not None:
            prunes = self.trial.prunes(layout.rows, prunes)
        if self.compiled is not None:
            self._check_text(layout)
            self.compiled.begin_step()
        steps = memory.steps.to(layout.valid.device, non_blocking=True)
        if self._step is not None:
            self._step.close()
        self._step = ControlStep(layout, memory, steps, prunes, budgets, rows)

    def _check_text(self, layout: Layout) -> None:
        """Raise SessionError if the method reads text and there is none: a graph could not raise it."""
        methods = [stage.method for stage in self.stages.values()]
        if any(method.queries in ("text", "raters") or "relevance" in method.needs for method in methods):
            layout.text()

    @contextmanager
    def opened_for_export(self, call: Call, prunes: bool) -> Iterator[Opened]:
        """Yield functions that open and finish control steps of this call for tracing; restore the state afterwards."""
        before = self._step, self._memory, self.whole
        layout, rows, budgets = self._planner.plan(call)
        self._check_text(layout)
        # Copies, since a program cannot hold tensors made in inference mode, and the family's layout may have some.
        held: dict[str, Any] = {field.name: getattr(layout, field.name) for field in fields(layout)}
        held |= {name: value.clone() for name, value in held.items() if isinstance(value, Tensor)}
        layout = Layout(**held)
        rows = None if rows is None else rows.clone()
        empty = self._empty_memory(layout, call.device)

        def begin(memory: Memory, steps: Tensor) -> None:
            self._step = ControlStep(layout, memory, steps, prunes, budgets, rows)

        def finish() -> tuple[Tensor | None, dict[str, Tensor]]:
            step = self.open_step()
            return step.kept, self._scores_after(step)

        try:
            with self.as_one_graph():
                yield Opened(empty, begin, finish)
        finally:
            self._step, self._memory, self.whole = before

    # Evidence and choice.

    @own_arithmetic
    def see_embeddings(self, hidden: Tensor) -> None:
        """Note the first layer's input (B, N, D) of a prompt, for methods that compare tokens there."""
        step = self._step
        if step is None:
            return
        for stage in self.stages.values():
            if stage.method.queries == "raters" or stage.method.needs & {"embeddings", "relevance"}:
                with self.timed():
                    step.see_embeddings(stage.method, hidden)

    def choose(self, hidden: Tensor, layer: int) -> Shortening | None:
        """Decide, at a pruning layer, the sequence from there on; None: nothing changes.

        Args:
            hidden: (B, n, D) hidden states as they enter the layer, of all positions that are live so far.
            layer: its index.
        """
        step = self.open_step()
        if step.begin_choice(layer):
            live = self._select(self.stages[layer], step, hidden, step.budgets[layer])
            step.shorten(layer, live, readable=self.method.fate.readable)
        return step.shortening_at(layer)

    @own_arithmetic
    def _select(self, stage: Stage, step: ControlStep, hidden: Tensor, budgets: tuple[int, ...]) -> Tensor:
        return stage.select(self._evidence(step, stage.method, hidden), step.counts, list(budgets))

    def _evidence(self, step: ControlStep, method: Method, hidden: Tensor) -> Evidence:
        """Return the evidence that `method` reads, on the visual tokens that are live so far."""
        similarity = None if self.reuse is None else self.reuse.similarity
        evidence = Evidence(
            step.layout.valid, step.memory, step.semantic, step.embeddings, similarity, step.steps, step.relevance
        )
        if step.kept is not None:
            evidence = evidence.of(step.kept)
        return replace(evidence, features=step.visual_rows(hidden)) if "features" in method.needs else evidence

    @own_arithmetic
    def record_semantic(self, layer: int, attention: Attention) -> None:
        """The layer before the pruning layer `layer` attended; the prompt's first run in a control step counts."""
        step, method = self._step, self.stages[layer].method
        if step is None or step.phase is not Phase.PROMPT:
            return
        if step.semantic is None or layer not in step.chosen:
            with self.timed():
                step.add_semantic(attention, method.queries, method.attention == "logits")

    @own_arithmetic
    def record_decoder(self, layer: int, attention: Attention) -> None:
        """Record the attention of a layer of the decoder whose rows act."""
        step = self._step
        if step is None or not step.reads:
            return
        with self.timed():
            rows = step.action_rows_at(layer) if step.phase is Phase.PROMPT else None
            step.add_action(layer, attention, rows, decoding=True)

    @own_arithmetic
    def record_reader(self, layer: int, attention: Attention) -> None:
        """Record an expert's attention to the cache of the decoder's layer of this index."""
        step = self._step
        if step is None or not step.reads:
            return
        with self.timed():
            rows = self.family.reader_rows(attention.query.shape[2], attention.query.shape[0], attention.query.device)
            step.add_action(layer, attention, rows)

    # Memory.

    @property
    def memory(self) -> Memory | None:
        """Everything that is carried from step to step, the last control step included; None before the first one."""
        step = self._step
        if step is None or step.phase is Phase.CLOSED:
            return self._memory
        keeps, needs = self.method.remembers_semantic, self.method.needs
        if step.running or (step.action is None and "action" in needs) or (step.semantic is None and keeps):
            # A call failed, or nothing acted: no control step came of it.
            return step.memory
        scores = self._scores_after(step) if step.remembered is None else step.remembered
        return step.memory.advance({name: self.own(score) for name, score in scores.items()}, step.kept is not None)

    @memory.setter
    def memory(self, memory: Memory | None) -> None:
        self.turn.check()
        if memory is not None:
            check_memory(memory, self.method)
        self.forget_images()
        self._set_memory(memory)

    def amend(self, memory: Memory) -> None:
        """Replace the memory by one of the same rows in the same episode: what the last control step left stays.

        Raises:
            SessionError: another thread is within a control step.
        """
        self.turn.check()
        self._set_memory(memory)

    def _set_memory(self, memory: Memory | None) -> None:
        self._memory = memory
        if self._step is not None:
            self._step.close()

    def forget(self) -> None:
        """Begin a new episode for all rows."""
        memory = self.memory
        if memory is not None:
            self._episode = memory.episode + 1
        if self._step is not None:
            self._step.close()
        self._memory = self._step = None
        self.forget_images()

    def finish(self) -> None:
        """The last call of a control step that is one graph came back: its memory's update is part of the graph."""
        step = self.open_step()
        step.finish(self._scores_after(step))

    def settle(self) -> None:
        """Compute the reads that the last control step put off, and release the cache that they need."""
        if self._step is not None:
            self._step.settle()

    def own(self, tensor: Tensor) -> Tensor:
        """Return a tensor that the next control step does not overwrite, as CUDA graphs do their results."""
        return tensor if self.compiled is None or tensor.device.type == "cpu" else tensor.clone()

    @own_arithmetic
    def _scores_after(self, step: ControlStep) -> dict[str, Tensor]:
        semantic = step.semantic if self.method.remembers_semantic else None
        return step.memory.scores_after(step.action, step.seen, semantic)

    def forget_images(self) -> None:
        """Have the next control step reuse nothing of the images before it."""
        for held in (self.reuse, self.encoder):
            if held is not None:
                held.forget()

    def _last_action(self) -> tuple[Tensor, tuple[int, ...]] | None:
        """Return the action scores (B, M) of the last control step and its visual tokens by camera; None if the method
        reads none.
        """
        step, memory = self._step, self.memory
        if step is None or memory is None or not memory.window:
            return None
        return memory.action[:, -1], step.layout.cameras

    def _memory_for(self, layout: Layout, device: torch.device) -> Memory:
        """Return the memory with which a control step of this layout opens.

        Raises:
            SessionError: the memory is of other rows or of other visual tokens.
        """
        memory = self.memory
        if memory is None:
            memory = self._empty_memory(layout, device)
            if self._episode is not None and len(self._episode) == layout.rows:
                memory = replace(memory, episode=self._episode)
        if (memory.rows, memory.tokens) != (layout.rows, layout.tokens):
            raise SessionError(
                f"The memory holds {memory.rows} rows of {memory.tokens} visual tokens, but the model was called with "
                f"{layout.rows} rows of {layout.tokens}; call reset() first, or set session.memory to these rows' own."
            )
        step = self._step
        if step is not None and self._memory is not None and step.layout.cameras != layout.cameras:
            raise SessionError(
                f"The cameras {self.family.cameras} had {step.layout.cameras} visual tokens and now have "
                f"{layout.cameras}, so what is remembered of them no longer fits. Call reset(), or have the policy put "
                "blank images in the places of absent cameras (LeRobot's SmolVLA: config.empty_cameras)."
            )
        return memory.to(device)

    def _empty_memory(self, layout: Layout, device: torch.device) -> Memory:
        method = self.method
        return Memory.empty(
            layout.rows,
            method.history,
            layout.tokens,
            device,
            semantic=method.remembers_semantic,
            motion=method.motion,
        )


@dataclass(frozen=True)
class Opened:
    """Functions that open and finish a control step that is traced.

    Attributes:
        memory: the memory at the beginning of an episode.
        begin: opens the step with a memory and its steps (B,) int64 on the device.
        finish: returns the kept tokens (B, k) (None: the step is not pruned) and the scores remembered after the step.
    """

    memory: Memory
    begin: Callable[[Memory, Tensor], None]
    finish: Callable[[], tuple[Tensor | None, dict[str, Tensor]]]


def check_memory(memory: Any, method: Method) -> None:
    """Raise SessionError unless `memory`, which was set, is one of `method`."""
    if not isinstance(memory, Memory):
        raise SessionError(f"session.memory was set to {a_type(memory)}; set a Memory, or None.")
    if memory.holds_semantic != method.remembers_semantic:
        raise SessionError(
            "session.memory was set to one of a method that prunes at another layer: with layer=0 a memory holds "
            "semantic scores too, with others it does not."
        )
    if memory.window != method.history:
        raise SessionError(
            f"session.memory was set to one that holds {memory.window} control steps of scores, but this method's "
            f"holds {method.history}; it is another method's memory."
        )
    if memory.motion.shape[1] != method.motion:
        raise SessionError(
            f"session.memory was set to one that holds the motion of {memory.motion.shape[1]} control steps, but this "
            f"method reads that of {method.motion}; it is another method's memory."
        )
