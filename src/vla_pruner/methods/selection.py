"""The rules that choose tokens: top-k, union and the greedy max-min filter. Pure functions with static shapes; a union
is a mask.

Ties: of two tokens with the same score or the same distance, the one with the smaller id comes first, on every device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

LARGEST_FUSED = 4096
"""The visual tokens of a row up to which the greedy filter is fused: as many as the registers of one program hold."""


def order_by_score(scores: Tensor, valid: Tensor) -> Tensor:
    """Return ids (..., M) by falling score; tokens that are not `valid` (..., M) come after all that are; ties by id.

    NaNs rank last among the valid tokens, so a choice always exists.
    """
    least = torch.finfo(torch.float32).min
    scores = torch.where(valid, scores.float().nan_to_num(least, neginf=least), -torch.inf)
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def top_mask(scores: Tensor, valid: Tensor, k: int) -> Tensor:
    """Return (..., M) bool: the k highest `scores` (..., M) of each row among `valid` (..., M) tokens, filled up with
    others if there are too few.
    """
    order = order_by_score(scores, valid)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :k], True)


def top_ids(scores: Tensor, valid: Tensor, k: int) -> Tensor:
    """Return the ids (B, k), sorted, of the tokens that `top_mask` marks."""
    return order_by_score(scores, valid)[:, :k].sort(dim=1).values


def marked_ids(kept: Tensor, k: int) -> Tensor:
    """Return (B, k) sorted ids of the k tokens that each row of `kept` (B, M) marks, with a static shape."""
    return torch.sort(kept.to(torch.int8), dim=1, descending=True, stable=True).indices[:, :k]


def finite_tokens(features: Tensor) -> Tensor:
    """Return (B, M) bool: the tokens whose features (B, M, D) have no NaN and no infinity."""
    return features.abs().amax(dim=-1).isfinite()  # NaNs reach the maximum; on a CPU `all` takes several times as long


def present_or_enough(valid: Tensor, k: int, features: Tensor | None = None) -> Tensor:
    """Return (B, M) bool: the `valid` (B, M) tokens, and in rows with fewer than k of them the first others up to k.

    Valid tokens whose `features` (B, M, D) are not finite come after the other valid ones and before all others: those
    that a row has in excess of k are left out. None: there are no features to look at.
    """
    if features is not None:
        usable = valid & finite_tokens(features)
        broken = valid & ~usable
        valid = usable | (broken & (broken.cumsum(dim=1) <= k - usable.sum(dim=1, keepdim=True)))
    missing = k - valid.sum(dim=1, keepdim=True)
    return valid | ((~valid).cumsum(dim=1) <= missing)


def distances(features: Tensor, metric: str = "cosine") -> Tensor:
    """Return pairwise distances (B, M, M) float32 of features (B, M, D): "cosine" is 1 - v_i.v_j / (|v_i| |v_j|), or
    "euclidean". NaNs count as 0.
    """
    features = features.float()
    if metric == "euclidean":
        return torch.cdist(features, features).nan_to_num(0.0)
    features = torch.nn.functional.normalize(features, dim=-1)
    return (1 - features @ features.transpose(-1, -2)).nan_to_num(0.0)


def max_min_order(distance: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Solve the max-min diversity problem (VLA-Pruner, section 3.3) greedily.

    First the candidate whose nearest other candidate is farthest, then again and again the candidate whose smallest
    distance to those chosen is largest.

    Args:
        distance: (B, M, M) float32.
        candidates: (B, M) bool, at least k True in each row.
        k: how many to choose.

    Returns:
        (B, k) int64 ids in the order in which they were picked.
    """
    # For a compiler this is one opaque step: traced, the loop would be a graph of k steps.
    if torch.compiler.is_compiling():
        return torch.ops.vla_pruner.max_min_order(distance, candidates, k)
    return _max_min_order(distance, candidates, k)


def _max_min_order(distance: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Run `max_min_order` in the form that is fastest on the tensors' device."""
    if distance.device.type == "cpu":
        return max_min_order_in_arrays(distance, candidates, k)
    fused = fused_form(distance.device) if distance.shape[-1] <= LARGEST_FUSED else None
    return (fused or max_min_order_in_tensors)(distance, candidates, k)


def max_min_order_in_tensors(distance: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Run `max_min_order` with static shapes and no wait for the host, in some three launches for each pick."""
    tokens = torch.arange(distance.shape[-1], device=distance.device)
    rows = torch.arange(distance.shape[0], device=distance.device)
    outside = ~candidates
    # Not torch.eye, which torch.export turns into 16-bit numbers that torch itself cannot compute with.
    itself = tokens[:, None] == tokens
    nearest = distance.masked_fill(outside[:, None, :] | itself, torch.inf).amin(dim=-1)
    # `argmax` returns the first of equals, which is the smallest id. A token at distance -inf from itself is never
    # picked twice, without any bookkeeping in the loop.
    picked = nearest.masked_fill(outside, -torch.inf).argmax(dim=-1)
    distance = distance.masked_fill(itself, -torch.inf)
    reach = torch.full_like(nearest, torch.inf).masked_fill(outside, -torch.inf)
    order = [picked]
    for _ in range(k - 1):
        reach = torch.minimum(reach, distance[rows, picked])
        picked = reach.argmax(dim=-1)
        order.append(picked)
    return torch.stack(order, dim=1)


def max_min_order_in_arrays(distance: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Run `max_min_order` on the CPU: the same picks, row by row and among the candidates alone."""
    arrays = zip(distance.detach().numpy(), candidates.numpy(), strict=True)
    return torch.from_numpy(np.stack([_max_min_row(row, present, k) for row, present in arrays]))


def _max_min_row(distance: np.ndarray, candidates: np.ndarray, k: int) -> np.ndarray:
    # The candidates' ids rise, so the first of equals is the smallest id here too.
    ids = np.flatnonzero(candidates)
    distance = distance[np.ix_(ids, ids)]
    np.fill_diagonal(distance, np.inf)
    picked = distance.min(axis=1).argmax()
    np.fill_diagonal(distance, -np.inf)
    reach = np.full(len(ids), np.inf, distance.dtype)
    order = [picked]
    for _ in range(k - 1):
        np.minimum(reach, distance[picked], out=reach)
        picked = reach.argmax()
        order.append(picked)
    return ids[order]


@cache
def fused_form(device: torch.device) -> Callable[[Tensor, Tensor, int], Tensor] | None:
    """Return `max_min_order` for `device` in two launches; None if Triton is not installed or does not run."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    try:
        from vla_pruner.methods.greedy_triton import max_min_order_in_triton

        # Triton needs a C compiler, Python's headers and a GPU of compute capability 7 or newer; only a trial run shows
        # whether they are there.
        max_min_order_in_triton(torch.zeros(1, 2, 2, device=device), torch.ones(1, 2, 2, device=device)[0] > 0, 2)
    except Exception as error:
        warnings.warn(
            f"Triton is installed but does not run on {device} ({type(error).__name__}: {error}), so the greedy filter "
            "picks the same tokens in some three launches for each; repair Triton or uninstall it.",
            stacklevel=2,
        )
        return None
    return max_min_order_in_triton


def _shape_of_order(distance: Tensor, candidates: Tensor, k: int) -> Tensor:
    return distance.new_empty((distance.shape[0], k), dtype=torch.int64)


_library = torch.library.Library("vla_pruner", "FRAGMENT")

PLAIN_FORMS: dict[str, Callable[..., Tensor]] = {}
"""By the name of an operator, the same function in torch's own operators alone, for programs that leave Python."""


def define_op(
    schema: str,
    function: Callable[..., Tensor],
    shape: Callable[..., Tensor],
    plain: Callable[..., Tensor] | None = None,
) -> None:
    """Make `function` an operator of torch.ops.vla_pruner, which compilers call without tracing into it.

    Args:
        schema: as torch writes operators.
        function: a pure function.
        shape: a function that makes an empty tensor of the result's shape, dtype and device.
        plain: the same function in torch's own operators, which may be traced; None: there is none.
    """
    # Registered by hand: torch.library.custom_op does the same, but each call costs several times as much. Operators of
    # our own may be part of CUDA graphs unless their tags say otherwise; these neither wait for the host nor have
    # shapes that depend on data.
    name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vla_pruner::{name}", shape, lib=_library)
    if plain is not None:
        PLAIN_FORMS[name] = plain


define_op(
    "max_min_order(Tensor distance, Tensor candidates, SymInt k) -> Tensor",
    _max_min_order,
    _shape_of_order,
    max_min_order_in_tensors,
)
