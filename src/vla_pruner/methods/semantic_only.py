"""VLA-Pruner without its action score: an ablation of arXiv 2511.16449."""

from __future__ import annotations

from dataclasses import dataclass

from vla_pruner.methods.fastv import FastV


@dataclass(frozen=True)
class SemanticOnly(FastV):
    """The top k visual tokens by VLA-Pruner's semantic score: prefill attention averaged over heads and all queries.

    Paper: arXiv 2511.16449, equation 2 and the ablation of its dual-level design ("prefill only"). It is FastV with the
    mean over all prompt tokens instead of the last one's row.

    Reference numbers (OpenVLA, LIBERO mean success, by a third-party note): about 67 % at keep .25 and 55 % at .125;
    VLA-Pruner has about 75 % and 68 %. With causal attention the mean over all queries favours early patches.
    Deviations: none. The paper does not say whether its ablation prunes the first `window` steps; `warmup_steps=3`
    leaves them unpruned as VLAPruner's default does.

    Attributes:
        semantic_queries: rows that the score averages over: "all" prompt tokens, the "text" after the image, or the
            "last" one.
        keep, warmup_steps: see `Budgeted`.
        layer, pruned: see `Method`.
    """

    semantic_queries: str = "all"
