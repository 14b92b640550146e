"""Many questions about one image in one forward pass.

An image's visual tokens are most of a prompt. In training several suffixes (instruction, proprio, action tokens) share
one prefix: the attention mask lets each suffix see the prefix and itself only, and each suffix's positions continue the
prefix's, so every suffix computes exactly what it would compute alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vla_pruner.models.reference.configuration import ReferenceConfig
from vla_pruner.models.reference.network import ReferencePolicy
from vla_pruner.models.reference.tokenizer import BOS


def suffix_layout(config: ReferenceConfig, suffixes: int, pooled: bool) -> tuple[Tensor, Tensor]:
    """Additive mask (1, 1, N, N) and positions (1, N) of a prefix and `suffixes` packed suffixes.

    With `pooled`, 2 x 2 visual tokens are one: the pooled tokens take positions spread over the range that the full
    grid takes, so that what is learned on them carries over.
    """
    full = config.num_visual_tokens
    visual = full // 4 if pooled else full
    length = config.instruction_length + config.action_dimensions
    prefix, total = 1 + visual, 1 + visual + suffixes * length
    owner = torch.cat([torch.full((prefix,), -1), torch.arange(suffixes).repeat_interleave(length)])
    sees = (owner[None, :] == -1) | (owner[None, :] == owner[:, None])
    sees &= torch.ones(total, total, dtype=torch.bool).tril()
    mask = torch.zeros(total, total).masked_fill(~sees, torch.finfo(torch.float32).min)
    if pooled:
        side = config.image_size // config.patch_size
        rows, columns = torch.meshgrid(torch.arange(0, side, 2), torch.arange(0, side, 2), indexing="ij")
        places = 1 + (rows * side + columns).flatten() + side // 2
    else:
        places = 1 + torch.arange(full)
    after = 1 + full + torch.arange(length).repeat(suffixes)
    positions = torch.cat([torch.zeros(1, dtype=torch.long), places, after])
    return mask[None, None], positions[None]


def pool_grid(tokens: Tensor) -> Tensor:
    """(B, M, W) -> (B, M / 4, W): the mean of each 2 x 2 block of the grid."""
    batch, count, width = tokens.shape
    side = round(count**0.5)
    grid = tokens.view(batch, side // 2, 2, side // 2, 2, width)
    return grid.mean(dim=(2, 4)).flatten(1, 2)


def packed_forward(
    policy: ReferencePolicy, visual: Tensor, text: Tensor, proprio: Tensor, bins: Tensor, layout: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Logits of every action token of every suffix.

    Args:
        visual: (B, M, hidden) projected visual tokens, full or pooled.
        text: (B, S, T) instruction ids; proprio: (B, S, P); bins: (B, S, A) the action's bin numbers.
        layout: of `suffix_layout`.

    Returns:
        (B, S, A, num_bins) logits and (B, S, hidden) the final hidden state of the last prompt token.
    """
    config = policy.config
    batch, suffixes, words = text.shape
    bos = policy.embed(torch.full((batch, 1), BOS))
    body = policy.proprio_projector(proprio)[:, :, None]
    earlier = policy.embed(bins[:, :, :-1] + config.first_action_token)
    tails = torch.cat([policy.embed(text), body, earlier], dim=2).flatten(1, 2)
    mask, positions = layout
    hidden = policy.language_model.model(
        inputs_embeds=torch.cat([bos, visual, tails], dim=1),
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    hidden = hidden[:, 1 + visual.shape[1] :].unflatten(1, (suffixes, -1))[:, :, words:]
    head = policy.language_model.lm_head.weight[config.first_action_token :]
    return hidden @ head.T, hidden[:, :, 0]


def to_bins(actions: Tensor, count: int) -> Tensor:
    """Actions in [-1, 1] -> the nearest bin's number."""
    return ((actions + 1) * (count - 1) / 2).round().long().clamp(0, count - 1)


def action_loss(logits: Tensor, actions: Tensor, values: Tensor, sigma: float = 0.05) -> Tensor:
    """Cross entropy against a narrow bell around the action: a neighbouring bin is nearly right.

    Args:
        logits: (..., bins); actions: (...) in [-1, 1]; values: (bins,).
    """
    targets = torch.softmax(-0.5 * ((actions[..., None] - values) / sigma) ** 2, dim=-1)
    return -(targets * F.log_softmax(logits, dim=-1)).sum(-1).mean()
