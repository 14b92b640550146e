"""The greedy search for a set of tokens whose kernel has a large determinant. A pure function with static shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from vla_pruner.methods.selection import define_op

EXHAUSTED = 1e-5
"""The share of the diagonal's largest entry below which the gain of a token is rounding."""


def determinant_order(kernel: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Greedy maximum of det(kernel[S, S]) over sets S of k candidates (Chen et al., NeurIPS 2018).

    Each pick multiplies the determinant by the most, d^2 = kernel[i, i] - |c_i|^2 with the rows c of a Cholesky factor
    that grows by one column a pick. Ties go to the smaller id. If no candidate adds more than rounding, the one with
    the largest kernel[i, i] is next.

    Args:
        kernel: (B, M, M) float32, symmetric, positive semidefinite.
        candidates: (B, M) bool, at least k True in each row.
        k: how many to choose.

    Returns:
        (B, k) int64 ids in the order in which they were picked.
    """
    # For a compiler this is one opaque step: traced, the loop would be a graph of k steps.
    if torch.compiler.is_compiling():
        return torch.ops.vla_pruner.determinant_order(kernel, candidates, k)
    return _determinant_order(kernel, candidates, k)


def _determinant_order(kernel: Tensor, candidates: Tensor, k: int) -> Tensor:
    batch, tokens, _ = kernel.shape
    rows = torch.arange(batch, device=kernel.device)
    worth = kernel.diagonal(dim1=1, dim2=2)
    adds = worth.clone()
    floor = EXHAUSTED * worth.masked_fill(~candidates, 0.0).amax(dim=1)
    factor = kernel.new_zeros(batch, k, tokens)
    free = candidates.clone()
    order = []
    for number in range(k):
        gain = adds.masked_fill(~free, -torch.inf)
        best = gain.argmax(dim=1)
        gained = gain[rows, best]
        grows = gained > floor
        picked = torch.where(grows, best, worth.masked_fill(~free, -torch.inf).argmax(dim=1))
        known = (factor[rows, :, picked][:, None] @ factor)[:, 0]
        column = (kernel[rows, picked] - known) / gained.clamp_min(1e-30).sqrt()[:, None]
        column = torch.where(grows[:, None], column, 0.0)
        factor = factor.slice_scatter(column[:, None], 1, number, number + 1)
        adds = adds - column.square()
        free = free.scatter(1, picked[:, None], False)
        order.append(picked)
    return torch.stack(order, dim=1)


def _shape_of_order(kernel: Tensor, candidates: Tensor, k: int) -> Tensor:
    return kernel.new_empty((kernel.shape[0], k), dtype=torch.int64)


define_op(
    "determinant_order(Tensor kernel, Tensor candidates, SymInt k) -> Tensor",
    _determinant_order,
    _shape_of_order,
    _determinant_order,
)
