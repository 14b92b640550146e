"""The two-camera reference policy: image encoder -> projector -> causal Llama -> a chunk of actions in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from vla_pruner.checkpoints.numbers import finite_action
from vla_pruner.models.chunk.configuration import ChunkConfig
from vla_pruner.models.reference.network import Landmarks, ProprioProjector, VisionBlock, grid_positions, stem
from vla_pruner.models.reference.tokenizer import BOS
from vla_pruner.models.reference.trained import TrainedPolicy

if TYPE_CHECKING:
    from transformers import LlamaModel


class ViewLandmarks(Landmarks):
    """Landmarks of one camera, which may be out of its view."""

    def weigh(self, cells: Tensor) -> Tensor:
        """Heat maps (B, M, count) -> how much of each landmark is in each patch: sigmoids may all be zero."""
        return cells.sigmoid()


class CameraEncoder(nn.Module):
    """A convolutional stem (stride 8) and a few transformer blocks that all cameras share: one token a patch.

    Positions, landmarks and the average scene that is subtracted are each camera's own.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, config: ChunkConfig) -> None:
        super().__init__()
        if config.patch_size != 8:
            raise ValueError("The stem has a stride of 8: patch_size must be 8.")
        width, cameras, side = config.vision_width, len(config.cameras), config.image_size // config.patch_size
        self.stem = stem(width)
        self.position = nn.Parameter(grid_positions(side, width).repeat(cameras, 1, 1))
        self.blocks = nn.ModuleList(VisionBlock(width, config.vision_heads) for _ in range(config.vision_layers))
        self.norm = nn.LayerNorm(width)
        self.landmarks = nn.ModuleList(ViewLandmarks(width, side, config.landmarks) for _ in range(cameras))
        # The encoder's output for an average scene, measured once after training and subtracted: most of an image never
        # changes, and the changes would otherwise be small beside it.
        self.register_buffer("centre", torch.zeros(cameras, side * side, width))
        self.register_buffer("spread", torch.ones(cameras, 1, width))

    def patches(self, pixels: Tensor) -> Tensor:
        """(B, C, 3, H, W) normalised pixels of C cameras -> (B, C, M, width), each patch of its neighbourhood."""
        return self.stem(pixels.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, pixels.shape[:2])

    def mix(self, patches: Tensor) -> Tensor:
        """(B, C, M, width) patches -> (B, C, M, width) tokens that depend on their place and the rest of the image."""
        x = (patches + self.position).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).unflatten(0, patches.shape[:2])

    def finish(self, tokens: Tensor) -> Tensor:
        """Tokens of `mix` -> the encoder's output: standardised, and the landmarks' tokens tagged."""
        tags = torch.stack([mark.tags(tokens[:, camera]) for camera, mark in enumerate(self.landmarks)], dim=1)  # type: ignore[operator]
        return (tokens - self.centre) / self.spread + tags

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, 3, H, W) normalised pixels -> (B, C, M, width), raster order."""
        return self.finish(self.mix(self.patches(pixels)))


class ChunkPolicy(TrainedPolicy):
    """A small vision-language-action policy of OpenVLA-OFT's shape: several cameras, one pass, a chunk of actions.

    The sequence is [BOS][camera 1][camera 2][instruction][proprio][action rows]. Nothing is decoded: the decoder's
    outputs at the action rows go through a head that gives one action each. Queries share one key-value head, as in the
    Gemma of pi0, so that a frozen token costs little.
    """

    config: ChunkConfig
    vision: CameraEncoder
    decoder: LlamaModel
    action_rows: nn.Parameter

    def __init__(self, config: ChunkConfig) -> None:
        super().__init__(config)
        from transformers import LlamaConfig, LlamaModel  # heavy: imported only if a policy is built

        hidden = config.hidden_size
        self.vision = CameraEncoder(config)
        self.projector = nn.Sequential(
            nn.Linear(config.vision_width, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden)
        )
        side = config.image_size // config.patch_size
        camera = 0.5 * torch.randn(len(config.cameras), 1, hidden)
        self.visual_position = nn.Parameter(grid_positions(side, hidden) + camera)
        self.proprio_projector = ProprioProjector(config.proprio_mean, config.proprio_scale, hidden)
        self.decoder = LlamaModel(
            LlamaConfig(
                vocab_size=config.vocabulary_size,
                hidden_size=hidden,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_key_value_heads,
                max_position_embeddings=config.prompt_length + config.chunk,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                bos_token_id=BOS,
                eos_token_id=None,
                pad_token_id=None,
            )
        )
        self.action_rows = nn.Parameter(0.5 * torch.randn(config.chunk, hidden))
        self.action_head = nn.Sequential(
            nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, config.action_dimensions)
        )

    @property
    def device(self) -> torch.device:
        return self.action_rows.device

    @property
    def dtype(self) -> torch.dtype:
        return self.action_rows.dtype

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the images that `act` takes."""
        return self.config.cameras

    @property
    def vision_towers(self) -> tuple[nn.Module, ...]:
        return (self.vision,)

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """(C, H, W, 3)."""
        return len(self.cameras), self.image_size, self.image_size, 3

    @property
    def chunk(self) -> int:
        """Actions in a chunk."""
        return self.config.chunk

    def project(self, tokens: Tensor) -> Tensor:
        """Project the encoder's tokens (B, C, M, width) to the decoder's inputs (B, C M, hidden)."""
        return (self.projector(tokens) + self.visual_position).flatten(1, 2)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) -> (..., hidden)."""
        return self.decoder.embed_tokens(ids)

    def embed_prompt(self, images: Tensor, ids: Tensor, proprio: Tensor) -> Tensor:
        """Return the whole sequence's embeddings, (B, prompt_length + chunk, hidden).

        Args:
            images: (B, C, H, W, 3) uint8.
            ids: (B, instruction_length) token ids of the instruction.
            proprio: (B, P).
        """
        visual = self.project(self.vision(self.pixels(images)))
        batch = visual.shape[0]
        bos = self.embed(torch.full((batch, 1), BOS, device=self.device))
        body = self.proprio_projector(proprio.to(self.device, self.dtype))[:, None]
        return torch.cat([bos, visual, self.embed(ids), body, self.action_rows.expand(batch, -1, -1)], dim=1)

    def decode(self, prompt: Tensor) -> Tensor:
        """Embeddings of `embed_prompt` -> actions (B, chunk, action_dimensions), not clipped."""
        batch, length, _ = prompt.shape
        # The mask is all ones but never None: transformers reads missing masks as "maybe packed sequences" and then
        # cuts attention wherever positions are not consecutive, which is the case after pruning.
        hidden = self.decoder(
            inputs_embeds=prompt,
            attention_mask=torch.ones((batch, length), dtype=torch.long, device=prompt.device),
            position_ids=torch.arange(length, device=prompt.device).expand(batch, -1),
            use_cache=False,
        ).last_hidden_state
        return self.action_head(hidden[:, -self.config.chunk :])

    @torch.inference_mode()
    def predict_action(
        self, images: np.ndarray | Tensor, instruction: str | Sequence[str], proprio: np.ndarray | Tensor
    ) -> np.ndarray:
        """One control step of B robots.

        Args:
            images: (B, C, H, W, 3) uint8, one image of each camera in the order of `cameras`; (C, H, W, 3) for a single
                robot.
            instruction: one for all robots, or one each.
            proprio: (B, P), or (P,).

        Returns:
            (B, chunk, action_dimensions) float32 actions in [-1, 1], or (chunk, action_dimensions) for a single robot.

        Raises:
            ObservationError: an argument does not fit; the message says which.
            CheckpointError: the network gives numbers that are not finite.
        """
        frames, ids, states, single = self.prepared(images, instruction, proprio)
        actions = finite_action(self.decode(self.embed_prompt(frames, ids, states)).float().cpu().numpy(), self)
        chunks = actions.clip(-1, 1)
        return chunks[0] if single else chunks
