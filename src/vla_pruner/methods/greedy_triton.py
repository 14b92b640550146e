"""The greedy max-min filter in two Triton kernels, however many the picks. Imported only if Triton is installed.

The first kernel finds how far each candidate's nearest other candidate is, which takes the whole distance matrix and so
the whole device. The second makes all k picks of a row in one program: each token's distance to its nearest pick stays
in registers, and one row of the matrix is read for each pick.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports] optional
import triton.language as tl  # pyright: ignore[reportMissingImports] optional
from torch import Tensor

# The first kernel's programs.
_DISTANCES_OF_A_PROGRAM = 4096
_WARPS_OF_THE_FIRST = 4
# The second's: eight tokens a thread, so that the models' usual 256 need one warp, which waits for no other.
_TOKENS_OF_A_WARP = 256


@triton.jit
def nearest_kernel(distance, candidates, nearest, tokens, tile: tl.constexpr, block: tl.constexpr):
    """Write nearest (B, M): the distance of each candidate to the nearest other one; -inf for all other tokens."""
    batch = tl.program_id(1).to(tl.int64)
    candidates += batch * tokens
    mine = tl.program_id(0) * tile + tl.arange(0, tile)
    others = tl.arange(0, block)
    mine_is_one = tl.load(candidates + mine, mask=mine < tokens, other=0) != 0
    other_is_one = tl.load(candidates + others, mask=others < tokens, other=0) != 0
    counts = (mine_is_one[:, None] & other_is_one[None, :]) & (mine[:, None] != others[None, :])
    at = batch * tokens * tokens + mine[:, None] * tokens + others[None, :]
    # Whole rows at a time, so that the loads are wide; entries that do not count are masked afterwards.
    found = tl.load(distance + at, mask=mine_is_one[:, None] & (others < tokens)[None, :], other=0.0)
    found = tl.where(found == found, found, 0.0)
    least = tl.min(tl.where(counts, found, float("inf")), axis=1)
    tl.store(nearest + batch * tokens + mine, tl.where(mine_is_one, least, float("-inf")), mask=mine < tokens)


@triton.jit(do_not_specialize=["k"])
def greedy_kernel(distance, nearest, order, tokens, k, block: tl.constexpr):
    """Write order (B, k): the picks of each row, one program each. `tl.argmax` takes the first of equals: the smallest
    id.
    """
    batch = tl.program_id(0).to(tl.int64)
    distance += batch * tokens * tokens
    order += batch * k
    ids = tl.arange(0, block)
    inside = ids < tokens
    first = tl.load(nearest + batch * tokens + ids, mask=inside, other=float("-inf"))
    picked = tl.argmax(first, axis=0)
    tl.store(order, picked.to(tl.int64))
    reach = tl.where(first > float("-inf"), float("inf"), float("-inf"))
    for step in range(1, k):
        found = tl.load(distance + picked * tokens + ids, mask=inside, other=0.0)
        # With a NaN among them the first of equals could be a place beyond the last token.
        found = tl.where(found == found, found, 0.0)
        reach = tl.where(ids == picked, float("-inf"), tl.minimum(reach, found))
        picked = tl.argmax(reach, axis=0)
        tl.store(order + step, picked.to(tl.int64))


def shape_of(tokens: int) -> tuple[int, int, int]:
    """Return `block` and `tile` of the kernels for rows of `tokens` tokens, and the warps of the second kernel."""
    block = max(32, triton.next_power_of_2(tokens))
    return block, max(1, _DISTANCES_OF_A_PROGRAM // block), max(1, min(8, block // _TOKENS_OF_A_WARP))


def max_min_order_in_triton(distance: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Return `max_min_order` in two launches, without a wait for the host and capturable in a CUDA graph.

    NaNs in `distance` count as 0.

    Args:
        distance: (B, M, M) float32, M at most `selection.LARGEST_FUSED`.
        candidates: (B, M) bool, at least k True in each row.
        k: how many to choose.

    Returns:
        (B, k) int64 ids in the order in which they were picked.
    """
    rows, tokens = candidates.shape
    distance, candidates = distance.contiguous(), candidates.contiguous()
    nearest = torch.empty_like(candidates, dtype=torch.float32)
    order = torch.empty((rows, k), dtype=torch.int64, device=distance.device)
    block, tile, warps = shape_of(tokens)
    first: Any = nearest_kernel
    picks: Any = greedy_kernel
    programs = (triton.cdiv(tokens, tile), rows)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(distance):
        first[programs](distance, candidates, nearest, tokens, tile, block, num_warps=_WARPS_OF_THE_FIRST)
        picks[(rows,)](distance, nearest, order, tokens, k, block, num_warps=warps)
    return order
