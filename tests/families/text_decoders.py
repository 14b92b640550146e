"""Text decoders of Qwen-VL and Gemma 3 as cases of the matrix: positions as their models give them, images in grids,
DeepStack, and a robot whose prompt is padded on the left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.attach.tiny import CACHE, LAYERS
from tests.families.matrix import Case
from vla_pruner.caches import cache_of

MROPE = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
KINDS = (*MROPE, "gemma3_text")
ROWS, COLUMNS, LEVELS, DECODED = 3, 4, 3, 3
EACH = ROWS * COLUMNS
"""Tokens of an image; there are two, with a token before, between and behind them."""
TEXT = 6
LENGTH = 1 + EACH + 1 + EACH + 1 + TEXT
CAMERAS = {"front": slice(1, 1 + EACH), "wrist": slice(2 + EACH, 2 + 2 * EACH)}
PADDING = (0, 2)
"""Positions that are padding on the left of each robot's prompt."""


class TextLM(nn.Module):
    """A bare decoder with a head, as vision-language models call it."""

    def __init__(self, kind: str, backend: str = "sdpa", layers: int = LAYERS) -> None:
        super().__init__()
        sections: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        if kind == "qwen3_vl_text":
            sections["mrope_interleaved"] = True
        special: dict[str, Any] = {"rope_parameters": sections}
        if kind == "gemma3_text":
            kinds = ["sliding_attention", "full_attention"] * (layers // 2)
            special = {"layer_types": kinds, "sliding_window": 512}
        config = CONFIG_MAPPING[kind](
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **special,
        )
        torch.manual_seed(0)
        self.model: Any = AutoModel.from_config(config, attn_implementation=backend)
        self.lm_head = nn.Linear(32, 64, bias=False)
        self.config = config
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 2:
                    parameter.copy_(torch.randn_like(parameter) * (0.22 if "proj" in name else 0.6))


def grid_positions(padding: int) -> Tensor:
    """(4, N) positions in text, time, height and width, as `get_rope_index` of the Qwen models gives them."""
    columns: list[tuple[int, int, int]] = [(1, 1, 1)] * padding
    now = 0

    def text(count: int) -> None:
        nonlocal now
        columns.extend((now + i,) * 3 for i in range(count))
        now += count

    for _ in CAMERAS:
        text(1)
        columns.extend((now, now + row, now + column) for row in range(ROWS) for column in range(COLUMNS))
        now += max(ROWS, COLUMNS)
    text(1 + TEXT)
    columns = columns[:LENGTH]
    counted = [0] * padding + list(range(LENGTH - padding))
    return torch.cat([torch.tensor(counted)[None], torch.tensor(columns).T])


def text_decoder(kind: str, backend: str = "sdpa", static: bool = False, layers: int = LAYERS) -> Case:
    """A case of one kind; `static` caches have room for more than is decoded."""
    mrope = kind in MROPE

    def step(lm: Any, scene: int, rows: slice) -> Tensor:
        words = torch.Generator().manual_seed(99)
        seen = torch.Generator().manual_seed(scene)
        embeds = torch.randn(2, LENGTH, 32, generator=words)
        is_visual = torch.zeros(2, LENGTH, dtype=torch.bool)
        mask = torch.ones(2, LENGTH, dtype=torch.int64)
        for row, padding in enumerate(PADDING):
            mask[row, :padding] = 0
            for span in CAMERAS.values():
                is_visual[row, span.start + padding : span.stop + padding] = True
        embeds[is_visual] = torch.randn(2 * 2 * EACH, 32, generator=seen)
        levels = torch.randn(LEVELS, 2, 2 * EACH, 32, generator=seen)[:, rows].flatten(1, 2)
        embeds, is_visual, mask = embeds[rows], is_visual[rows], mask[rows]
        positions = torch.stack([grid_positions(padding) for padding in PADDING], dim=1)[:, rows]
        given: dict[str, Any] = {"position_ids": positions if mrope else positions[0]}
        if kind == "qwen3_vl_text":
            given |= {"visual_pos_masks": is_visual, "deepstack_visual_embeds": list(levels)}
        with torch.no_grad():
            cache: Any = DynamicCache(config=lm.config)
            if static:
                cache = StaticCache(config=lm.config, max_cache_len=LENGTH + 9)
            out = lm.model(inputs_embeds=embeds, attention_mask=mask, **given, **{CACHE: cache}, use_cache=True)
            logits = [lm.lm_head(out.last_hidden_state[:, -1])]
            for number in range(DECODED):
                token = logits[-1].argmax(-1, keepdim=True)
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                after = positions[..., -1:] + 1 + number
                out = lm.model(
                    input_ids=token,
                    attention_mask=mask,
                    position_ids=after if mrope else after[0],
                    **{CACHE: cache_of(out)},
                    use_cache=True,
                )
                logits.append(lm.lm_head(out.last_hidden_state[:, -1]))
        return torch.stack(logits, dim=1)

    return Case(
        f"{kind}-{backend}",
        lambda: TextLM(kind, backend, layers).eval(),
        step,
        {"visual": CAMERAS, "padding_side": "left"},
        first=2 if kind == "gemma3_text" else 1,
    )
