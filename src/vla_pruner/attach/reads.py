"""Action attention of tokens decoded one by one: noted while they are decoded, computed in one go when asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vla_pruner.attach.recorder import Attention
from vla_pruner.methods.scores import attention_probabilities


@dataclass
class LayerReads:
    """The rows that asked one layer's cache.

    Attributes:
        queries: (B, H, 1, d) each, oldest first; the oldest belongs to the prompt.
        visible: (B or 1, 1 or H, 1, P or more) mask of the newest row, bool or additive; None: it sees all.
        call: the newest kernel call, whose keys hold those of all older ones.
    """

    queries: list[Tensor] = field(default_factory=list)
    visible: Tensor | None = None
    call: Attention | None = None


class DeferredReads:
    """Rows of a growing cache. One product of all rows and layers costs little more than one of a row and a layer."""

    def __init__(self) -> None:
        self._layers: dict[tuple[int, int], LayerReads] = {}
        self.count = 0
        """Rows noted so far, in all layers together."""

    def add(self, layer: int, stage: int, attention: Attention, row: Tensor | None) -> None:
        """Note a row.

        Args:
            layer: index of the layer.
            stage: how many stages of pruning made its cache what it is.
            attention: the kernel call.
            row: (B, 1) which of its query rows acts, the last real one of the prompt; None: there is but one.
        """
        query, visible = attention.query, attention.mask
        if row is not None:
            index = row.to(query.device)[:, None, :, None]
            query = query.gather(2, index.expand(-1, query.shape[1], -1, query.shape[3]))
            if visible is not None and visible.shape[2] > 1:
                visible = visible.expand(len(row), *visible.shape[1:])
                visible = visible.gather(2, index.expand(-1, visible.shape[1], -1, visible.shape[3]))
        reads = self._layers.setdefault((layer, stage), LayerReads())
        reads.queries.append(query)
        reads.visible, reads.call = visible, attention
        self.count += 1

    def rows(self, layer: int, stage: int) -> int:
        """Rows of one layer noted so far."""
        reads = self._layers.get((layer, stage))
        return 0 if reads is None else len(reads.queries)

    @torch.no_grad()
    def columns(self, stage: int, prompt: int) -> Tensor | None:
        """(B, prompt) float32: attention to the prompt's columns, the mean over heads, summed over rows and layers.

        Args:
            stage: of which layers.
            prompt: columns that the prompt has in their caches.
        """
        groups: dict[tuple[object, ...], list[LayerReads]] = {}
        for (_, made), reads in self._layers.items():
            if made == stage:
                assert reads.call is not None
                alike = (id(reads.visible), len(reads.queries), reads.call.key.shape, reads.call.key.device)
                groups.setdefault(alike, []).append(reads)
        found = [_columns(layers, prompt) for layers in groups.values()]
        return sum(found[1:], found[0]) if found else None


def _columns(layers: list[LayerReads], prompt: int) -> Tensor:
    """`DeferredReads.columns` of layers that are alike."""
    calls = [reads.call for reads in layers if reads.call is not None]
    batch, _, length, _ = calls[0].key.shape
    heads, rows = calls[0].query.shape[1], len(layers[0].queries)
    query = torch.stack([torch.cat(reads.queries, dim=2) for reads in layers]).flatten(0, 1)
    key = torch.stack([call.key for call in calls]).flatten(0, 1)
    # Row i came when i tokens had been decoded, and its own is in the cache when it asks.
    positions = torch.arange(length, device=key.device)
    mask = (positions < prompt + torch.arange(rows, device=key.device)[:, None])[None, None]
    visible = layers[0].visible
    if visible is not None:
        visible = visible[..., :length]
        if visible.dtype != torch.bool:
            visible = visible > torch.finfo(visible.dtype).min / 2
        # The newest row's mask says of the prompt what the older ones' said.
        visible = torch.nn.functional.pad(visible[..., :prompt], (0, length - prompt), value=True)
        mask = (mask & visible).expand(batch, -1, -1, -1).repeat(len(layers), 1, 1, 1)
    probabilities = attention_probabilities(query, key, mask, calls[0].scaling, calls[0].softcap)
    return probabilities.sum(dim=(1, 2)).view(len(layers), batch, length).sum(dim=0)[:, :prompt] / heads
