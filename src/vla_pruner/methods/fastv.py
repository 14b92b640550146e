"""FastV: keep the visual tokens that the last prompt token attends to most (arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass

from vla_pruner.checks import check_choice
from vla_pruner.methods.scored import SemanticallyScored


@dataclass(frozen=True)
class FastV(SemanticallyScored):
    """The top k visual tokens by the attention that they receive at the layer before `layer`.

    Paper: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764, section 4: the score is the
    attention a token receives, averaged over heads; after layer K the R % of the image tokens with the lowest score are
    dropped for all later layers and decode steps. The text averages over all other tokens as queries; the code that the
    authors released, with which VLA-Pruner's paper compares, reads the last prompt token alone. That is the default
    here; `semantic_queries="all"` is the text's wording.

    Paper's defaults: K = 2, R = 50 %. Here K = 3, keep .25, as in the comparison in VLA-Pruner's paper. Reference
    numbers (OpenVLA on LIBERO, success relative to unpruned; VLA-Pruner's paper, K = 3): 97.43 % at keep .5, 87.62 % at
    .25, 63.08 % at .125. VLA-Cache's paper (arXiv 2502.02175) has a mean success of 73.3 % against OpenVLA's 75.0 %,
    and no gain in time. On LLaVA-1.5-13B the paper saves 45 % of the FLOPs without loss. Deviations: the defaults named
    above. Kept tokens keep their position ids.

    Attributes:
        semantic_queries: rows that the score averages over: the "last" prompt token, "all" of them, or the "text" after
            the image.
        keep, warmup_steps: see `Budgeted`.
        layer, pruned: see `Method`.
    """

    semantic_queries: str = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("semantic_queries", self.semantic_queries, ("all", "text", "last"))

    @property
    def queries(self) -> str:
        return self.semantic_queries
