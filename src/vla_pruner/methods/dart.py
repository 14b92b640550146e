"""DART: keep the visual tokens that duplicate a few pivots least (arXiv 2502.11494)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vla_pruner.checks import is_count
from vla_pruner.errors import OptionError
from vla_pruner.methods.base import Evidence, rows_at
from vla_pruner.methods.budgeted import Budgeted
from vla_pruner.methods.selection import marked_ids, order_by_score, present_or_enough, top_mask


@dataclass(frozen=True)
class DART(Budgeted):
    """A few pivot tokens, and of the others those that each pivot resembles least, by the hidden states that enter
    `layer`.

    Paper: Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
    EMNLP 2025, arXiv 2502.11494. Two tokens are duplicates to the degree dup(p, x) = p . x / (|p| |x|). One pivot p
    after the other keeps the tokens x of lowest dup(p, x) that none before it kept, each equally many: its threshold
    follows from the budget. It reads no attention and no instruction.

    Paper's defaults: at layer 2, with 8 pivots, in the released code the 4 visual and the 4 text tokens of largest key
    norm. Before the decoder (`layer=0`, by the input embeddings) NVIDIA's TensorRT Edge-LLM ships it. Reference
    numbers: the paper prunes 88.9 % of the visual tokens "while maintaining comparable performance", 1.99 times faster
    in total and 2.99 times in the prefill (vision-language benchmarks). None for robots. Deviations: all pivots are
    visual tokens, those of largest L1 norm of the hidden state instead of the key. Pivots count in the budget, and the
    remainder of an uneven division goes to the first of them.

    Attributes:
        pivots: their number; an int of 1 or more. No more than `keep` are used.
        keep, warmup_steps: see `Budgeted`.
        layer, pruned: see `Method`.
    """

    pivots: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_count(self.pivots, 1):
            raise OptionError(f"pivots={self.pivots!r} was given; it is an int of 1 or more (the paper's is 8).")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"features"})

    def select(self, evidence: Evidence, k: int) -> Tensor:
        assert evidence.features is not None
        features = evidence.features.float().nan_to_num()
        present, count = present_or_enough(evidence.valid, k, evidence.features), min(self.pivots, k)
        pivots = order_by_score(features.abs().sum(dim=-1), present)[:, :count]
        normed = torch.nn.functional.normalize(features, dim=-1)
        unlike = -(rows_at(normed, pivots) @ normed.transpose(-1, -2))  # (B, P, M)
        kept = torch.zeros_like(present).scatter(1, pivots, True)
        each, more = divmod(k - count, count)
        for pivot in range(count):
            quota = each + (pivot < more)
            if quota:
                kept = kept | top_mask(unlike[:, pivot], present & ~kept, quota)
        return marked_ids(kept, k)
