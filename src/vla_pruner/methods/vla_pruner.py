"""VLA-Pruner: keep what reading the scene needs and what acting needs, then filter redundancy (arXiv 2511.16449)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vla_pruner.checks import check_choice, is_count
from vla_pruner.errors import BudgetError, OptionError
from vla_pruner.methods.base import Evidence, Keep, Method, check_keep, resolve_keep
from vla_pruner.methods.memory import Memory
from vla_pruner.methods.scores import temporal_estimate
from vla_pruner.methods.selection import distances, max_min_order, top_mask

OFFICIAL_ACTION_LAYER = 15


@dataclass(frozen=True)
class VLAPruner(Method):
    """Union of the top k by prefill attention and the top k by smoothed action attention, thinned by max-min diversity.

    Paper: arXiv 2511.16449, section 3. Reference numbers (OpenVLA on LIBERO, success relative to unpruned): 102.45 % at
    keep .5, 98.48 % at .25, 88.90 % at .125. Deviations: none with the defaults ("freeze" and the options below are
    additions).

    Attributes:
        keep: visual tokens kept, as a fraction in (0, 1] (float) or a number of tokens (int): one budget for all
            cameras (as published), or per camera, `{"image": 64, "wrist_image": 0.5}`: then each camera's tokens
            compete among themselves.
        layer, pruned: see `Method` (paper: drop at layer 3). `layer=0` prunes before the decoder, by what memory says
            of both scores: every layer is short, and nothing of the present image has a say. Needs `refresh_every`.
        window: control steps of action attention that are smoothed (paper: 3).
        decay: weight of a step against the next newer one, in (0, 1] (paper: 0.8).
        preset: "paper", or "official" for what the authors' code does: the decay runs backwards (the oldest step weighs
            most), action attention is read at layer index 15 alone, the estimate is rounded to bfloat16, and diversity
            is measured on the decoder's input embeddings instead of the hidden states entering `layer`.
        warmup: "full" prunes nothing in the first `window` steps of an episode: exact, but short episodes gain less.
            "semantic" prunes them by prefill attention alone (v5 of the paper). In a batch "full" waits until no row is
            in its warm-up, since all rows share one shape: where robots reset at different times, choose "semantic".
        semantic_queries: rows that the semantic score averages over: "all" prompt tokens (paper; with causal attention
            it favours early patches), the "text" after the image, or the "last" prompt token (as FastV does).
        unseen: what a token that was pruned away counts in the history: "zero" (as published: a kept set tends to
            stay), or "carry": the score at which it was last seen, times `decay` for each step since.
        refresh_every: run the first step of an episode and every n-th after it unpruned, so that every token is seen
            again; None never does. In a batch one row's turn is every row's.

    Raises:
        OptionError: an option is out of its range; a `BudgetError` if it is `keep` or `layer`.
    """

    keep: Keep = 0.25
    window: int = 3
    decay: float = 0.8
    preset: str = "paper"
    warmup: str = "full"
    semantic_queries: str = "all"
    unseen: str = "zero"
    refresh_every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        if not is_count(self.window, 1):
            raise OptionError(
                f"window={self.window!r} was given; the window is an int of 1 or more (the paper's is 3)."
            )
        if not isinstance(self.decay, (int, float)) or not 0 < self.decay <= 1:
            raise OptionError(f"decay={self.decay!r} was given; the decay is in (0, 1] (the paper's is 0.8).")
        if self.refresh_every is not None and not is_count(self.refresh_every, 2):
            raise OptionError(f"refresh_every={self.refresh_every!r} was given; it is None or an int of 2 or more.")
        if self.layer == 0 and self.refresh_every is None:
            raise BudgetError(
                "layer=0 was given without refresh_every: tokens are then chosen by memory alone, and what is pruned "
                "away would never be seen again; give refresh_every=4 or the like."
            )
        check_choice("preset", self.preset, ("paper", "official"))
        check_choice("warmup", self.warmup, ("full", "semantic"))
        check_choice("semantic_queries", self.semantic_queries, ("all", "text", "last"))
        check_choice("unseen", self.unseen, ("zero", "carry"))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"semantic", "action", "embeddings" if self.preset == "official" else "features"})

    @property
    def history(self) -> int:
        return self.window

    @property
    def remembers_semantic(self) -> bool:
        return self.layer == 0

    @property
    def queries(self) -> str:
        return self.semantic_queries

    def budget(self, tokens: int) -> int:
        return resolve_keep(self.keep, tokens)

    def action_layers(self, layers: int) -> tuple[int, ...]:
        if self.preset == "paper":
            return super().action_layers(layers)
        if layers <= OFFICIAL_ACTION_LAYER:
            raise BudgetError(
                f'preset="official" reads action attention at layer index {OFFICIAL_ACTION_LAYER}, but this '
                f"model has {layers} "
                'layers; use preset="paper".'
            )
        return (OFFICIAL_ACTION_LAYER,)

    def prunes(self, memory: Memory) -> bool:
        steps = memory.steps.tolist()
        # Before the decoder there is nothing to choose by but what was seen.
        fewest = self.window if self.warmup == "full" else int(self.layer == 0)
        if min(steps) < fewest:
            return False
        return self.refresh_every is None or all(step % self.refresh_every for step in steps)

    def action_estimate(self, evidence: Evidence) -> Tensor:
        """(B, M) float32: this step's action attention as the steps before suggest it (the paper's temporal
        smoothing).
        """
        if self.preset == "paper":
            return temporal_estimate(evidence.memory, self.decay, self.unseen, steps=evidence.steps)
        estimate = temporal_estimate(
            evidence.memory, self.decay, self.unseen, newest_weighs_most=False, steps=evidence.steps
        )
        share = estimate / estimate.sum(dim=1, keepdim=True).clamp_min(1e-12)
        return share.to(torch.bfloat16).float()

    def candidates(self, evidence: Evidence, k: int) -> Tensor:
        """(B, M) bool: the union of both top k; rows in their warm-up have the semantic top k alone."""
        score = evidence.semantic
        if self.layer == 0:
            score = temporal_estimate(evidence.memory, self.decay, self.unseen, semantic=True, steps=evidence.steps)
        assert score is not None
        # Both at once: on a GPU a choice is a chain of small launches, of which sorting is several.
        scores = torch.stack([score.float(), self.action_estimate(evidence)])
        semantic, action = top_mask(scores, evidence.valid, k)
        assert evidence.steps is not None
        return semantic | (action & (evidence.steps >= self.window)[:, None])

    def pick_order(self, evidence: Evidence, k: int) -> Tensor:
        """The ids (B, k) int64 of the kept tokens in the order in which the greedy filter picks them."""
        assert evidence.features is not None
        return max_min_order(distances(evidence.features), self.candidates(evidence, k), k)

    def select(self, evidence: Evidence, k: int) -> Tensor:
        return self.pick_order(evidence, k).sort(dim=1).values
