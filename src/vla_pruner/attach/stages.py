"""Where a method prunes and how many tokens it keeps there: one stage, or several for progressive methods."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vla_pruner.attach.family import Family
from vla_pruner.errors import BudgetError
from vla_pruner.methods.base import Evidence, Method


@dataclass(frozen=True)
class Stage:
    """One pruning layer.

    Attributes:
        method: what chooses there.
        cameras: the same for each camera, where the method's `keep` is per camera; None: one budget for all.
    """

    method: Method
    cameras: tuple[Method, ...] | None

    def budgets(self, counts: tuple[int, ...], absent: frozenset[int], known: tuple[int, ...] | None) -> list[int]:
        """Tokens kept: one number for all cameras together, or one for each.

        Args:
            counts: visual tokens of each camera in the sequence as it is given.
            absent: cameras that the host knows to be absent.
            known: visual tokens that each camera would have, where the model alone decides it.
        """
        present = [0 if camera in absent else count for camera, count in enumerate(counts)]
        # A camera that the policy left out of the sequence has its budget, but no tokens here.
        known = known or counts
        if self.cameras is None:
            full = [self.method.budget(sum(known))]
            short = [self.method.budget_of_present(sum(known), sum(present))]
        else:
            full = [method.budget(count) for method, count in zip(self.cameras, known, strict=True)]
            short = [min(budget, count) for budget, count in zip(full, present, strict=True)]
        # Where all is kept nothing may change, so absent cameras that hold a place stay too.
        return list(counts) if sum(full) >= sum(known) else short

    def select(self, evidence: Evidence, counts: tuple[int, ...], budgets: list[int]) -> Tensor:
        """Which (B, k) int64, sorted, of the tokens that `evidence` is on stay; each camera has `counts` of them."""
        if self.cameras is None:
            return self.method.select(evidence, budgets[0])
        kept, start = [], 0
        for method, count, k in zip(self.cameras, counts, budgets, strict=True):
            ids = torch.arange(count, device=evidence.valid.device).expand(evidence.valid.shape[0], -1)
            if k == 0:
                ids = ids[:, :0]
            elif k < count:
                ids = method.select(evidence.span(start, start + count), k)
            kept.append(ids + start)
            start += count
        return torch.cat(kept, dim=1)


def stages_of(method: Method, family: Family) -> dict[int, Stage]:
    """The stages of `method` in this model by their layer, in order.

    Raises:
        BudgetError: the model lacks a layer, or its visual tokens are fewer than are to be kept.
    """
    stages = {stage.layer: Stage(stage, stage.for_cameras(family.cameras)) for stage in method.stages()}
    if type(method).select is not Method.select:  # else it never prunes, and fits every model
        for stage in stages.values():
            _check_depth(stage.method, family)
        _check_order(list(stages.values()), [stage.layer for stage in method.stages()])
    if family.camera_tokens is not None:
        counts = [sum(stage.budgets(family.camera_tokens, frozenset(), None)) for stage in stages.values()]
        for before, after in pairwise(counts):
            check_fewer(before, after)
    return stages


def check_fewer(before: int, after: int) -> None:
    """Raise BudgetError where a later stage is to keep more tokens than the one before left."""
    if after > before:
        raise BudgetError(
            f"{after} visual tokens are to be kept at a pruning layer that only {before} reach; give falling numbers."
        )


def _check_order(stages: list[Stage], layers: list[int]) -> None:
    if len({stage.cameras is None for stage in stages}) > 1:
        raise BudgetError(
            "keep was given per camera at some pruning layers and for all together at others; choose one."
        )
    if len(layers) > 1 and (layers[0] == 0 or any(one >= other for one, other in pairwise(layers))):
        raise BudgetError(
            f"Pruning at the layers {', '.join(map(str, layers))} was asked for; several pruning layers rise, from "
            "layer 1 or more."
        )


def _check_depth(method: Method, family: Family) -> None:
    layers, first = family.depth, family.first_layer
    if not first <= method.layer < layers:
        raise BudgetError(
            f"layer={method.layer} was given, but the decoder has {layers} layers; give a layer from {first} to "
            f"{layers - 1}."
        )
    if "semantic" in method.needs and method.semantic_layer >= layers:
        raise BudgetError(
            f"The semantic score is read at layer {method.semantic_layer}, but the decoder has {layers} layers."
        )
