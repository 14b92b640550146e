"""VLA-Pruner without its semantic score: an ablation of arXiv 2511.16449."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vla_pruner.methods.base import Evidence
from vla_pruner.methods.scored import Scored
from vla_pruner.methods.smoothed import Smoothed


@dataclass(frozen=True)
class ActionOnly(Scored, Smoothed):
    """The top k visual tokens by the action attention that the last `window` control steps suggest.

    Paper: arXiv 2511.16449, equations 3 and 5 and the ablation of its dual-level design ("action only").

    Reference numbers (OpenVLA, LIBERO mean success, by a third-party note): about 63 % at keep .25 and 48 % at .125;
    VLA-Pruner has about 75 % and 68 %. Deviations: none. No action row sees a dropped token again, so with
    `pruned="drop"` and `unseen="zero"` the first kept set of an episode stays to its end, whatever the images show: the
    published rule, and its weakness. `refresh_every` is a way out (`unseen="carry"` rarely is), and
    `ActionAndDiversity` chooses a part by the present image.

    Attributes:
        keep: visual tokens kept; see `Budgeted`.
        window, decay, unseen, refresh_every: see `Smoothed`.
        layer, pruned: see `Method`.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"action"})

    def score(self, evidence: Evidence) -> Tensor:
        return self.action_estimate(evidence)
