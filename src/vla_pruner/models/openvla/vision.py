"""DINOv2 and SigLIP as OpenVLA uses them, and the projector into the language model.

Facts from the official code and from timm's vision transformer (README.md of the golden checkpoints): features are the
output of the last block but one, without a final norm and without prefix tokens. Modules are named as in the published
checkpoints. The rest of their content (the last block, the final norm, SigLIP's attention pool) is neither built nor
loaded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_pruner.models.openvla.configuration import IMAGE_SIZE, TowerSize

LAYER_NORM_EPS = 1e-6


class LayerScale(nn.Module):
    """Scales each channel. transformers would rewrite the name `gamma`, so the checkpoints call it `scale_factor`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.scale_factor


class Attention(nn.Module):
    """Self-attention over all tokens, with one matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU (the exact one), linear."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden)))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, size: TowerSize) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.width, eps=LAYER_NORM_EPS)
        self.attn = Attention(size.width, size.heads)
        self.ls1 = LayerScale(size.width) if size.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(size.width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(size.width, size.mlp_width)
        self.ls2 = LayerScale(size.width) if size.layer_scale else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.ls1(self.attn(self.norm1(hidden)))
        return hidden + self.ls2(self.mlp(self.norm2(hidden)))


class PatchEmbed(nn.Module):
    """An image cut into patches, each projected to a token."""

    def __init__(self, size: TowerSize) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, size.width, kernel_size=size.patch, stride=size.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class VisionTower(nn.Module):
    """One vision transformer up to its last block but one: (N, 3, 224, 224) -> (N, patches, width)."""

    def __init__(self, size: TowerSize) -> None:
        super().__init__()
        self.size = size
        self.patch_embed = PatchEmbed(size)
        self.pos_embed = nn.Parameter(torch.zeros(1, size.patches, size.width))
        if size.prefix:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
            self.reg_token = nn.Parameter(torch.zeros(1, size.prefix - 1, size.width))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth - 1))

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.patch_embed(pixels) + self.pos_embed
        if self.size.prefix:
            # Positions belong to the patches alone: the class token and the registers are added after them.
            prefix = torch.cat([self.cls_token, self.reg_token], dim=1).expand(len(hidden), -1, -1)
            hidden = torch.cat([prefix, hidden], dim=1)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden[:, self.size.prefix :]


class VisionBackbone(nn.Module):
    """DINOv2 and SigLIP side by side: (B, 6 * cameras, 224, 224) -> (B, cameras * patches, both widths).

    Each tower is called once, with the images of all rows and cameras as its batch.
    """

    def __init__(self, dino: TowerSize, siglip: TowerSize) -> None:
        super().__init__()
        self.featurizer = VisionTower(dino)
        self.fused_featurizer = VisionTower(siglip)

    def forward(self, pixel_values: Tensor) -> Tensor:
        rows = len(pixel_values)
        images = pixel_values.reshape(-1, 6, IMAGE_SIZE, IMAGE_SIZE)
        dino, siglip = self.featurizer(images[:, :3]), self.fused_featurizer(images[:, 3:])
        return torch.cat([dino, siglip.to(dino.device)], dim=-1).reshape(rows, -1, dino.shape[-1] + siglip.shape[-1])


class Projector(nn.Module):
    """Both towers' features to the language model's width: (B, M, both widths) -> (B, M, D)."""

    def __init__(self, vision_width: int, llm_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_width, 4 * vision_width)
        self.fc2 = nn.Linear(4 * vision_width, llm_width)
        self.fc3 = nn.Linear(llm_width, llm_width)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))


def unused_weights(dino: TowerSize, siglip: TowerSize) -> list[str]:
    """Return patterns of the weights that published checkpoints hold and the policy does not use."""
    towers = {"featurizer": dino, "fused_featurizer": siglip}
    last = [rf"^vision_backbone\.{name}\.blocks\.{size.depth - 1}\." for name, size in towers.items()]
    return [*last, r"^vision_backbone\.(fused_)?featurizer\.norm\.", r"^vision_backbone\.fused_featurizer\.attn_pool\."]
