"""DivPrune: keep the visual tokens whose embeddings are most diverse (arXiv 2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass

from vla_pruner.methods.max_min_diversity import MaxMinDiversity


@dataclass(frozen=True)
class DivPrune(MaxMinDiversity):
    """The k visual tokens that lie farthest from each other, by the decoder's input embeddings.

    Paper: Alvar et al., "DivPrune", CVPR 2025, arXiv 2503.02175: of all sets of k tokens the one whose smallest
    pairwise cosine distance is largest (max-min diversity), found greedily: first the token whose nearest other token
    is farthest, then again and again the token whose smallest distance to those chosen is largest. It needs no
    attention and no instruction.

    Paper's defaults: about 10 % of the tokens kept, before the first decoder layer. Reference numbers (OpenVLA on
    LIBERO, success relative to unpruned; VLA-Pruner's paper): 92.64 % at keep .5, 80.96 % at .25, 58.06 % at .125. On
    LLaVA-1.5-7B the paper saves 84 % of the TFLOPs. Deviations: none with `layer=0`, the paper's own form, which
    removes the tokens before the decoder. At the default `layer` the embeddings choose too, but the layers before it
    still see every token, so that methods are compared at equal cost.

    Attributes:
        metric: "cosine" (paper) or "euclidean".
        keep, warmup_steps: see `Budgeted`.
        layer, pruned: see `Method`.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})
