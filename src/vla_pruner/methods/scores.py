"""Attention scores and their estimate over time (VLA-Pruner, arXiv 2511.16449, section 3). Pure functions, float32."""

from __future__ import annotations

import torch
from torch import Tensor

from vla_pruner.methods.memory import Memory


def attention_probabilities(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Return the softmax attention of the given query rows only, in float32.

    Args:
        query: (B, H, R, d) rotated queries of R rows.
        key: (B, G, S, d) rotated keys, G key-value heads (H a multiple of G).
        mask: broadcastable to (B, H, R, S); bool (True: visible) or additive float. None: every key is visible.
        scaling: factor on the logits.
        softcap: Gemma 2's bound on the logits, if any.

    Returns:
        (B, H, R, S) float32 probabilities.
    """
    batch, heads, rows, dim = query.shape
    groups = key.shape[1]
    grouped = (query.float() * scaling).reshape(batch, groups, heads // groups * rows, dim)
    logits = (grouped @ key.float().transpose(-1, -2)).view(batch, heads, rows, key.shape[2])
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        # In place, because these are the largest tensors that scoring makes.
        lowest = torch.finfo(torch.float32).min
        logits = logits.masked_fill_(~mask, lowest) if mask.dtype == torch.bool else logits.add_(mask)
    return logits.softmax(dim=-1)


def mean_over_rows(probabilities: Tensor, weights: Tensor) -> Tensor:
    """Return the attention that each key receives, averaged over heads and over query rows (equations 2 and 3 of the
    paper).

    Args:
        probabilities: (B, H, R, S) float32.
        weights: (B, R), 1 for a row that counts and 0 for one that does not (padding, or not a query of this score).

    Returns:
        (B, S) float32.
    """
    weights = weights.to(torch.float32)
    total = (weights[:, None, :] @ probabilities.sum(dim=1))[:, 0]
    return total / (probabilities.shape[1] * weights.sum(dim=1, keepdim=True).clamp_min(1))


def mean_logits(query: Tensor, key: Tensor, weights: Tensor, scaling: float) -> Tensor:
    """Return the attention logits that each key receives, averaged over heads and over query rows.

    Args:
        query: (B, H, N, d) rotated queries.
        key: (B, G, S, d) rotated keys, G key-value heads (H a multiple of G).
        weights: (B, N), 1 for a row that counts and 0 for one that does not; at least one 1 in each row.
        scaling: factor on the logits.

    Returns:
        (B, S) float32. No mask and no soft cap applies: these are the products themselves.
    """
    batch, heads, _, dim = query.shape
    weights = weights.to(torch.float32)
    # The mean of products with a key is the product with the mean query.
    mean = (weights[:, None, None] @ query.float())[:, :, 0] / weights.sum(dim=1)[:, None, None]
    mean = mean.view(batch, key.shape[1], heads // key.shape[1], dim).sum(dim=2)
    return (mean[:, :, None] @ key.float().transpose(-1, -2)).sum(dim=1)[:, 0] * (scaling / heads)


def text_raters(visual: Tensor, valid: Tensor, prompt: Tensor, text: Tensor) -> Tensor:
    """Return a mask of the text tokens that resemble the image most (SparseVLM, arXiv 2410.04417, equations 5 and 6).

    r_i = mean over visual tokens j of softmax_i(h_j . h_i) over the text tokens i; those with r_i >= mean(r) rate.

    Args:
        visual: (B, M, D) input embeddings of the visual tokens.
        valid: (B, M) bool, False for visual tokens that do not count.
        prompt: (B, N, D) input embeddings of the whole prompt, the M visual tokens included.
        text: (B, N) bool, the text tokens, none of them visual; at least one in each row.

    Returns:
        (B, N) bool, at least one True in each row.
    """
    # Text tokens are never visual, so at most N - M rows can be text and the products with the image have a static
    # shape.
    ids = torch.sort(text.float(), dim=1, descending=True, stable=True).indices[:, : prompt.shape[1] - visual.shape[1]]
    candidates, is_text = prompt.gather(1, ids[..., None].expand(-1, -1, prompt.shape[2])), text.gather(1, ids)
    logits = visual.float() @ candidates.float().transpose(-1, -2)
    shares = logits.masked_fill(~is_text[:, None], -torch.inf).softmax(dim=-1)
    relevance = (shares * valid[..., None]).sum(dim=1) / valid.sum(dim=1, keepdim=True).clamp_min(1)
    threshold = relevance.sum(dim=1, keepdim=True) / is_text.sum(dim=1, keepdim=True)
    # Rounding must not leave a text of equal tokens without raters.
    rates = is_text & (relevance >= torch.minimum(threshold, relevance.amax(dim=1, keepdim=True)))
    return torch.zeros_like(text).scatter(1, ids, rates)


def temporal_estimate(
    memory: Memory,
    decay: float,
    unseen: str = "zero",
    newest_weighs_most: bool = True,
    semantic: bool = False,
    steps: Tensor | None = None,
    refresh_every: int | None = None,
) -> Tensor:
    """Return the decayed mean of the last steps' action scores: sum_i decay^i S(t-i) / sum_i decay^i over the steps
    that exist.

    Args:
        memory: the rows' history; its window is the number of steps that are averaged.
        decay: weight of a step against the one after it, in (0, 1].
        unseen: the score of a token in a step that pruned it away: "zero" (as published) or "carry" (the score at which
            it was last seen, times decay for every step since).
        semantic: of the semantic scores instead, which the memory must hold.
        newest_weighs_most: True follows the paper. False follows the authors' code: the oldest step gets weight 1.
        steps: (B,) `memory.steps` on the device of the scores; None copies them there.
        refresh_every: n if every n-th step runs unpruned: then only the last of these steps and those after it count.
            In the steps before it the kept tokens alone shared all attention, so with them in the mean no other token
            would ever win.

    Returns:
        (B, M) float32; 0 for rows without any history.
    """
    window = memory.window
    steps_ago = torch.arange(window, 0, -1, device=memory.action.device)
    exponents = steps_ago if newest_weighs_most else window - steps_ago
    weights = decay**exponents
    steps = memory.steps.to(steps_ago.device, non_blocking=True) if steps is None else steps
    exists = steps_ago[None] <= steps[:, None]
    if refresh_every is not None:
        exists = exists & (steps_ago[None] <= (steps[:, None] - 1) % refresh_every + 1)
    weights = weights * exists
    known = decay**memory.age if unseen == "carry" else memory.age == 0
    scores = (memory.semantic if semantic else memory.action) * known * weights[..., None]
    return scores.sum(1) / weights.sum(1, keepdim=True).clamp_min(1e-12)
