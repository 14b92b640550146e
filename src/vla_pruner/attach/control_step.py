"""One control step: its phases, its decisions and measurements, and its part of a compiled program's key."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum
from threading import get_ident

import torch
from torch import Tensor

from vla_pruner.attach.arithmetic import own_arithmetic
from vla_pruner.attach.graph_key import graph_key, not_in_key
from vla_pruner.attach.layout import Layout
from vla_pruner.attach.reads import CallReads, DeferredReads, note
from vla_pruner.attach.recorder import Attention, known_rows, rows_of
from vla_pruner.attach.shortening import Shortening
from vla_pruner.errors import SessionError
from vla_pruner.methods.base import Method, rows_at
from vla_pruner.methods.memory import Memory
from vla_pruner.methods.scores import mean_logits, mean_over_rows

NOT_OPEN = (
    "The decoder was called with {length} positions, too few to hold the visual tokens, while no control step is open. "
    "With a session attached, each one begins with the whole prompt in one call."
)
CLOSED = (
    "A call went on after its control step was closed: session.memory was set in the middle of it. Set the memory "
    "between control steps."
)


class Phase(Enum):
    """The state of a control step.

    PROMPT: the prompt runs. Layers are shortened, and the semantic score is read.
    ACTING: the prompt came back. Tokens are decoded, or an expert reads the prompt's cache.
    CLOSED: nothing that is read counts any more, and no call may begin.
    """

    PROMPT = "prompt"
    ACTING = "acting"
    CLOSED = "closed"


@dataclass
class ControlStep:
    """One control step. It opens with the prompt's call; only its own methods change it.

    ```
    open --> PROMPT --leave_call--> ACTING --close--> CLOSED
               ^                      |  ^
               +----repeat_prompt-----+  +-- enter_call, leave_call: once for each token or denoising step
    ```

    A step that failed stays in its phase with its call unfinished (`running`); `close` is legal in every phase.

    The key of the compiled programs is derived from the fields (`graph_key`): a new field is part of it, unless its
    metadata says why no program depends on it.

    Attributes:
        layout: the places of visual tokens and text in the sequence.
        memory: the rows' memory when the step opened.
        steps: (B,) int64, the control steps of each row before this one, on the device of the scores: copied once,
            before any graph runs.
        prunes: whether the method prunes this step.
        budgets: how many tokens each stage keeps, of each camera or of all together, by its layer.
        action_rows: (B, R) prompt positions whose attention is action attention; None if there are none.
        phase: the state of the step.
        call: the reads so far of the call that is running; None between calls.
        kept: (B, k) sorted ids of the visual tokens kept by the last stage so far; None if the step is not pruned.
        counts: how many those are of each camera, or of all together.
        shortenings: the sequence after each stage, by the layer from which on it holds.
        embeddings: (B, M, D) visual tokens as they enter the first layer, if the method asks for them.
        raters: (B, N) weights of the prompt rows over which the semantic score averages, if the method chooses them.
        relevance: (B, M) float32 how well visual tokens fit the text, if the method asks for it.
        semantic: (B, M) float32 semantic score read last, if the method asks for it.
        frozen_hidden: (B, N - n, D) hidden states of the readable tokens as they entered the layer from which on they
            are not updated; None without any, and outside of the prompt.
        chosen: pruning layers at which the choice is made already.
        remembered: the memory's scores after a step that is one graph; None until they are computed.
        thread: the thread that opened the step.
    """

    layout: Layout
    memory: Memory = field(metadata=not_in_key("its shapes are the method's and the layout's, its dtypes are fixed"))
    steps: Tensor | None = None
    prunes: bool = True
    budgets: dict[int, tuple[int, ...]] = field(default_factory=dict)
    action_rows: Tensor | None = None
    phase: Phase = Phase.PROMPT
    kept: Tensor | None = None
    counts: tuple[int, ...] = ()
    shortenings: dict[int, Shortening] = field(default_factory=dict)
    embeddings: Tensor | None = None
    raters: Tensor | None = None
    relevance: Tensor | None = None
    semantic: Tensor | None = None
    frozen_hidden: Tensor | None = None
    chosen: tuple[int, ...] = ()
    remembered: dict[str, Tensor] | None = None
    call: CallReads | None = field(
        default_factory=CallReads, metadata=not_in_key("it is empty when a call begins, and no program begins later")
    )
    thread: int = field(
        default_factory=get_ident, metadata=not_in_key("which thread runs a program changes nothing in it")
    )
    _columns: dict[int, Tensor] = field(
        default_factory=dict, metadata=not_in_key("calls are added between programs; a step that is one starts empty")
    )
    _deferred: DeferredReads = field(
        default_factory=DeferredReads, metadata=not_in_key("rows are added between programs, and never within one")
    )
    _rows_read: int = field(default=0, metadata=not_in_key("calls are counted between programs"))
    _idle: Tensor | None = field(default=None, metadata=not_in_key("calls are counted between programs"))
    _known: tuple[int, Tensor] | None = field(
        default=None, metadata=not_in_key("the score so far, which is asked for between programs or of one that ends")
    )
    _short_action_rows: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = self.layout.cameras

    @property
    def graph_key(self) -> tuple[Hashable, ...]:
        """Everything that the course of a call depends on, besides the shapes of its arguments."""
        return graph_key(self)

    # Transitions.

    def repeat_prompt(self, length: int) -> None:
        """Begin a call that runs the whole prompt again: ACTING -> PROMPT.

        Args:
            length: its positions.

        Raises:
            SessionError: the step is in another phase, or the prompt had another length.
        """
        self._check_acting(length)
        if self.layout.length != length:
            raise SessionError(
                f"The prompt of this control step has {self.layout.length} positions, but it was run again with "
                f"{length}."
            )
        self.phase = Phase.PROMPT
        self.call = CallReads()

    def enter_call(self, length: int = 1, still_acting: Tensor | None = None) -> None:
        """Begin a call of the decoder or of an expert after the prompt: ACTING -> ACTING.

        Args:
            length: its positions.
            still_acting: (B,) bool, the rows whose attention counts; None: all rows.

        Raises:
            SessionError: the step is in another phase.
        """
        self._check_acting(length)
        self.call = CallReads(still_acting)

    @own_arithmetic
    def leave_call(self) -> None:
        """End the call, whose reads count: PROMPT -> ACTING, ACTING -> ACTING.

        Raises:
            SessionError: no call is running, or the step was closed meanwhile.
        """
        call = self.call
        if self.phase is Phase.CLOSED:
            raise SessionError(CLOSED)
        if call is None:
            raise SessionError("A call of the decoder came back that never began; run the whole policy.")
        self.call = None
        for stage, columns in call.columns.items():
            self._add_columns(call.counted(columns), stage)
        self._rows_read += call.count
        if call.still_acting is not None:
            idle = (call.count + len(call.notes)) * (~call.still_acting).to(self.layout.visual.device).float()
            self._idle = idle if self._idle is None else self._idle + idle
        for row in call.notes:
            prompt = self._prompt_columns(row.stage)
            if row.call.key.shape[2] == prompt + self._deferred.rows(row.layer, row.stage):
                self._deferred.add(row, call.still_acting)
            else:
                # A static cache has room for more, and may be emptied before the score is asked for.
                columns = row.columns()[:, :prompt].to(self.layout.visual.device)
                self._add_columns(call.counted(columns), row.stage)
                self._rows_read += 1
        if self.phase is Phase.PROMPT:
            self.phase, self.frozen_hidden = Phase.ACTING, None

    def finish(self, remembered: dict[str, Tensor]) -> None:
        """End the last call of a step that is one graph.

        Args:
            remembered: the memory's scores after the step, which are part of the graph.

        Raises:
            SessionError: the step is not ACTING.
        """
        self._check_acting(1)
        self.remembered = remembered

    def close(self) -> None:
        """End the step, whose scores are in the memory or were discarded with it: any phase -> CLOSED."""
        self.phase = Phase.CLOSED

    def in_prompt(self) -> bool:
        """Return True if a layer that runs now belongs to the prompt.

        Raises:
            SessionError: the step was closed while the layer's call ran.
        """
        if self.phase is Phase.CLOSED:
            raise SessionError(CLOSED)
        return self.phase is Phase.PROMPT

    @property
    def running(self) -> bool:
        """True if a call began and did not come back: it runs, or it failed."""
        return self.call is not None

    @property
    def reads(self) -> bool:
        """True if attention that is read now counts: a call runs, and the step is not closed."""
        return self.call is not None and self.phase is not Phase.CLOSED

    def check_thread(self) -> None:
        """Raise SessionError unless this is the thread that opened the step."""
        if self.thread != get_ident():
            raise SessionError(
                "A control step was begun in one thread and went on in another, or two threads decode in turns; a "
                "control step runs in one thread."
            )

    def _check_acting(self, length: int) -> None:
        if self.phase is Phase.CLOSED:
            raise SessionError(CLOSED)
        if self.phase is not Phase.ACTING:
            raise SessionError(NOT_OPEN.format(length=length))

    # Decisions, while the prompt runs.

    def see_embeddings(self, method: Method, hidden: Tensor) -> None:
        """Note the part of the first layer's input (B, N, D) of a prompt that `method` reads; known parts stay."""
        layout, visual = self.layout, self.visual_rows(hidden)
        if self.embeddings is None and "embeddings" in method.needs:
            self.embeddings = visual
        if self.raters is None and method.queries == "raters":
            self.raters = method.raters(visual, layout.valid, hidden, layout.text())
        if self.relevance is None and "relevance" in method.needs:
            self.relevance = method.text_relevance(visual, hidden, layout.text())

    def begin_choice(self, layer: int) -> bool:
        """Return whether tokens are to be chosen at a pruning layer that is reached.

        That is so once in a control step, if it is pruned and fewer tokens stay than are left.

        Raises:
            SessionError: the prompt does not run.
        """
        if not self.in_prompt():
            raise SessionError("Tokens are chosen while the prompt runs; run the whole policy.")
        if layer in self.chosen:
            return False
        self.chosen = (*self.chosen, layer)
        return self.prunes and sum(self.budgets[layer]) < sum(self.counts)

    def shorten(self, layer: int, live: Tensor, readable: bool) -> None:
        """Keep fewer visual tokens from a layer on.

        Args:
            layer: its index.
            live: (B, k) sorted places of those that stay, among the ones kept so far.
            readable: whether the others stay readable.
        """
        self.kept = live if self.kept is None else self.kept.gather(1, live)
        self.counts = self.budgets[layer]
        shortening = Shortening(self.layout, self.kept, readable, before=self.shortening)
        self.shortenings[layer] = shortening
        if self.action_rows is not None:
            self._short_action_rows[len(self.shortenings)] = shortening.row_index(self.action_rows)

    def enter(self, shortening: Shortening, hidden: Tensor) -> Tensor:
        """Hidden states (B, n, D) of the live tokens as they go on from a pruning layer; those of the readable ones
        stay here.

        Args:
            shortening: the sequence from that layer on.
            hidden: as it enters the layer, of all positions that were live so far.
        """
        live, self.frozen_hidden = shortening.enter(hidden, self.frozen_hidden)
        return live

    def freeze(self, hidden: Tensor) -> None:
        """Keep the hidden states (B, N - n, D) of readable tokens that never enter a layer."""
        self.frozen_hidden = hidden

    # Decisions, to read.

    @property
    def shortening(self) -> Shortening | None:
        """The sequence as the last stage so far left it; None if the step is not pruned."""
        return self._shortening(len(self.shortenings)) if self.shortenings else None

    def shortening_at(self, layer: int) -> Shortening | None:
        """Return the sequence at a layer; None if it is whole."""
        stage = self.stage_at(layer)
        return self._shortening(stage) if stage else None

    def stage_at(self, layer: int) -> int:
        """Return the number of stages up to a layer that shortened the sequence."""
        return len([first for first in self.shortenings if first <= layer])

    def action_rows_at(self, layer: int) -> Tensor | None:
        """Return (B, R) places of the action rows in the prompt's sequence at a layer; None if there are none."""
        stage = self.stage_at(layer)
        return self._short_action_rows[stage] if stage and self.action_rows is not None else self.action_rows

    def visual_rows(self, hidden: Tensor) -> Tensor:
        """Return the visual tokens (B, m, D) of hidden states (B, n, D), of those that are live so far."""
        places, short = self.layout.visual, self.shortening
        if short is not None and self.kept is not None:
            places = short.row_index(places.gather(1, self.kept))
        return rows_at(hidden, places)

    @property
    def seen(self) -> Tensor:
        """(B, M) bool, False for tokens that the action rows could not see: they were dropped, or their camera is
        absent.
        """
        valid = self.layout.valid
        if self.kept is None or self.shortening is None or self.shortening.frozen is not None:
            return valid
        return torch.zeros_like(valid).scatter(1, self.kept, True) & valid

    # Measurements.

    def add_semantic(self, attention: Attention, queries: str, logits: bool = False) -> None:
        """Read the semantic score from the prefill of a layer.

        Args:
            attention: the kernel call.
            queries: the rows that are averaged; see `Method.queries`.
            logits: whether logits are averaged instead of probabilities.
        """
        layout, short, rows = self.layout, self.shortening, None
        if queries == "all":
            weights = layout.reading
        elif queries == "last":
            weights = torch.zeros_like(layout.prompt).scatter(1, layout.last(), True)
        elif queries == "raters":
            assert self.raters is not None
            weights = self.raters
        else:
            weights = layout.text()
        if short is not None:
            # Pruned before the decoder: only the remaining rows have a score.
            weights = short.live_rows(weights)
        device = attention.query.device
        if logits:
            received = mean_logits(attention.query, attention.key, weights.to(device), attention.scaling)
        else:
            if queries != "all":
                # Only rows that are not visual can count here, and their number is known without reading the device.
                most = 1 if queries == "last" else layout.length - layout.tokens
                rows = torch.sort(weights.float(), dim=1, descending=True, stable=True).indices[:, :most]
                weights = weights.gather(1, rows)
            received = mean_over_rows(rows_of(attention, rows), weights.to(device))
        received = received.to(layout.visual.device)
        if short is not None:
            received = short.to_grid(received[:, : short.prefix.shape[1]])
        self.semantic = received.gather(1, layout.visual)

    def add_action(self, layer: int, attention: Attention, rows: Tensor | None, decoding: bool = False) -> None:
        """Add the attention of one layer's action rows.

        Args:
            layer: index of the layer.
            attention: the kernel call.
            rows: (B, R) query rows that act; None if all of them do.
            decoding: the rows are decoded one by one.
        """
        assert self.call is not None
        stage = self.stage_at(layer)
        one = decoding and (attention.query.shape[2] if rows is None else rows.shape[1]) == 1
        # If there is no mask, the kernel's causal rule alone hides a static cache's empty slots.
        hides = attention.causal and attention.key.shape[2] > attention.query.shape[2]
        # In a graph, reading at once costs nothing to speak of.
        if one and not hides and attention.weights is None and not torch.compiler.is_compiling():
            self.call.notes.append(note(layer, stage, attention, rows))
            return
        # Sums stay in the cache's own order of columns until they are read.
        columns = known_rows(attention, rows).mean(dim=(1, 2))[:, : self._prompt_columns(stage)]
        self.call.add(columns.to(self.layout.visual.device), stage)

    @property
    @own_arithmetic
    def action(self) -> Tensor | None:
        """(B, M) float32 action score so far, None before the first action row. Layers that lack a token count as 0."""
        count = self._rows_read + self._deferred.count
        if not count:
            return None
        if self._known is None or self._known[0] != count:
            grids = []
            for stage in range(len(self.shortenings) + 1):
                for columns in (self._columns.get(stage), self._deferred_columns(stage)):
                    if columns is not None:
                        grids.append(self._shortening(stage).to_grid(columns) if stage else columns)
            counted = count if self._idle is None else count - self._idle[:, None]
            score = sum(grids[1:], grids[0]).gather(1, self.layout.visual) / counted
            self._known = (count, score)
        return self._known[1]

    @own_arithmetic
    def settle(self) -> None:
        """Compute the reads that were put off, and release the cache that they need."""
        _ = self.action
        for stage in range(len(self.shortenings) + 1):
            columns = self._deferred_columns(stage)
            if columns is not None:
                self._add_columns(columns, stage)
        self._rows_read += self._deferred.count
        self._deferred = DeferredReads()

    def _deferred_columns(self, stage: int) -> Tensor | None:
        columns = self._deferred.columns(stage, self._prompt_columns(stage))
        return None if columns is None else columns.to(self.layout.visual.device)

    def _add_columns(self, columns: Tensor, stage: int) -> None:
        known = self._columns.get(stage)
        self._columns[stage] = columns if known is None else known + columns

    def _shortening(self, stage: int) -> Shortening:
        return list(self.shortenings.values())[stage - 1]

    def _prompt_columns(self, stage: int) -> int:
        return self._shortening(stage).prefix.shape[1] if stage else self.layout.length
