"""A part of the budget by action history, the rest by max-min diversity: a mixture from no paper."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vla_pruner.checks import check_choice
from vla_pruner.errors import OptionError
from vla_pruner.methods.base import Evidence
from vla_pruner.methods.max_min_diversity import METRICS
from vla_pruner.methods.selection import distances, marked_ids, max_min_order, present_or_enough, top_mask
from vla_pruner.methods.smoothed import Smoothed


@dataclass(frozen=True)
class ActionAndDiversity(Smoothed):
    """The top tokens by smoothed action attention, and of all others those that lie farthest from each other.

    No paper. VLA-Pruner (arXiv 2511.16449) thins the union of two scores by diversity, so a token that neither score
    names is never kept; here diversity chooses among all that action attention did not, and reading attention has no
    say.

    Reference numbers: none published. In a first study on a policy of 6 layers (push, K = 2, keep .25, 80 paired seeds:
    unpruned 69) it reached 55, Euclidean max-min diversity alone 57 and the published union 39.

    Attributes:
        keep: visual tokens kept; see `Budgeted`.
        share: of the budget that action attention fills, in [0, 1], rounded to whole tokens with halves to even.
        metric: of the diversity, as in `MaxMinDiversity`.
        window, decay, unseen, refresh_every, warmup_steps: see `Smoothed`.
        layer, pruned: see `Method`.
    """

    share: float = 0.5
    metric: str = "euclidean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.share, (int, float)) or isinstance(self.share, bool) or not 0 <= self.share <= 1:
            raise OptionError(f"share={self.share!r} was given; the share of action attention is in [0, 1].")
        check_choice("metric", self.metric, METRICS)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"action", "features"})

    def select(self, evidence: Evidence, k: int) -> Tensor:
        assert evidence.features is not None
        by_action = round(self.share * k)
        present = present_or_enough(evidence.valid, k, evidence.features)
        acting = top_mask(self.action_estimate(evidence), present, by_action)
        if by_action == k:
            return marked_ids(acting, k)
        order = max_min_order(distances(evidence.features, self.metric), present & ~acting, k - by_action)
        return marked_ids(acting.scatter(1, order, True), k)
