"""SparseVLM: keep the visual tokens that the visually relevant text attends to most (arXiv 2410.04417)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vla_pruner.checks import check_choice
from vla_pruner.methods.base import Keep, check_stages, progressive
from vla_pruner.methods.scored import SemanticallyScored
from vla_pruner.methods.scores import text_raters


@dataclass(frozen=True)
class SparseVLM(SemanticallyScored):
    """The top k visual tokens by the attention of the text "raters" at the layer before `layer`.

    Paper: Zhang et al., "SparseVLM", ICML 2025, arXiv 2410.04417, section 3.2. Before the decoder, text token i has the
    relevance r_i = mean over visual tokens j of softmax_i(h_j . h_i) on the input embeddings; those with r_i >= mean(r)
    are the raters (equations 5 and 6). A visual token's score is the attention that it receives from them, averaged
    over raters and heads (equation 3).

    Paper's defaults: pruned progressively, at several layers, by an amount that follows the rank of the raters'
    attention (equation 7); pruned tokens are clustered, summed and put back. Reference numbers (OpenVLA on LIBERO,
    success relative to unpruned; VLA-Pruner's paper): 95.44 % at keep .5, 88.67 % at .25, 63.20 % at .125. VLA-Cache's
    paper (arXiv 2502.02175) has a mean success of 64.7 %, in more time, against OpenVLA's 75.0 %. Deviations: fixed
    numbers instead of the rank rule, and no recycling, as in VLA-Pruner's comparison (docs/methods.md says why); one
    layer, unless `then` names more. Text is the part of the prompt after the image.

    The paper's settings are averages over the decoder's layers. For 192 of LLaVA-1.5's 576 tokens the authors prune at
    layers 2, 6 and 15 of 32 to 300, 200 and 110; for 128 to 303, 110 and 36; for 64 to 66, 30 and 17. The first of them
    for any number of tokens: `SparseVLM(keep=0.52, layer=2, then=((6, 0.35), (15, 0.19)))`.

    Attributes:
        then: further pruning layers, rising, each with its share or number of all visual tokens to keep, falling:
            `keep` and `layer` are the first. The score is read anew before each, over the tokens that are left.
        preset: "paper" lets every text token after the image be a rater. "official" is the comparison in VLA-Pruner's
            code: the first and the last of them never are.
        keep, warmup_steps: see `Budgeted`.
        layer, pruned: see `Method`.
    """

    preset: str = "paper"
    then: tuple[tuple[int, Keep], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("preset", self.preset, ("paper", "official"))
        check_stages(self.then)

    def stages(self) -> tuple[SparseVLM, ...]:
        return progressive(self, self.then)

    @property
    def queries(self) -> str:
        return "raters"

    def raters(self, visual: Tensor, valid: Tensor, prompt: Tensor, text: Tensor) -> Tensor:
        if self.preset == "official":
            text = _without_ends(text)
        return text_raters(visual, valid, prompt, text)


def _without_ends(text: Tensor) -> Tensor:
    """Return (B, N) bool: `text` without the first and the last True of each row that has more than two."""
    count = text.cumsum(dim=1)
    inner = text & (count > 1) & (count < count[:, -1:])
    return torch.where(count[:, -1:] > 2, inner, text)
