"""Whole experiments under one name, for `vla-pruner eval --recipe`: the arms they run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ArmRecipe:
    """The arms of an experiment.

    Attributes:
        what: its question, for the help.
        methods, keep, layer, pruned, controls: as in `EvalSettings`; every combination is an arm.
    """

    what: str
    methods: tuple[str, ...]
    keep: tuple[float | int, ...]
    layer: tuple[int, ...]
    pruned: tuple[str, ...]
    controls: tuple[str, ...]


RECIPES = {
    "freeze-vs-drop": ArmRecipe(
        "unpruned twice; keep .25 and .125, dropped and frozen, at layers 3 and 8 (of 9 or more):\n"
        "at the same budget, does freezing save what dropping loses?",
        methods=("vla-pruner",),
        keep=(0.25, 0.125),
        layer=(3, 8),
        pruned=("drop", "freeze"),
        controls=("again",),
    )
}
