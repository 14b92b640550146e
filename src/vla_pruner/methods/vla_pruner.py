"""VLA-Pruner: keep the tokens that reading and acting need, then filter redundancy (arXiv 2511.16449)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vla_pruner.checks import check_choice, is_count, is_number
from vla_pruner.errors import BudgetError, OptionError
from vla_pruner.methods.base import Evidence, Keep, Method, check_keep, resolve_keep
from vla_pruner.methods.presets import PRESETS, RECOMMENDED, Published, PublishedWord, Rules
from vla_pruner.methods.schedule import Schedule
from vla_pruner.methods.scores import temporal_estimate
from vla_pruner.methods.selection import distances, finite_tokens, max_min_order, top_mask


@dataclass(frozen=True)
class VLAPruner(Method):
    """Union of the top k by prefill attention and the top k by smoothed action attention, thinned by max-min diversity.

    Paper: "Bridging the Semantic-Action Gap in Visual Token Pruning for Efficient VLA Inference" (v5, May 2026; first
    "VLA-Pruner: Temporal-Aware Dual-Level Visual Token Pruning for Efficient Vision-Language-Action Inference"), arXiv
    2511.16449, section 3. Reference numbers (OpenVLA on LIBERO, success relative to unpruned): 102.45 % at keep .5,
    98.48 % at .25, 88.90 % at .125; docs/methods.md has the measurements of others. Deviations: none with
    `preset="paper"`. The default, `preset="recommended"`, freezes the tokens that are not kept, where the paper drops
    them, and reads by the last prompt row: docs/study.md has the evidence.

    Attributes:
        keep: visual tokens kept, as a fraction in (0, 1] (float) or a number of tokens (int): one budget for all
            cameras, or per camera, `{"image": 64, "wrist_image": 0.5}`: then each camera's tokens compete among
            themselves.
        layer, pruned: see `Method`; what is left out is the preset's (recommended: freeze at layer 3; paper: drop at
            layer 3). `layer=0` prunes before the decoder, by both scores of the memory: every layer is short, and
            nothing of the present image has a say. Needs `refresh_every`.
        window: control steps of action attention that are smoothed (paper: 3).
        decay: weight of a step against the next newer one, in (0, 1] (paper: 0.8).
        preset: "recommended", "paper", or the rules of the authors' code (docs/methods.md has the commits); it decides
            what is left out of `layer`, `pruned` and `semantic_queries`, and rules that are no options. "recommended"
            is "paper" but for `pruned="freeze"` and `semantic_queries="last"`. "official" is the code of
            May 2026: action attention is read at layer index 15 alone, the estimate is made shares and rounded to
            bfloat16, and diversity is measured on the decoder's input embeddings instead of the hidden states entering
            `layer`. On a policy that acts in the rows of its prompt's pass, "official" becomes "official-chunk", their
            code for OpenVLA-OFT: layer 4 if none is named, each camera on its own (`per_camera`), the action attention
            of the rows in the actions' places, and an estimate that is neither made shares nor rounded further than the
            model's dtype. "official-2026-02" is the code of February: "official" with a decay that runs backwards (the
            oldest step weighs most).
        per_camera: give each camera `keep` of its own tokens, and choose within each camera.
        warmup: "full" prunes nothing in the first `window` steps of an episode: exact, but short episodes gain less.
            "semantic" prunes them by prefill attention alone (v5 of the paper). In a batch "full" waits until no row is
            in its warm-up, since all rows share one shape: if robots reset at different times, choose "semantic".
        semantic_queries: rows that the semantic score averages over: the "last" prompt token (recommended; as FastV
            does), the "text" after the image, or "all" prompt tokens (paper and authors' code; with causal attention it
            favours early patches).
        unseen: the score in the history of a token that was pruned away: "zero" (as published: a kept set tends to
            stay), or "carry": the score at which it was last seen, times `decay` for each step since.
        refresh_every: run the first step of an episode and every n-th after it unpruned, so that every token is seen
            again, and begin the history anew there; None never does. In a batch all rows take the turn of any row.

    Raises:
        OptionError: an option is out of its range; a `BudgetError` if it is `keep` or `layer`.
    """

    keep: Keep = 0.25
    window: int = 3
    decay: float = 0.8
    preset: str = "recommended"
    warmup: str = "full"
    semantic_queries: str = PublishedWord(RECOMMENDED.queries)
    unseen: str = "zero"
    refresh_every: int | None = None
    per_camera: bool = False
    layer: int = field(default=Published(RECOMMENDED.layer), kw_only=True)
    pruned: str = field(default=PublishedWord(RECOMMENDED.pruned), kw_only=True)

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, tuple(PRESETS))
        if isinstance(self.layer, Published):
            object.__setattr__(self, "layer", Published(self.rules.layer))
        of_preset = {
            name: word for name, word in self.of_preset.items() if isinstance(getattr(self, name), PublishedWord)
        }
        for name, word in of_preset.items():
            object.__setattr__(self, name, word)
        super().__post_init__()
        for name, word in of_preset.items():
            # Marked again, so that another preset, by dataclasses.replace, brings its own.
            object.__setattr__(self, name, PublishedWord(word))
        check_keep(self.keep)
        if not is_count(self.window, 1):
            raise OptionError(
                f"window={self.window!r} was given; the window is an int of 1 or more (the paper's is 3)."
            )
        if not is_number(self.decay) or not 0 < self.decay <= 1:
            raise OptionError(f"decay={self.decay!r} was given; the decay is in (0, 1] (the paper's is 0.8).")
        _ = self.schedule  # refuses values out of range
        if self.layer == 0 and self.refresh_every is None:
            raise BudgetError(
                "layer=0 was given without refresh_every: tokens are then chosen by memory alone, and what is pruned "
                "away would never be seen again; give refresh_every=4 or the like."
            )
        check_choice("warmup", self.warmup, ("full", "semantic"))
        check_choice("semantic_queries", self.semantic_queries, ("all", "text", "last"))
        check_choice("unseen", self.unseen, ("zero", "carry"))
        if not isinstance(self.per_camera, bool):
            raise OptionError(f"per_camera={self.per_camera!r} was given; it is True or False.")

    @property
    def told(self) -> tuple[str, ...]:
        # Records from before there was "recommended" tell neither, and their rows are the paper's.
        of_preset = self.rules is RECOMMENDED and self.semantic_queries == RECOMMENDED.queries
        return (f"semantic_queries={self.semantic_queries}",) if of_preset else ()

    @property
    def of_preset(self) -> Mapping[str, Any]:
        return {"layer": self.rules.layer, "pruned": self.rules.pruned, "semantic_queries": self.rules.queries}

    @property
    def rules(self) -> Rules:
        """The rules of the preset."""
        return PRESETS[self.preset]

    def fitted(self, one_pass: bool) -> Method:
        found = replace(self, preset="official-chunk") if one_pass and self.preset == "official" else self
        # Plain values: they are compared in compiled code, and a compiler takes a number of another type for another
        # number.
        words = {"pruned": str(found.pruned), "semantic_queries": str(found.semantic_queries)}
        return replace(found, layer=int(found.layer), **words)

    def for_cameras(self, names: tuple[str, ...]) -> tuple[VLAPruner, ...] | None:
        if isinstance(self.keep, Mapping) or not (self.per_camera or self.rules.per_camera):
            return super().for_cameras(names)
        if not names:
            raise BudgetError(
                "Each camera was to have its own budget, but this model does not name its cameras: "
                "attach(model, cameras=(...))."
            )
        return (self,) * len(names)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"semantic", "action", self.rules.evidence})

    @property
    def reads_placeholders(self) -> bool:
        return self.rules.placeholders

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
        at = self.rules.action_layer
        if at is None:
            return super().action_layers(layers)
        if layers <= at:
            raise BudgetError(
                f'preset="{self.preset}" reads action attention at layer index {at}, but this model has {layers} '
                'layers; use preset="paper".'
            )
        return (at,)

    @property
    def schedule(self) -> Schedule:
        # Before the decoder only the memory can choose, so the first step of an episode is always a refresh there.
        return Schedule(self.window if self.warmup == "full" else 0, self.refresh_every)

    def action_estimate(self, evidence: Evidence) -> Tensor:
        """Return (B, M) float32: the action attention of this step, estimated from the steps before (the paper's
        temporal smoothing).
        """
        rules = self.rules
        estimate = temporal_estimate(
            evidence.memory,
            self.decay,
            self.unseen,
            newest_weighs_most=rules.newest_weighs_most,
            steps=evidence.steps,
            refresh_every=self.refresh_every,
        )
        if rules.shares:
            estimate = estimate / estimate.sum(dim=1, keepdim=True).clamp_min(1e-12)
        if rules.rounding == "model":
            assert evidence.features is not None
            return estimate.to(evidence.features.dtype).float()
        return estimate.to(torch.bfloat16).float() if rules.rounding == "bfloat16" else estimate

    def candidates(self, evidence: Evidence, k: int) -> Tensor:
        """Return (B, M) bool: the union of both top k; rows in their warm-up have the semantic top k alone."""
        score = evidence.semantic
        if self.layer == 0:
            score = temporal_estimate(
                evidence.memory,
                self.decay,
                self.unseen,
                semantic=True,
                steps=evidence.steps,
                refresh_every=self.refresh_every,
            )
        assert score is not None
        assert evidence.features is not None
        # Both at once: on a GPU a choice is a chain of small launches, several of which are the sort's.
        scores = torch.stack([score.float(), self.action_estimate(evidence)])
        # The filter cannot measure how far a token without finite features is: it counts as one that was not seen.
        scores = torch.where(finite_tokens(evidence.features), scores, torch.nan)
        semantic, action = top_mask(scores, evidence.valid, k)
        assert evidence.steps is not None
        return semantic | (action & (evidence.steps >= self.window)[:, None])

    def pick_order(self, evidence: Evidence, k: int) -> Tensor:
        """Return the ids (B, k) int64 of the kept tokens in the order in which the greedy filter picks them."""
        assert evidence.features is not None
        return max_min_order(distances(evidence.features), self.candidates(evidence, k), k)

    def select(self, evidence: Evidence, k: int) -> Tensor:
        return self.pick_order(evidence, k).sort(dim=1).values
