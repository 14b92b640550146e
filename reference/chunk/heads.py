"""Training-only heads: questions to the encoder and the decoder besides the actions.

Small objects are the hard part. Regressing positions from all tokens at once finds them late, because no token is
marked as the right one; asking "which patch holds the object" gives that token its own gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_pruner.models.chunk import ChunkConfig
from vla_pruner.models.chunk.network import CameraEncoder


class TrainingHeads(nn.Module):
    """Finds marks in the images, from patches and from tokens, and the places of things, from the decoder."""

    def __init__(self, config: ChunkConfig, asked: int) -> None:
        """`asked` is the number of things whose places the decoder is asked for by one question."""
        super().__init__()
        self.side, self.patch = config.image_size // config.patch_size, config.patch_size
        self.local_cells = nn.Linear(config.vision_width, config.landmarks)
        self.places = nn.Linear(config.hidden_size, len(config.cameras) * asked * 2)
        nn.init.constant_(self.local_cells.bias, -4.0)

    def where(self, encoder: CameraEncoder, patches: Tensor, tokens: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of finding things in the images, and the share of things in view that are found to within a
        patch.

        Args:
            encoder: its heat maps are trained by this loss.
            patches: (B, C, M, W) before the encoder's attention; tokens: (B, C, M, W) after it.
            marks: (B, C, K, 2) columns and rows, NaN where a thing is out of view.
        """
        seen = ~marks[..., 0].isnan()
        places = (marks.nan_to_num() / self.patch).clamp(0, self.side - 1e-3)
        cells = places.floor()
        index = (cells[..., 1] * self.side + cells[..., 0]).long()
        target = torch.zeros(*seen.shape, self.side**2).scatter(-1, index[..., None], seen[..., None].float())
        heads: list[Any] = list(encoder.landmarks)
        tagged = torch.stack([head.cells(tokens[:, c]) for c, head in enumerate(heads)], dim=1).transpose(2, 3).float()
        local = self.local_cells(patches).transpose(2, 3).float()
        weight = torch.tensor(20.0)
        loss = sum(
            F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none").sum(-1).mean()
            + F.cross_entropy(logits[seen], index[seen])
            for logits in (local, tagged)
        )
        moved = torch.stack([head.offsets(tokens[:, c]) for c, head in enumerate(heads)], dim=1).float()
        moved = moved.unflatten(-1, (heads[0].count, 2))  # (B, C, M, K, 2)
        at = index[:, :, None, :, None].expand(-1, -1, 1, -1, 2)
        guess = moved.gather(2, at)[:, :, 0]
        loss = loss + F.mse_loss(guess[seen], (places - cells - 0.5)[seen])
        best = tagged.argmax(-1)
        column, row = best % self.side, best // self.side
        near = (column - cells[..., 0]).abs().maximum((row - cells[..., 1]).abs()) <= 1
        return loss, near[seen].float().mean()

    def placing(self, hidden: Tensor, marks: Tensor, asked: Tensor, imagined: Tensor) -> Tensor:
        """Return the mean distance, in image sides, between the places read from the decoder's proprio rows and the
        places of the things that each question is about.

        The instruction decides which things those are, so this teaches the decoder to find what it read.

        Args:
            hidden: (B, S, hidden). marks: (B, C, K, 2) pixels, NaN where a thing is out of view.
            asked: (B, S, J) landmarks. imagined: (B, S) bool, the questions that only see the first camera.
        """
        count, suffixes, things = asked.shape
        cameras = marks.shape[1]
        guess = self.places(hidden).float().view(count, suffixes, cameras, things, 2)
        index = asked[:, :, None, :, None].expand(-1, -1, cameras, -1, 2)
        places = marks / (self.side * self.patch) - 0.5
        target = places[:, None].expand(-1, suffixes, -1, -1, -1).gather(3, index)
        seen = ~target[..., 0].isnan()
        seen[:, :, 1:] &= ~imagined[:, :, None, None]
        return (guess - target)[seen].abs().mean()
