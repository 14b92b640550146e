"""Attention for training on a CPU: plain bfloat16 matrix products, faster than the fused kernel there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Attend(torch.autograd.Function):
    """softmax(q k' + mask) v; probabilities are kept, everything is done in the type that comes in."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q (G, R, d), scaled; k, v (G, N, d); mask (G, 1 or R, N) additive or None -> (G, R, d)."""
        scores = q @ k.transpose(1, 2)
        if mask is not None:
            scores += mask
        weights = scores.softmax(-1)
        out = weights @ v
        ctx.save_for_backward(q, k, v, weights, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, weights, out = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_scores = grad @ v.transpose(1, 2)
        d_scores -= (grad * out).sum(-1, keepdim=True)
        d_scores *= weights
        return d_scores @ k, d_scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ grad, None


def _dtype(query: Tensor) -> torch.dtype:
    """Return the dtype of the matrix products: autocast's, or that of the queries."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute `scaled_dot_product_attention` of (B, H, N, d) without a mask."""
    dtype = _dtype(q)
    q, k, v = (part.to(dtype) for part in (q * q.shape[-1] ** -0.5, k, v))
    out = _Attend.apply(q.flatten(0, 1).contiguous(), k.flatten(0, 1).contiguous(), v.flatten(0, 1).contiguous(), None)
    return out.view(q.shape)


def decoder_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """For transformers' registry: one key-value head, read by all query heads in one product.

    `attention_mask` (B, H, N, N) additive in bfloat16 is laid out for the queries of all heads as it comes in, so
    that a layer has nothing to do but add it.
    """
    batch, heads, rows, width = query.shape
    dtype = _dtype(query)
    q = (query * module.scaling).to(dtype).reshape(batch, heads * rows, width)
    k, v = key[:, 0].to(dtype), value[:, 0].to(dtype)
    out = _Attend.apply(q, k.contiguous(), v.contiguous(), attention_mask.flatten(1, 2))
    return out.view(batch, heads, rows, width).transpose(1, 2), None
