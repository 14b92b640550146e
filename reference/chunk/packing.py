"""Many questions about one control step in one forward pass.

Images are most of a sequence. In training several suffixes (instruction, proprio, action rows) share one prefix: the
attention mask lets each suffix see the prefix and itself only, and each suffix's positions continue the prefix's, so
every suffix computes exactly what it would compute alone. A suffix with an imagined hand does not see the wrist camera.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vla_pruner.models.chunk import ChunkConfig, ChunkPolicy
from vla_pruner.models.reference.tokenizer import BOS


def positions(config: ChunkConfig, suffixes: int, pooled: bool) -> Tensor:
    """Return (1, N) positions of a prefix and `suffixes` packed suffixes.

    With `pooled`, 2 x 2 visual tokens of a camera are one: the pooled tokens take positions spread over the range that
    the full grid takes, so that what is learned on them carries over.
    """
    side, each = config.image_size // config.patch_size, config.patches
    if pooled:
        rows, columns = torch.meshgrid(torch.arange(0, side, 2), torch.arange(0, side, 2), indexing="ij")
        grid = (rows * side + columns).flatten() + side // 2
    else:
        grid = torch.arange(each)
    visual = torch.cat([1 + number * each + grid for number in range(len(config.cameras))])
    tail = config.instruction_length + 1 + config.chunk
    after = 1 + config.num_visual_tokens + torch.arange(tail).repeat(suffixes)
    return torch.cat([torch.zeros(1, dtype=torch.long), visual, after])[None]


def mask(config: ChunkConfig, imagined: Tensor, pooled: bool) -> Tensor:
    """Return (B, heads, N, N) bfloat16: 0 where a row sees a column and very low elsewhere; `imagined` (B, S) marks the
    suffixes that do not see the cameras after the first.
    """
    batch, suffixes = imagined.shape
    each = config.patches // 4 if pooled else config.patches
    tail, prefix = config.instruction_length + 1 + config.chunk, 1 + len(config.cameras) * each
    owner = torch.cat([torch.full((prefix,), -1), torch.arange(suffixes).repeat_interleave(tail)])
    sees = (owner[None, :] == -1) | (owner[None, :] == owner[:, None])
    sees &= torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    sees = sees.repeat(batch, 1, 1)
    sees[:, prefix:, 1 + each : prefix] &= ~imagined.repeat_interleave(tail, dim=1)[:, :, None]
    low = torch.zeros(sees.shape, dtype=torch.bfloat16).masked_fill_(~sees, -1e4)
    return low[:, None].repeat(1, config.num_heads, 1, 1)


def pool(tokens: Tensor, side: int) -> Tensor:
    """(..., M, W) -> (..., M / 4, W): the mean of each 2 x 2 block of the grid."""
    grid = tokens.unflatten(-2, (side // 2, 2, side // 2, 2))
    return grid.mean(dim=(-4, -2)).flatten(-3, -2)


def packed_forward(
    policy: ChunkPolicy, visual: Tensor, text: Tensor, proprio: Tensor, sees: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    """Chunks of every suffix.

    Args:
        visual: (B, V, hidden) visual tokens of all cameras, full or pooled.
        text: (B, S, T) instruction ids; proprio: (B, S, P).
        sees: of `mask`; places: of `positions`.

    Returns:
        (B, S, chunk, A) actions and (B, S, hidden) the final hidden state of the proprio row.
    """
    batch, suffixes, words = text.shape
    bos = policy.embed(torch.full((batch, 1), BOS))
    body = policy.proprio_projector(proprio)[:, :, None]
    rows = policy.action_rows.expand(batch, suffixes, -1, -1)
    tails = torch.cat([policy.embed(text), body, rows], dim=2).flatten(1, 2)
    hidden = policy.decoder(
        inputs_embeds=torch.cat([bos, visual, tails], dim=1),
        attention_mask=sees,
        position_ids=places,
        use_cache=False,
    ).last_hidden_state
    hidden = hidden[:, 1 + visual.shape[1] :].unflatten(1, (suffixes, -1))[:, :, words:]
    return policy.action_head(hidden[:, :, 1:]).float(), hidden[:, :, 0]
