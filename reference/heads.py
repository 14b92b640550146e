"""Training-only heads: questions to the encoder and the language model besides the action.

Small objects are the hard part. Regressing positions from all tokens at once finds them late, because no token is
marked as the right one; asking "which patch holds the object" gives that token its own gradient.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_pruner.models.reference.configuration import ReferenceConfig
from vla_pruner.models.reference.network import Landmarks
from vla_pruner.simulators.metaworld import (
    CAMERA_AZIMUTH,
    CAMERA_DISTANCE,
    CAMERA_ELEVATION,
    CAMERA_FOVY,
    CAMERA_LOOKAT,
)

STATE_TARGETS = 6
"""Regression targets: object position and goal position."""


def project(points: np.ndarray, image_size: int) -> np.ndarray:
    """(..., 3) positions in metres -> (..., 2) column and row in pixels of the policy's camera."""
    azimuth, elevation = np.radians(CAMERA_AZIMUTH), np.radians(CAMERA_ELEVATION)
    forward = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    ray = points - (np.array(CAMERA_LOOKAT) - CAMERA_DISTANCE * forward)
    focal = image_size / 2 / np.tan(np.radians(CAMERA_FOVY) / 2)
    depth = ray @ forward
    return image_size / 2 + focal * np.stack([ray @ right / depth, -(ray @ up) / depth], axis=-1)


class TrainingHeads(nn.Module):
    """Reads positions from patches, from the encoder's tokens and from the last prompt token."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        width, queries = config.vision_width, 8
        self.side, self.patch = config.image_size // config.patch_size, config.patch_size
        self.queries = nn.Parameter(0.1 * torch.randn(queries, width))
        self.keys = nn.Linear(width, width)
        self.values = nn.Linear(width, 64)
        self.scene = nn.Sequential(nn.Linear(64 * queries, 256), nn.GELU(), nn.Linear(256, STATE_TARGETS))
        self.state = nn.Linear(config.hidden_size, STATE_TARGETS)
        self.local_cells = nn.Linear(width, 2)

    def from_vision(self, tokens: Tensor) -> Tensor:
        """(B, M, vision_width) -> (B, STATE_TARGETS)."""
        weights = (self.queries @ self.keys(tokens).transpose(1, 2) / tokens.shape[-1] ** 0.5).softmax(-1)
        return self.scene((weights @ self.values(tokens)).flatten(1))

    def where(self, landmarks: Landmarks, patches: Tensor, tokens: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of finding object and goal in the image, and the share of objects that are found.

        Args:
            landmarks: the encoder's own heat maps, which are trained by this loss.
            patches: (B, M, W) before the encoder's attention; tokens: (B, M, W) after it.
            pixels: (B, 2, 2) true columns and rows of object and goal.
        """
        places = (pixels / self.patch).clamp(0, self.side - 1e-3)
        cells = places.floor()
        index = (cells[..., 1] * self.side + cells[..., 0]).long()
        logits = [head(x).transpose(1, 2) for head, x in ((self.local_cells, patches), (landmarks.cells, tokens))]
        loss = sum(F.cross_entropy(each.flatten(0, 1), index.flatten()) for each in logits)
        batch = torch.arange(len(tokens))
        guesses = [
            landmarks.offsets(tokens[batch, index[:, thing]])[:, 2 * thing : 2 * thing + 2] for thing in range(2)
        ]
        loss = loss + F.mse_loss(torch.stack(guesses, dim=1), places - cells - 0.5)
        guess = logits[1][:, 0].argmax(-1)
        column, row = guess % self.side, guess // self.side
        near = (column - cells[:, 0, 0]).abs().maximum((row - cells[:, 0, 1]).abs()) <= 1
        return loss, near.float().mean()
