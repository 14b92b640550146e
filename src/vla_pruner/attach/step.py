"""One control step while it runs: what was measured, and what was decided."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from threading import get_ident

import torch
from torch import Tensor

from vla_pruner.attach.arithmetic import own_arithmetic
from vla_pruner.attach.layout import Layout, Shortening
from vla_pruner.attach.reads import CallReads, DeferredReads, note
from vla_pruner.attach.recorder import Attention
from vla_pruner.errors import SessionError
from vla_pruner.methods.base import Method, rows_at
from vla_pruner.methods.memory import Memory
from vla_pruner.methods.scores import attention_probabilities, mean_logits, mean_over_rows


@dataclass
class Step:
    """One control step: opened by a prefill, closed when the next one opens.

    Attributes:
        layout: where things are in the sequence.
        memory: what the rows remembered when the step opened.
        steps: (B,) int64, how many control steps that was, beside the scores: copied once, before any graph runs.
        prunes: whether the method prunes this step.
        budgets: how many tokens each stage keeps, of each camera or of all together, by its layer.
        action_rows: (B, R) prompt positions whose attention is action attention; None if there are none.
        kept: (B, k) sorted ids of the visual tokens kept by the last stage so far; None if the step is not pruned.
        counts: how many those are of each camera, or of all together.
        shortenings: what the stages did to the sequence, by the layer from which on it holds.
        embeddings: (B, M, D) visual tokens as they enter the first layer, if the method asks for them.
        raters: (B, N) weights of the prompt rows over which the semantic score averages, if the method chooses them.
        relevance: (B, M) float32 how well visual tokens fit the text, if the method asks for it.
        semantic: (B, M) float32 semantic score read last, if the method asks for it.
        frozen_hidden: (B, N - n, D) hidden states of the frozen tokens as they entered the layer that froze them; None
            without any.
        chosen: pruning layers at which it is decided what becomes of the sequence.
        prefilling: the prefill is still running.
        running: a call that belongs to the step has begun and not come back; it stays so where one failed.
        call: what the call that is running has read so far.
        remembered: what the memory's scores are after the step, of a step that is one graph; None: not computed yet.
        closed: its scores are in the memory already, or were discarded with it.
        thread: that opened it.
    """

    layout: Layout
    memory: Memory
    steps: Tensor | None = None
    prunes: bool = True
    budgets: dict[int, tuple[int, ...]] = field(default_factory=dict)
    action_rows: Tensor | None = None
    kept: Tensor | None = None
    counts: tuple[int, ...] = ()
    shortenings: dict[int, Shortening] = field(default_factory=dict)
    embeddings: Tensor | None = None
    raters: Tensor | None = None
    relevance: Tensor | None = None
    semantic: Tensor | None = None
    chosen: set[int] = field(default_factory=set)
    prefilling: bool = True
    running: bool = True
    closed: bool = False
    thread: int = field(default_factory=get_ident)
    frozen_hidden: Tensor | None = None
    call: CallReads = field(default_factory=CallReads)
    remembered: dict[str, Tensor] | None = None
    _columns: dict[int, Tensor] = field(default_factory=dict)
    _deferred: DeferredReads = field(default_factory=DeferredReads)
    _rows_read: int = 0
    _known: tuple[int, Tensor] | None = None
    _short_action_rows: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = self.layout.cameras

    @property
    def shortening(self) -> Shortening | None:
        """What the last stage so far made of the sequence; None if the step is not pruned."""
        return self._shortening(len(self.shortenings)) if self.shortenings else None

    def shortening_at(self, layer: int) -> Shortening | None:
        """What the sequence is at a layer; None: whole."""
        stage = self.stage_at(layer)
        return self._shortening(stage) if stage else None

    def stage_at(self, layer: int) -> int:
        """How many stages made the sequence of a layer what it is."""
        return len([first for first in self.shortenings if first <= layer])

    def action_rows_at(self, layer: int) -> Tensor | None:
        """(B, R) where the action rows are in the prompt's sequence at a layer; None if there are none."""
        stage = self.stage_at(layer)
        return self._short_action_rows[stage] if stage and self.action_rows is not None else self.action_rows

    def shorten(self, layer: int, live: Tensor, counts: tuple[int, ...], freeze: bool) -> None:
        """Keep fewer visual tokens from a layer on.

        Args:
            layer: its index.
            live: (B, k) sorted places of those that stay, among the ones kept so far.
            counts: how many stay of each camera, or of all together.
            freeze: whether the others stay readable.
        """
        self.kept = live if self.kept is None else self.kept.gather(1, live)
        self.counts = counts
        shortening = Shortening(self.layout, self.kept, freeze, before=self.shortening)
        self.shortenings[layer] = shortening
        if self.action_rows is not None:
            self._short_action_rows[len(self.shortenings)] = shortening.row_index(self.action_rows)

    def visual_rows(self, hidden: Tensor) -> Tensor:
        """The visual tokens (B, m, D) of hidden states (B, n, D), of those that are live so far."""
        places, short = self.layout.visual, self.shortening
        if short is not None and self.kept is not None:
            places = short.row_index(places.gather(1, self.kept))
        return rows_at(hidden, places)

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
            score = sum(grids[1:], grids[0]).gather(1, self.layout.visual) / count
            self._known = (count, score)
        return self._known[1]

    @own_arithmetic
    def settle(self) -> None:
        """Compute what was put off, and let go of the cache that it needs."""
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

    @property
    def seen(self) -> Tensor:
        """(B, M) bool, False for tokens that the action rows could not see: they were dropped, or their camera is
        absent.
        """
        valid = self.layout.valid
        if self.kept is None or self.shortening is None or self.shortening.frozen is not None:
            return valid
        return torch.zeros_like(valid).scatter(1, self.kept, True) & valid

    def see_embeddings(self, method: Method, hidden: Tensor) -> None:
        """What `method` reads of the first layer's input (B, N, D) of a prefill; what is known already stays."""
        layout, visual = self.layout, self.visual_rows(hidden)
        if self.embeddings is None and "embeddings" in method.needs:
            self.embeddings = visual
        if self.raters is None and method.queries == "raters":
            self.raters = method.raters(visual, layout.valid, hidden, layout.text())
        if self.relevance is None and "relevance" in method.needs:
            self.relevance = method.text_relevance(visual, hidden, layout.text())

    def add_semantic(self, attention: Attention, queries: str, logits: bool = False) -> None:
        """Read the semantic score from the prefill of a layer; `queries` as in `Method`, `logits` for those instead of
        probabilities.
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
            # Pruned before the decoder: the score is that of what is left.
            weights = short.live_rows(weights)
        device = attention.query.device
        if logits:
            received = mean_logits(attention.query, attention.key, weights.to(device), attention.scaling)
        else:
            if queries != "all":
                # What is not visual is all that can count here; how many that are is known without looking.
                most = 1 if queries == "last" else layout.length - layout.tokens
                rows = torch.sort(weights.float(), dim=1, descending=True, stable=True).indices[:, :most]
                weights = weights.gather(1, rows)
            received = mean_over_rows(_rows_of(attention, rows), weights.to(device))
        received = received.to(layout.visual.device)
        if short is not None:
            received = short.to_grid(received[:, : short.prefix.shape[1]])
        self.semantic = received.gather(1, layout.visual)

    def add_action(self, layer: int, attention: Attention, rows: Tensor | None, decoding: bool = False) -> None:
        """Add what the action rows of one layer attend to.

        Args:
            layer: index of the layer.
            attention: the kernel call.
            rows: (B, R) query rows that act; None if all of them do.
            decoding: the rows are decoded one by one.
        """
        stage = self.stage_at(layer)
        one = decoding and (attention.query.shape[2] if rows is None else rows.shape[1]) == 1
        # A static cache's empty slots are hidden by the kernel's causal rule alone where there is no mask.
        hides = attention.causal and attention.key.shape[2] > attention.query.shape[2]
        # In a graph, reading at once costs nothing to speak of.
        if one and not hides and attention.weights is None and not torch.compiler.is_compiling():
            self.call.notes.append(note(layer, stage, attention, rows))
            return
        # Sums stay in the cache's own order of columns until somebody reads them.
        columns = _known_rows(attention, rows).mean(dim=(1, 2))[:, : self._prompt_columns(stage)]
        self.call.add(columns.to(self.layout.visual.device), stage)

    def state(self) -> tuple[Hashable, ...]:
        """All that the course of a call depends on, besides the shapes of what it is given."""
        return (
            self.prefilling,
            self.prunes,
            self.closed,
            self.semantic is None,
            self.embeddings is None,
            self.raters is None,
            self.relevance is None,
            tuple(sorted(self.chosen)),
            tuple(self.shortenings),
            self.layout.length,
            self.layout.cameras,
            self.layout.absent,
        )

    def check_thread(self) -> None:
        """Raise SessionError unless this is the thread that opened the step."""
        if self.thread != get_ident():
            raise SessionError(
                "A control step was begun in one thread and went on in another, or two threads decode in turns; a "
                "control step runs in one thread."
            )

    def begin_call(self) -> None:
        """A call of the decoder or of an expert begins."""
        self.running = True
        self.call = CallReads()

    @own_arithmetic
    def end_call(self) -> None:
        """The call came back: what it read counts."""
        self.running = False
        call, self.call = self.call, CallReads()
        for stage, columns in call.columns.items():
            self._add_columns(columns, stage)
        self._rows_read += call.count
        for row in call.notes:
            prompt = self._prompt_columns(row.stage)
            if row.call.key.shape[2] == prompt + self._deferred.rows(row.layer, row.stage):
                self._deferred.add(row)
            else:
                # A static cache has room for more, and may be emptied before anybody asks.
                self._add_columns(row.columns()[:, :prompt].to(self.layout.visual.device), row.stage)
                self._rows_read += 1

    def _shortening(self, stage: int) -> Shortening:
        return list(self.shortenings.values())[stage - 1]

    def _prompt_columns(self, stage: int) -> int:
        return self._shortening(stage).prefix.shape[1] if stage else self.layout.length


def _known_rows(attention: Attention, rows: Tensor | None) -> Tensor:
    """As `_rows_of`, but what the kernel computed itself is not computed again."""
    weights = attention.weights
    if weights is None:
        return _rows_of(attention, rows)
    if rows is not None:
        index = rows.to(weights.device)[:, None, :, None]
        weights = weights.gather(2, index.expand(-1, weights.shape[1], -1, weights.shape[3]))
    return weights.float()


def _rows_of(attention: Attention, rows: Tensor | None) -> Tensor:
    """Probabilities (B, H, R, S) of the given query rows (B, R), or of all of them."""
    query, mask = attention.query, attention.mask
    batch, heads, length, dim = query.shape
    if mask is not None:
        mask = mask.expand(batch, *mask.shape[1:])
    if rows is not None:
        rows = rows.to(query.device)
        query = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, dim))
        if mask is not None and mask.shape[2] > 1:
            mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    if mask is not None:
        mask = mask[..., : attention.key.shape[2]]
    if attention.causal:
        positions = torch.arange(length, device=query.device).expand(batch, -1) if rows is None else rows
        keys = torch.arange(attention.key.shape[2], device=query.device)
        mask = (keys <= positions[..., None])[:, None]
    return attention_probabilities(query, attention.key, mask, attention.scaling, attention.softcap)
