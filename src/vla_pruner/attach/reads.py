"""Action attention of tokens decoded one by one: noted while they are decoded, computed in one go on demand."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vla_pruner.attach.recorder import Attention
from vla_pruner.methods.scores import attention_probabilities


@dataclass(frozen=True)
class Note:
    """One query row that read one layer's cache.

    Attributes:
        layer: index of the layer.
        stage: the number of pruning stages before its cache.
        query: (B, H, 1, d), rotated.
        visible: (B or 1, 1 or H, 1, S or more) mask, bool or additive; None: it sees all.
        call: the kernel call.
    """

    layer: int
    stage: int
    query: Tensor
    visible: Tensor | None
    call: Attention

    def columns(self) -> Tensor:
        """Return (B, S) float32: the row's attention, the mean over heads."""
        visible = None if self.visible is None else self.visible[..., : self.call.key.shape[2]]
        found = attention_probabilities(self.query, self.call.key, visible, self.call.scaling, self.call.softcap)
        return found.mean(dim=(1, 2))


def note(layer: int, stage: int, attention: Attention, row: Tensor | None) -> Note:
    """Take a row's query and mask out of a kernel call.

    Args:
        layer: index of the layer.
        stage: the number of pruning stages before its cache.
        attention: the kernel call.
        row: (B, 1) the query row that acts, the last real one of the prompt; None: there is but one.
    """
    query, visible = attention.query, attention.mask
    if row is not None:
        index = row.to(query.device)[:, None, :, None]
        query = query.gather(2, index.expand(-1, query.shape[1], -1, query.shape[3]))
        if visible is not None and visible.shape[2] > 1:
            visible = visible.expand(len(row), *visible.shape[1:])
            visible = visible.gather(2, index.expand(-1, visible.shape[1], -1, visible.shape[3]))
    return Note(layer, stage, query, visible, attention)


@dataclass
class CallReads:
    """The attention of action rows that one call of a decoder or an expert reads, empty when the call begins.

    A call that runs as a graph then starts from the same state each time, and nothing in it counts calls.

    Attributes:
        still_acting: (B,) bool, the rows of the batch whose attention counts; None: all rows.
        columns: (B, P) float32 by the number of pruning stages before the layer's cache: attention to the prompt's
            columns, the mean over heads and rows, summed over layers.
        count: the number of layers summed there.
        notes: single rows, for later.
    """

    still_acting: Tensor | None = None
    columns: dict[int, Tensor] = field(default_factory=dict)
    count: int = 0
    notes: list[Note] = field(default_factory=list)

    def add(self, columns: Tensor, stage: int) -> None:
        """Add the attention of one layer."""
        known = self.columns.get(stage)
        self.columns[stage] = columns if known is None else known + columns
        self.count += 1

    def counted(self, columns: Tensor) -> Tensor:
        """Return columns (B, P) of the call, zero in the rows that do not count."""
        if self.still_acting is None:
            return columns
        return columns * self.still_acting.to(columns.device)[:, None]


@dataclass
class LayerReads:
    """The rows that read one layer's cache.

    Attributes:
        queries: (B, H, 1, d) each, oldest first; the oldest belongs to the prompt.
        counted: (B,) bool for each query, the rows of the batch that count; None: all rows.
        visible: (B or 1, 1 or H, 1, P or more) mask of the newest row, bool or additive; None: it sees all.
        newest: the newest kernel call, whose keys hold those of all older ones.
    """

    queries: list[Tensor] = field(default_factory=list)
    counted: list[Tensor | None] = field(default_factory=list)
    visible: Tensor | None = None
    newest: Attention | None = None


class DeferredReads:
    """Rows of a growing cache. One product of all rows and layers costs little more than one of a row and a layer."""

    def __init__(self) -> None:
        self._layers: dict[tuple[int, int], LayerReads] = {}
        self.count = 0
        """Rows noted so far, in all layers together."""

    def add(self, row: Note, counted: Tensor | None = None) -> None:
        """Keep a row for later.

        Args:
            row: one query row of every row of the batch.
            counted: (B,) bool, the rows of the batch that count; None: all rows.
        """
        reads = self._layers.setdefault((row.layer, row.stage), LayerReads())
        reads.queries.append(row.query)
        reads.counted.append(counted)
        reads.visible, reads.newest = row.visible, row.call
        self.count += 1

    def rows(self, layer: int, stage: int) -> int:
        """Return the number of rows of one layer noted so far."""
        reads = self._layers.get((layer, stage))
        return 0 if reads is None else len(reads.queries)

    @torch.no_grad()
    def columns(self, stage: int, prompt: int) -> Tensor | None:
        """Return (B, prompt) float32: attention to the prompt's columns, the mean over heads, summed over rows and
        layers.

        Args:
            stage: of the layers.
            prompt: columns that the prompt has in their caches.
        """
        groups: dict[tuple[object, ...], list[LayerReads]] = {}
        for (_, made), reads in self._layers.items():
            if made == stage:
                assert reads.newest is not None
                counted = tuple(map(id, reads.counted))
                alike = (id(reads.visible), counted, reads.newest.key.shape, reads.newest.key.device)
                groups.setdefault(alike, []).append(reads)
        found = [_columns(layers, prompt) for layers in groups.values()]
        return sum(found[1:], found[0]) if found else None


def _columns(layers: list[LayerReads], prompt: int) -> Tensor:
    """Return `DeferredReads.columns` of layers that are alike."""
    calls = [reads.newest for reads in layers if reads.newest is not None]
    batch, _, length, _ = calls[0].key.shape
    heads, rows = calls[0].query.shape[1], len(layers[0].queries)
    query = torch.stack([torch.cat(reads.queries, dim=2) for reads in layers]).flatten(0, 1)
    key = torch.stack([call.key for call in calls]).flatten(0, 1)
    # Row i came after i decoded tokens, and its own token is in the cache when it reads it.
    positions = torch.arange(length, device=key.device)
    mask = (positions < prompt + torch.arange(rows, device=key.device)[:, None])[None, None]
    visible = layers[0].visible
    if visible is not None:
        visible = visible[..., :length]
        if visible.dtype != torch.bool:
            visible = visible > torch.finfo(visible.dtype).min / 2
        # The newest row's mask hides the same of the prompt as the older ones' did.
        visible = torch.nn.functional.pad(visible[..., :prompt], (0, length - prompt), value=True)
        mask = (mask & visible).expand(batch, -1, -1, -1).repeat(len(layers), 1, 1, 1)
    probabilities = attention_probabilities(query, key, mask, calls[0].scaling, calls[0].softcap)
    counted = layers[0].counted
    if any(one is not None for one in counted):
        ones = torch.ones(batch, dtype=torch.bool, device=key.device)
        each = torch.stack([ones if one is None else one.to(key.device) for one in counted], dim=1)
        probabilities = probabilities * each.repeat(len(layers), 1)[:, None, :, None]
    return probabilities.sum(dim=(1, 2)).view(len(layers), batch, length).sum(dim=0)[:, :prompt] / heads
