"""CDPruner: keep the visual tokens that are diverse and fit the instruction, by a determinant (arXiv 2506.10967)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vla_pruner.errors import OptionError
from vla_pruner.methods.base import Evidence
from vla_pruner.methods.budgeted import Budgeted
from vla_pruner.methods.determinant import determinant_order
from vla_pruner.methods.selection import distances, present_or_enough

EPSILON = 1e-6


@dataclass(frozen=True)
class CDPruner(Budgeted):
    """The k visual tokens whose kernel has the largest determinant: their similarity, weighted by relevance to the
    instruction, by the decoder's input embeddings.

    Paper: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
    NeurIPS 2025, arXiv 2506.10967. With the cosine similarities L of the visual tokens and their relevance r to the
    instruction, r~ = (r - min r) / (max r - min r), the set S maximises log det of the rows and columns S of
    diag(r~) L diag(r~): a determinantal point process, solved greedily (Chen et al., 2018). The first token is the
    most relevant one, each next one has the largest r~^2 times squared distance to the span of those before.

    Paper's defaults: before the decoder (`layer=0`); on LLaVA r is of CLIP's image and text embeddings. Intel's
    OpenVINO GenAI ships the method for Qwen-VL, with a weight of the relevance. Reference numbers: on LLaVA the paper
    saves 95 % of the FLOPs and 78 % of the latency at 94 % of the accuracy (vision-language benchmarks). None for
    robots. Deviations: policies have no text encoder beside them, so r is the mean cosine similarity of the token to
    the input embeddings of the text after the image. (The released code takes the negative of CLIP's similarity.) At
    the default `layer` the embeddings choose, but the layers before it still see every token, so that methods are
    compared at equal cost. If the tokens chosen span all others, up to rounding, the rest follow by relevance.

    Attributes:
        theta: None weighs by r~ as the paper does. A number in [0, 1) weighs by exp(a r~) with a = theta / (2 (1 -
            theta)) instead, the form with a trade-off: 0 is diversity alone.
        keep, warmup_steps: see `Budgeted`.
        layer, pruned: see `Method`.
    """

    theta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        theta = self.theta
        is_number = isinstance(theta, (int, float)) and not isinstance(theta, bool) and 0 <= theta < 1
        if theta is not None and not is_number:
            raise OptionError(f"theta={theta!r} was given; it is None or a number in [0, 1), the weight of relevance.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "relevance"})

    def text_relevance(self, visual: Tensor, prompt: Tensor, text: Tensor) -> Tensor:
        # The mean of cosines with the words is the cosine's product with the mean of the words' directions.
        words = torch.nn.functional.normalize(prompt.float(), dim=-1) * text[..., None]
        mean = words.sum(dim=1) / text.sum(dim=1, keepdim=True).clamp_min(1)
        return (torch.nn.functional.normalize(visual.float(), dim=-1) @ mean[..., None])[..., 0]

    def pick_order(self, evidence: Evidence, k: int) -> Tensor:
        """Return the ids (B, k) int64 of the kept tokens in the order in which they are picked."""
        assert evidence.features is not None
        assert evidence.relevance is not None
        present = present_or_enough(evidence.valid, k, evidence.features)
        relevance = evidence.relevance.nan_to_num()
        least = relevance.masked_fill(~present, torch.inf).amin(dim=1, keepdim=True)
        most = relevance.masked_fill(~present, -torch.inf).amax(dim=1, keepdim=True)
        weight = (relevance - least + EPSILON) / (most - least + EPSILON)
        if self.theta is not None:
            weight = torch.exp(weight * (self.theta / (2 * (1 - self.theta))))
        similarity = 1 - distances(evidence.features)
        # Tokens are exactly like themselves, so that equals are equal to the bit; one without a direction is like none.
        tokens = torch.arange(similarity.shape[-1], device=similarity.device)
        itself = tokens[:, None] == tokens
        similarity = torch.where(itself & (similarity > 0.5), 1.0, similarity)
        return determinant_order(weight[:, :, None] * similarity * weight[:, None], present, k)

    def select(self, evidence: Evidence, k: int) -> Tensor:
        return self.pick_order(evidence, k).sort(dim=1).values
