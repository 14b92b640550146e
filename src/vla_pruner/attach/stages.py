"""A method's pruning layers and the tokens that it keeps there: one stage, or several for progressive methods."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vla_pruner.attach.contract import budget_of, check_needs, selected
from vla_pruner.attach.family import Call, Family
from vla_pruner.attach.layout import Layout, ensure
from vla_pruner.errors import BudgetError, SessionError
from vla_pruner.methods.base import Evidence, Method
from vla_pruner.plugins import is_foreign
from vla_pruner.wording import counted

VISUAL_LAST = (
    "A visual token is in the prompt's last position, which emits the first action token; the prompt must end in text."
)

NOTHING_READS = "A row of the batch is masked as a whole, so nothing in it reads the visual tokens; leave it out."

Plan = tuple[Layout, Tensor | None, dict[int, tuple[int, ...]]]


@dataclass(frozen=True)
class Stage:
    """One pruning layer.

    Attributes:
        method: the one that chooses there.
        cameras: the same for each camera, if the method's `keep` is per camera; None: one budget for all.
        foreign: whether the method is a user's own, so that its results are checked.
    """

    method: Method
    cameras: tuple[Method, ...] | None
    foreign: bool = False

    def budgets(self, counts: tuple[int, ...], absent: frozenset[int], known: tuple[int, ...] | None) -> list[int]:
        """Tokens kept: one number for all cameras together, or one for each.

        Args:
            counts: visual tokens of each camera in the sequence as it is given.
            absent: cameras that the host knows to be absent.
            known: visual tokens that each camera would have, if the model alone decides it.
        """
        present = [0 if camera in absent else count for camera, count in enumerate(counts)]
        # A camera that the policy left out of the sequence has its budget, but no tokens here.
        known = known or counts
        if self.cameras is None:
            full = [budget_of(self.method, sum(known))]
            short = [self.method.budget_of_present(sum(known), sum(present))]
        else:
            full = [budget_of(method, count) for method, count in zip(self.cameras, known, strict=True)]
            short = [min(budget, count) for budget, count in zip(full, present, strict=True)]
        # If all is kept nothing may change, so absent cameras that hold a place stay too.
        return list(counts) if sum(full) >= sum(known) else short

    def select(self, evidence: Evidence, counts: tuple[int, ...], budgets: list[int]) -> Tensor:
        """Return (B, k) int64, sorted: the tokens of `evidence` that stay; each camera has `counts` of them."""
        if self.cameras is None:
            return self._ask(self.method, evidence, budgets[0])
        kept, start = [], 0
        for method, count, k in zip(self.cameras, counts, budgets, strict=True):
            ids = torch.arange(count, device=evidence.valid.device).expand(evidence.valid.shape[0], -1)
            if k == 0:
                ids = ids[:, :0]
            elif k < count:
                ids = self._ask(method, evidence.span(start, start + count), k)
            kept.append(ids + start)
            start += count
        return torch.cat(kept, dim=1)

    def _ask(self, method: Method, evidence: Evidence, k: int) -> Tensor:
        return selected(method, evidence, k) if self.foreign else method.select(evidence, k)


def stages_of(method: Method, family: Family) -> dict[int, Stage]:
    """Return the stages of `method` in this model by their layer, in order.

    Raises:
        BudgetError: the model lacks a layer, or its visual tokens are fewer than are to be kept.
        OptionError: the method needs evidence that no session has.
    """
    for stage in method.stages():
        check_needs(stage, method.fate.needs_last_step)
    stages = {
        int(stage.layer): Stage(stage, stage.for_cameras(family.cameras), is_foreign(type(stage)))
        for stage in method.stages()
    }
    check_depth(method, family.depth, family.first_layer)
    if type(method).select is not Method.select:  # else it never prunes
        _check_order(list(stages.values()), [stage.layer for stage in method.stages()])
    if family.camera_tokens is not None:
        budgets_of(stages, family.camera_tokens, frozenset(), None)
    return stages


def budgets_of(
    stages: dict[int, Stage], counts: tuple[int, ...], absent: frozenset[int], known: tuple[int, ...] | None
) -> dict[int, tuple[int, ...]]:
    """Tokens that each stage keeps, by its layer; arguments as of `Stage.budgets`.

    Raises:
        BudgetError: a stage is to keep more than there are, or more than the one before left.
    """
    found: dict[int, tuple[int, ...]] = {}
    reach, by = sum(counts), "the prompt has"
    for layer, stage in stages.items():
        given = "then at layer" if found else "layer"
        try:
            found[layer] = tuple(stage.budgets(counts, absent, known))
        except BudgetError as error:
            raise BudgetError(f"{given} {layer}: {error}" if len(found) else str(error)) from error
        after = sum(found[layer])
        if after > reach:
            raise BudgetError(
                f"{given}={layer} is to keep {after} visual tokens, but {by} {reach}; give falling numbers."
            )
        reach, by = after, f"layer {layer} leaves"
    return found


class Planner:
    """Plans prefills before they run; parts that cannot have changed since the last one are not worked out again.

    Args:
        family: of the prefills.
        stages: of the method, by layer.
    """

    def __init__(self, family: Family, stages: dict[int, Stage]) -> None:
        self._family = family
        self._stages = stages
        self._plan: Plan | None = None

    def plan(self, call: Call) -> Plan:
        """Return this prefill's layout, its rows (B, R) that act, and the budgets of each stage by its layer.

        Raises:
            SessionError: a visual token is in a row that acts, a row of the batch is padding alone, or there is no row.
            BudgetError: see `budgets_of`.
        """
        layout = self._family.layout(call)
        if self._plan is None or self._plan[0] is not layout:
            if not layout.rows:
                raise SessionError("The model was called with a batch of no rows; call it with one robot or more.")
            ensure(layout.reading.any(dim=1).all(), NOTHING_READS)
            placed = any(stage.method.reads_placeholders for stage in self._stages.values())
            rows = self._family.placeholder_rows(layout) if placed else self._family.action_rows(layout)
            if rows is not None:
                ensure((layout.visual[:, None] != rows[..., None]).all(), VISUAL_LAST)
            budgets = budgets_of(self._stages, layout.cameras, layout.absent, self._family.camera_tokens)
            self._plan = layout, rows, budgets
        return self._plan


def _check_order(stages: list[Stage], layers: list[int]) -> None:
    if len({stage.cameras is None for stage in stages}) > 1:
        raise BudgetError(
            "keep was given per camera at some pruning layers and for all together at others; choose one."
        )
    if len(layers) > 1 and (layers[0] == 0 or any(one >= other for one, other in pairwise(layers))):
        raise BudgetError(
            f"layer={layers[0]} with then at {_listed(layers[1:])} was given; the layers of then come after `layer`, "
            "each after the one before it, and `layer` is 1 or more."
        )


def _listed(layers: list[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def check_depth(method: Method, layers: int, first: int) -> None:
    """Raise BudgetError unless a decoder of so many layers has those that `method` prunes and reads at.

    Args:
        method: with all of its stages.
        layers: of the decoder.
        first: the lowest pruning layer; see `Family.first_layer`.
    """
    if type(method).select is Method.select:
        return  # It never prunes, and fits every model.
    has = f"the decoder has {counted(layers, 'layer')}"
    for stage in method.stages():
        if not first <= stage.layer < layers:
            given = "layer" if stage.layer == method.layer else "then at layer"
            fix = f"give a layer from {first} to {layers - 1}" if first < layers - 1 else f"give layer={first}"
            if first >= layers:
                fix = f"pruning begins at layer {first} here, so there is none to prune at"
            raise BudgetError(f"{given}={stage.layer} was given, but {has}; {fix}.")
        if "semantic" in stage.needs and stage.semantic_layer >= layers:
            raise BudgetError(f"The semantic score is read at layer {stage.semantic_layer}, but {has}.")
