"""The reference policy: image encoder -> projector -> causal Llama -> action tokens, decoded one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_pruner.caches import cache_name, new_cache
from vla_pruner.checkpoints.numbers import finite_action
from vla_pruner.models.reference.configuration import ReferenceConfig
from vla_pruner.models.reference.tokenizer import BOS
from vla_pruner.models.reference.trained import TrainedPolicy

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class VisionBlock(nn.Module):
    """One pre-norm transformer block over patches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, W) -> (B, M, W)."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = self.attend(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(mixed)
        return x + self.mlp(self.norm2(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, M, W / heads) each -> the same."""
        return F.scaled_dot_product_attention(q, k, v)


def stem(width: int) -> nn.Sequential:
    """Return the convolutional stem of the reference policies: (B, 3, H, W) -> (B, width, H / 8, W / 8)."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, stride=2, padding=2),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.Conv2d(64, width, 3, stride=2, padding=1),
        nn.GroupNorm(8, width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
    )


class VisionEncoder(nn.Module):
    """A convolutional stem (stride 8) and a few transformer blocks: one token a patch."""

    centre: Tensor
    spread: Tensor

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        if config.patch_size != 8:
            raise ValueError("The stem has a stride of 8: patch_size must be 8.")
        width = config.vision_width
        self.stem = stem(width)
        side = config.image_size // config.patch_size
        self.position = nn.Parameter(grid_positions(side, width))
        self.blocks = nn.ModuleList(VisionBlock(width, config.vision_heads) for _ in range(config.vision_layers))
        self.norm = nn.LayerNorm(width)
        self.landmarks = Landmarks(width, side)
        # The encoder's output for an average scene, measured once after training and subtracted: most of an image never
        # changes, and the changes would otherwise be small beside it.
        self.register_buffer("centre", torch.zeros(side * side, width))
        self.register_buffer("spread", torch.ones(width))

    def patches(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, M, vision_width), raster order, each from its neighbourhood only."""
        return self.stem(pixels).flatten(2).transpose(1, 2)

    def mix(self, patches: Tensor) -> Tensor:
        """Mix patches (B, M, vision_width) into tokens of the same shape that depend on place and surroundings."""
        x = patches + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def finish(self, tokens: Tensor) -> Tensor:
        """Tokens of `mix` -> the encoder's output: standardised, and the landmarks' tokens tagged."""
        return (tokens - self.centre) / self.spread + self.landmarks.tags(tokens)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, M, vision_width), raster order."""
        return self.finish(self.mix(self.patches(pixels)))


class Landmarks(nn.Module):
    """Two learned heat maps over the patches (object and goal), and the tags that they add to the tokens.

    A token that a heat map points at gets a tag with the landmark's exact place; all other tokens are left alone. A
    small language model then finds the few tokens that matter, instead of averaging over all of them.
    """

    frequencies: Tensor

    def __init__(self, width: int, side: int, count: int = 2) -> None:
        super().__init__()
        self.side, self.count = side, count
        self.cells = nn.Linear(width, self.count)
        self.offsets = nn.Linear(width, 2 * self.count)
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(-1, 4).float(), persistent=False)
        self.tag = nn.Linear(self.count * (1 + 4 * len(self.frequencies)), width, bias=False)
        nn.init.zeros_(self.tag.weight)

    def tags(self, tokens: Tensor) -> Tensor:
        """(B, M, width) -> (B, M, width)."""
        weights = self.weigh(self.cells(tokens))
        line = torch.arange(self.side, device=tokens.device, dtype=tokens.dtype)
        grid = torch.stack([line.repeat(self.side), line.repeat_interleave(self.side)], dim=-1)
        offsets = self.offsets(tokens).unflatten(-1, (self.count, 2))
        places = (grid[:, None] + 0.5 + offsets) * (2 / self.side) - 1
        angles = (places[..., None] * self.frequencies).flatten(-2)
        features = torch.cat([angles.sin(), angles.cos(), torch.ones_like(angles[..., :1])], dim=-1)
        return self.tag((weights[..., None] * features).flatten(-2))

    def weigh(self, cells: Tensor) -> Tensor:
        """Heat maps (B, M, count) -> how much of each landmark is in each patch; the parts add up to one."""
        return cells.softmax(dim=1)


def grid_positions(side: int, width: int) -> Tensor:
    """Return (side * side, width) sines and cosines of row and column: a start that already distinguishes positions."""
    frequencies = math.pi * 2.0 ** torch.linspace(-1, 3, width // 4)
    line = torch.linspace(-1, 1, side)[:, None] * frequencies
    waves = torch.cat([line.sin(), line.cos()], dim=1)
    rows, columns = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
    return 0.5 * torch.cat([rows, columns], dim=1)


class ProprioProjector(nn.Module):
    """Proprioception -> one token; sines at several scales make centimetres visible to a small network."""

    mean: Tensor
    scale: Tensor
    frequencies: Tensor

    def __init__(self, mean: Sequence[float], scale: Sequence[float], hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(-2, 3).float(), persistent=False)
        features = len(mean) * (1 + 2 * 5)
        self.mlp = nn.Sequential(
            nn.Linear(features, 2 * hidden),
            nn.GELU(),
            nn.Linear(2 * hidden, hidden),
        )

    def forward(self, proprio: Tensor) -> Tensor:
        """(..., P) -> (..., hidden)."""
        x = (proprio - self.mean) / self.scale
        angles = (x[..., None] * self.frequencies).flatten(-2)
        return self.mlp(torch.cat([x, angles.sin(), angles.cos()], dim=-1))


class ReferencePolicy(TrainedPolicy):
    """A small vision-language-action policy, shaped like OpenVLA.

    The prompt is [BOS][visual tokens][instruction][proprio] (`config.visual` has the place of the visual tokens). The
    action is decoded greedily, one token a dimension: one prefill of the whole prompt, whose last row gives dx, then
    one call of `language_model` a further dimension with the key-value cache.
    """

    config: ReferenceConfig
    vision: VisionEncoder
    projector: nn.Sequential
    proprio_projector: ProprioProjector
    language_model: LlamaForCausalLM
    bin_values: Tensor

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__(config)
        from transformers import LlamaConfig, LlamaForCausalLM  # heavy: imported only if a policy is built

        self.vision = VisionEncoder(config)
        self.projector = nn.Sequential(
            nn.Linear(config.vision_width, 2 * config.hidden_size),
            nn.GELU(),
            nn.Linear(2 * config.hidden_size, config.hidden_size),
        )
        side = config.image_size // config.patch_size
        self.visual_position = nn.Parameter(grid_positions(side, config.hidden_size))
        self.proprio_projector = ProprioProjector(config.proprio_mean, config.proprio_scale, config.hidden_size)
        self.language_model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocabulary_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_key_value_heads,
                max_position_embeddings=512,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                bos_token_id=BOS,
                eos_token_id=None,
                pad_token_id=None,
                tie_word_embeddings=False,
            )
        )
        self._cache_name = cache_name(self.language_model)
        bins = torch.linspace(-1.0, 1.0, config.num_bins)
        self.register_buffer("bin_values", bins, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.bin_values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.dtype

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the images that `act` takes."""
        return ("image",)

    @property
    def vision_towers(self) -> tuple[nn.Module, ...]:
        return (self.vision,)

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """(H, W, 3)."""
        return self.image_size, self.image_size, 3

    def visual_tokens(self, images: Tensor) -> Tensor:
        """Return the visual inputs of the language model: (B, H, W, 3) uint8 -> (B, M, hidden)."""
        return self.projector(self.vision(self.pixels(images))) + self.visual_position

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) -> (..., hidden)."""
        return self.language_model.get_input_embeddings()(ids)

    def prompt(self, images: Tensor, instructions: Sequence[str], proprio: Tensor) -> Tensor:
        """Return the prompt's embeddings, (B, config.prompt_length, hidden)."""
        return self.embed_prompt(images, self.encode_instructions(instructions), proprio)

    def embed_prompt(self, images: Tensor, ids: Tensor, proprio: Tensor) -> Tensor:
        """Return `prompt` of instructions that are token ids (B, config.instruction_length) already."""
        visual = self.visual_tokens(images)
        batch = visual.shape[0]
        bos = self.embed(torch.full((batch, 1), BOS, device=self.device))
        text = self.embed(ids)
        body = self.proprio_projector(proprio.to(self.device, self.dtype))[:, None]
        return torch.cat([bos, visual, text, body], dim=1)

    @torch.inference_mode()
    def predict_action(
        self, images: np.ndarray | Tensor, instruction: str | Sequence[str], proprio: np.ndarray | Tensor
    ) -> np.ndarray:
        """One control step of B robots.

        Args:
            images: (B, H, W, 3) uint8, or (H, W, 3) for a single robot.
            instruction: one for all robots, or one each.
            proprio: (B, P) hand position in metres and gripper opening, or (P,).

        Returns:
            (B, 4) float32 actions in [-1, 1], or (4,) if the image was not batched.

        Raises:
            ObservationError: an argument does not fit; the message says which.
            CheckpointError: the network gives numbers that are not finite.
        """
        frames, ids, states, single = self.prepared(images, instruction, proprio)
        actions = finite_action(self.decode(self.embed_prompt(frames, ids, states)).float().cpu().numpy(), self)
        return actions[0] if single else actions

    def decode(self, prompt: Tensor) -> Tensor:
        """Prompt embeddings (B, N, hidden) -> actions (B, action_dimensions); NaN where a logit is not finite."""
        batch, length, _ = prompt.shape
        cache = new_cache()
        embeddings, positions = prompt, torch.arange(length, device=prompt.device)
        chosen: list[Tensor] = []
        believed: list[Tensor] = []
        for step in range(self.config.action_dimensions):
            # The mask is all ones but never None: transformers reads missing masks as "maybe packed sequences" and then
            # cuts attention wherever positions are not consecutive, which is the case after pruning.
            mask = torch.ones((batch, length + step), dtype=torch.long, device=prompt.device)
            output = self.language_model(
                inputs_embeds=embeddings,
                attention_mask=mask,
                position_ids=positions.expand(batch, -1),
                **{self._cache_name: cache},
                use_cache=True,
                logits_to_keep=1,
            )
            logits = output.logits[:, -1, self.config.first_action_token :]
            bins = logits.argmax(dim=-1)
            # The most likely of logits that are not finite would be a valid action.
            believed.append(logits.amax(dim=-1).isfinite())
            chosen.append(bins)
            embeddings = self.embed(bins + self.config.first_action_token)[:, None]
            positions = torch.full((1,), length + step, device=prompt.device)
        return self.bin_values[torch.stack(chosen, dim=1)].where(torch.stack(believed, dim=1), torch.nan)

    def _as_chunks(self, actions: np.ndarray) -> np.ndarray:
        return actions[..., None, :]
