"""Presets of `VLAPruner`: named sets of the rules in which the paper and the authors' code differ."""

from __future__ import annotations

from dataclasses import dataclass


class Published(int):
    """A pruning layer that was not given: the published one, which follows from the preset."""


class PublishedWord(str):
    """An option in words that was not given: it follows from the preset, as `Published` does."""

    __slots__ = ()


@dataclass(frozen=True)
class Rules:
    """The settings that a preset of `VLAPruner` fixes.

    Attributes:
        layer: the published pruning layer.
        pruned: the fate of the tokens that are not kept.
        queries: the prompt rows that the semantic score averages over.
        action_layer: the one layer (0-based) at which action attention is read; None: the later half.
        placeholders: action rows are those in the actions' places, instead of those that emit the actions.
        evidence: the vectors on which diversity is measured: "features" entering the pruning layer, or the decoder's
            "embeddings".
        newest_weighs_most: whether the decay runs forwards.
        shares: whether the estimate is divided by its sum over the tokens.
        rounding: of the estimate: "none", to "bfloat16", or to the dtype of the "model".
        per_camera: whether each camera has `keep` of its own tokens.
    """

    layer: int = 3
    pruned: str = "drop"
    queries: str = "all"
    action_layer: int | None = None
    placeholders: bool = False
    evidence: str = "features"
    newest_weighs_most: bool = True
    shares: bool = False
    rounding: str = "none"
    per_camera: bool = False


ACTION_LAYER = 15
RECOMMENDED = Rules(pruned="freeze", queries="last")
PAPER = Rules()
DECODED = Rules(action_layer=ACTION_LAYER, evidence="embeddings", shares=True, rounding="bfloat16")
FEBRUARY = Rules(
    action_layer=ACTION_LAYER, evidence="embeddings", newest_weighs_most=False, shares=True, rounding="bfloat16"
)
CHUNK = Rules(
    layer=4, action_layer=ACTION_LAYER, placeholders=True, evidence="embeddings", rounding="model", per_camera=True
)

PRESETS = {
    "recommended": RECOMMENDED,
    "paper": PAPER,
    "official": DECODED,
    "official-chunk": CHUNK,
    "official-2026-02": FEBRUARY,
}
"""The rules of each preset by its name; the first is the default. "official" becomes "official-chunk" on a policy that
acts in the rows of its prompt's pass.
"""
