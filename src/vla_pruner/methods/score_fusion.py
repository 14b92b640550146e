"""VLA-Pruner's two scores added up instead of united: an ablation of arXiv 2511.16449."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vla_pruner.checks import check_choice
from vla_pruner.errors import OptionError
from vla_pruner.methods.base import Evidence
from vla_pruner.methods.scored import Scored
from vla_pruner.methods.smoothed import Smoothed


@dataclass(frozen=True)
class ScoreFusion(Scored, Smoothed):
    """The top k visual tokens by `weight` x semantic score + (1 - `weight`) x estimated action score, each normalised.

    Paper: arXiv 2511.16449, where section 3.3 argues against it and the ablation measures it ("score fusion"): the two
    scores are normalised, summed with weights, and the highest k stay. No filter against redundancy follows.

    Reference numbers (OpenVLA, LIBERO mean success, by a third-party note): about 65 % at keep .25 and 52 % at .125;
    VLA-Pruner has about 75 % and 68 %, and the semantic score alone 67 % and 55 %. Deviations: the paper gives neither
    weight nor normalisation. Here the weight is .5, and each score is divided by its sum over the row's present tokens,
    so that both are shares of the image's total. With `pruned="drop"` a dropped token has no action score any more, so
    kept sets hardly change within an episode; `refresh_every` is a way out.

    Attributes:
        keep: visual tokens kept; see `Budgeted`.
        weight: of the semantic score, in [0, 1]; 1 is `SemanticOnly`, 0 is `ActionOnly`.
        semantic_queries: rows that the semantic score averages over: "all" prompt tokens, the "text" after the image,
            or the "last" one.
        window, decay, unseen, refresh_every: see `Smoothed`.
        layer, pruned: see `Method`.
    """

    weight: float = 0.5
    semantic_queries: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.weight, (int, float)) or isinstance(self.weight, bool) or not 0 <= self.weight <= 1:
            raise OptionError(f"weight={self.weight!r} was given; the semantic score's weight is in [0, 1].")
        check_choice("semantic_queries", self.semantic_queries, ("all", "text", "last"))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"semantic", "action"})

    @property
    def queries(self) -> str:
        return self.semantic_queries

    def score(self, evidence: Evidence) -> Tensor:
        assert evidence.semantic is not None
        semantic = _shares(evidence.semantic, evidence.valid)
        action = _shares(self.action_estimate(evidence), evidence.valid)
        return self.weight * semantic + (1 - self.weight) * action


def _shares(scores: Tensor, valid: Tensor) -> Tensor:
    """Return (B, M) float32: each present token's share of its row's score."""
    present = torch.where(valid, scores.float(), 0)
    return present / present.sum(dim=1, keepdim=True).clamp_min(1e-12)
