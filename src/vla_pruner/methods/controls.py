"""Controls: a random set that any method must beat, a set given from outside, and no pruning at all."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from vla_pruner.errors import BudgetError, OptionError
from vla_pruner.methods.base import Evidence, Method
from vla_pruner.methods.schedule import Schedule
from vla_pruner.methods.scored import Scored
from vla_pruner.methods.selection import define_op


@dataclass(frozen=True)
class RandomKeep(Scored):
    """Keep a random set, drawn anew in every control step from (seed, episode, step): the control that any method must
    beat.

    Rows that are in the same step of the same episode draw the same set, so a batch gives each row the set that it
    would get alone.

    Attributes:
        keep, warmup_steps: see `Budgeted`.
        seed: of the draws.
        refresh_every: run the first step of an episode and every n-th after it unpruned, as `VLAPruner` with this
            option does; None never does.
        layer, pruned: see `Method`.
    """

    seed: int = 0
    refresh_every: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise OptionError(f"seed={self.seed!r} was given; the seed of the draws is an int.")
        _ = self.schedule  # refuses values out of range

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.warmup_steps, self.refresh_every)

    def for_cameras(self, names: tuple[str, ...]) -> tuple[Self, ...] | None:
        methods = super().for_cameras(names)
        if methods is None:
            return None
        # With one seed, cameras of equal size would keep the same places.
        return tuple(replace(method, seed=self.seed + 104_729 * camera) for camera, method in enumerate(methods))

    def score(self, evidence: Evidence) -> Tensor:
        tokens = evidence.valid.shape[1]
        # For a compiler this is one opaque step: generators and numbers read from tensors cannot be traced.
        draw = torch.ops.vla_pruner.random_scores if torch.compiler.is_compiling() else _random_scores
        scores = draw(evidence.memory.episode, evidence.memory.steps, self.seed % 2**63, tokens)
        return scores.to(evidence.valid.device, non_blocking=True)


@dataclass(frozen=True)
class KeepFixed(Method):
    """Keep the visual tokens that were given, in every control step and row.

    Attributes:
        ids: distinct visual token ids, 0 being the first visual token; any order.
        layer, pruned: see `Method`.

    Raises:
        BudgetError: no ids, negative ids or the same id twice.
    """

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            ids = tuple(operator.index(i) for i in self.ids)
        except TypeError:
            raise BudgetError(f"ids={self.ids!r} was given; ids is a sequence of whole numbers.") from None
        if not ids or min(ids) < 0 or len(set(ids)) != len(ids):
            raise BudgetError(f"ids={self.ids!r} was given; give at least one id, none negative and none twice.")
        object.__setattr__(self, "ids", tuple(sorted(ids)))

    def budget(self, tokens: int) -> int:
        if self.ids[-1] >= tokens:
            raise BudgetError(f"id {self.ids[-1]} was given, but the model has {tokens} visual tokens: ids run from 0.")
        return len(self.ids)

    def budget_of_present(self, tokens: int, present: int) -> int:
        return self.budget(tokens)

    def select(self, evidence: Evidence, k: int) -> Tensor:
        ids = torch.tensor(self.ids, device=evidence.valid.device)
        return ids.expand(evidence.valid.shape[0], k)


@dataclass(frozen=True)
class Unpruned(Method):
    """Keep everything: the baseline, with the same session around it."""

    def budget(self, tokens: int) -> int:
        return tokens

    @property
    def schedule(self) -> Schedule:
        return Schedule(warm_up=None)


def _random_scores(episode: Tensor, steps: Tensor, seed: int, tokens: int) -> Tensor:
    """Return (B, M) float32 on the CPU, drawn for each row from (seed, episode, step)."""
    draws = []
    for row, step in zip(episode.tolist(), steps.tolist(), strict=True):
        generator = torch.Generator().manual_seed(((seed * 1_000_003 + row) * 1_000_003 + step) % 2**63)
        draws.append(torch.rand(tokens, generator=generator))
    return torch.stack(draws)


def _shape_of_scores(episode: Tensor, steps: Tensor, seed: int, tokens: int) -> Tensor:
    return torch.empty(episode.shape[0], tokens)


define_op(
    "random_scores(Tensor episode, Tensor steps, int seed, SymInt tokens) -> Tensor", _random_scores, _shape_of_scores
)
