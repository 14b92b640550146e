"""VLA-Cache: compute tokens that moved or that the text attends to; reuse the rest from the last step (2502.02175)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vla_pruner.errors import OptionError
from vla_pruner.fate import Fate
from vla_pruner.methods.base import Evidence, Keep, check_stages, progressive
from vla_pruner.methods.schedule import Schedule
from vla_pruner.methods.scored import Scored


@dataclass(frozen=True)
class VLACache(Scored):
    """From `layer` on, visual tokens whose pixels stayed and that the text does not attend to are not computed again:
    their keys and values are those of the last control step. All of them stay readable.

    Paper: Xu et al., "VLA-Cache", arXiv 2502.02175. A patch is static if the cosine similarity of its pixels to those
    of the last frame is above a threshold, of which the most similar are taken; those with much attention from the text
    are computed nevertheless; and at layer l the share min(k sum_{j<=l} R_j, 1) of them is reused, where
    R_j = (E_{j-1} - E_j) / E_{j-1} from the entropy E of each layer's attention.

    Paper's defaults: threshold .996, the 100 most similar of 256 tokens, relevance .5. Reference numbers (OpenVLA on
    LIBERO, success relative to unpruned, by VLA-Pruner's paper): 98.48 % if half is computed, 88.08 % at .25, 54.79 %
    at .125. Its own paper has a mean success of 74.7 % against OpenVLA's 75.0 %. Deviations: the number computed is
    fixed (`keep`), so that shapes are: a step in which fewer than the others are static runs whole. One layer from
    which on all of them are reused, or fixed numbers for several (`then`), instead of shares by entropy. Relevance is
    this step's attention of the text in the layer before `layer`, as a share of the largest, instead of the last step's
    mean over all layers.

    Keys and values of the prompt are held between steps: some 130 MB for OpenVLA in bfloat16, for each robot. The host
    reads whether enough tokens are static, so it waits for an accelerator there.

    Attributes:
        keep: visual tokens computed, as a fraction or a number (paper: 156 of 256, .61); see `Budgeted`.
        threshold: cosine similarity of pixels above which a token is static.
        relevance: share of the most attended token's attention from which on a token is computed anyway, in (0, 1].
        then: further layers, rising, from each of which on fewer are computed: `((8, 0.4), (16, 0.25))`.
        refresh_every: run the first step of an episode and every n-th after it whole; None never does.
        warmup_steps: see `Budgeted`; the first step of an episode always runs whole.
        layer: layers before this one compute every token: 1 or more.
        pruned: "reuse" alone.
    """

    keep: Keep = 0.61
    threshold: float = 0.996
    relevance: float = 0.5
    then: tuple[tuple[int, Keep], ...] = ()
    refresh_every: int | None = None
    pruned: str = field(default="reuse", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, lowest in (("threshold", -1.0), ("relevance", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest < value <= 1:
                raise OptionError(f"{name}={value!r} was given; it is a number above {lowest:g} and at most 1.")
        _ = self.schedule  # refuses values out of range
        check_stages(self.then)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"semantic", "similarity"})

    @property
    def treatments(self) -> tuple[str, ...]:
        return (Fate.REUSE,)

    @property
    def queries(self) -> str:
        return "text"

    def stages(self) -> tuple[VLACache, ...]:
        return progressive(self, self.then)

    @property
    def schedule(self) -> Schedule:
        return Schedule(max(1, self.warmup_steps), self.refresh_every)

    def reuses(self, similarity: Tensor, count: int) -> bool:
        return bool(((similarity > self.threshold).sum(dim=1) >= count).all())

    def score(self, evidence: Evidence) -> Tensor:
        assert evidence.semantic is not None
        assert evidence.similarity is not None
        attention = torch.where(evidence.valid, evidence.semantic, 0.0)
        share = attention / attention.amax(dim=1, keepdim=True).clamp_min(1e-12)
        # Tokens that the text attends to come first, those that moved most come next: no similarity is below -1.
        return torch.where(share >= self.relevance, 3 + share, 1 - evidence.similarity)
