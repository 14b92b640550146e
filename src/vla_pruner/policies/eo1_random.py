"""LeRobot's EO-1 with random weights, tiny or at its published size, without any download."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vla_pruner.errors import UnsupportedModelError
from vla_pruner.families.lerobot_common import check_version
from vla_pruner.models.drawn import draw_weights
from vla_pruner.policies.qwen_prompts import pictured

if TYPE_CHECKING:
    from vla_pruner.policies.lerobot import LeRobotPolicy

CAMERAS = ("image", "wrist_image")
STATE, ACTION = 8, 7
_WORDS = {"image_token_id": 0, "video_token_id": 1, "vision_start_token_id": 2, "vision_end_token_id": 3}
"""Special tokens of the tiny size, counted from 400."""
_STATE_WORD, _ACTION_WORD = 10, 11
_TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "vocab_size": 500,
    "max_position_embeddings": 512,
    "rope_parameters": {"mrope_section": [4, 2, 2], "rope_type": "default", "rope_theta": 1e6},
}
_TINY_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "window_size": 16,
    "fullatt_block_indexes": [2],
    "tokens_per_second": 2,
}
# Qwen2.5-VL-3B, as far as it differs from the defaults of transformers.
_FULL_TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_parameters": {"mrope_section": [16, 24, 24], "rope_type": "default", "rope_theta": 1e6},
}
_FULL_VISION = {"hidden_size": 1280, "out_hidden_size": 2048}
_SIDES = {"tiny": 64, "full": 308}
"""Side of the square images in pixels: 308 pixels make 121 tokens, the most that LeRobot's processor allows."""


def random_eo1_policy(
    size: str = "tiny",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int | None = None,
    cameras: tuple[str, ...] | None = None,
    **config: Any,
) -> LeRobotPolicy:
    """Make an EO-1 with random weights, drawn so that its actions depend on its images.

    Its preprocessor is a stand-in. The prompt is the images' tokens, the bytes of the text, the state and one
    placeholder per action. Nothing is normalised.

    Args:
        size: "tiny", or "full" for the published size.
        device: the device on which it is built.
        dtype: torch.float32 or torch.bfloat16.
        seed: of the weights.
        layers: depth of the decoder; None: that of the size.
        cameras: names of the images; None: two.
        **config: fields of LeRobot's config, in place of its defaults.

    Raises:
        UnsupportedModelError: another size or dtype, or lerobot is missing or of an untested version.
    """
    from vla_pruner.policies.lerobot import LeRobotPolicy, lerobot_features

    check_version("eo1")
    if size not in _SIDES or dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedModelError(
            f"An EO-1 of size {size!r} and dtype={dtype} was asked for; size is 'tiny' or 'full', dtype torch.float32 "
            "or torch.bfloat16."
        )
    modeling: Any = importlib.import_module("lerobot.policies.eo1.modeling_eo1")
    side, is_tiny = _SIDES[size], size == "tiny"
    features = lerobot_features(cameras or CAMERAS, side, STATE, ACTION)
    first = 400 if is_tiny else 151_000
    text = dict(_TINY_TEXT if is_tiny else _FULL_TEXT)
    if layers is not None:
        text["num_hidden_layers"] = layers
    vlm = {
        "text_config": text,
        "vision_config": _TINY_VISION if is_tiny else _FULL_VISION,
        **{name: first + number for name, number in _WORDS.items()},
    }
    defaults: dict[str, Any] = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    defaults |= {"vlm_config": vlm, "pretrained_path": "none", "action_act": "silu", "attn_implementation": "sdpa"}
    if is_tiny:
        defaults |= {"num_denoise_steps": 3}
    given = modeling.EO1Config(
        **features,
        **defaults | config,
    )
    with torch.device(device):
        policy: Any = modeling.EO1Policy(given)
    policy.to(device).eval()
    draw_weights(policy, seed)
    maker = EO1PromptMaker(policy, side, first, device)
    return LeRobotPolicy(policy, maker, lambda actions: actions.cpu())


def random_eo1(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> LeRobotPolicy:
    """Make an EO-1; arguments as of `random_policy`."""
    return random_eo1_policy(size, device, dtype, seed)


class EO1PromptMaker:
    """Stands in for LeRobot's preprocessor, which needs a tokenizer: turns images, text and state into model inputs.

    Args:
        policy: the policy whose cameras and sizes are used.
        side: side of the square images in pixels.
        first: the first of the special tokens.
        device: the device of the tensors.

    Attributes:
        side: side of the square images in pixels.
    """

    def __init__(self, policy: Any, side: int, first: int, device: str | torch.device) -> None:
        self._config = policy.model.vlm_backbone.config
        self._keys = list(policy.config.image_features)
        self._chunk = policy.config.chunk_size
        self.side = side
        self._state_word, self._action_word = first + _STATE_WORD, first + _ACTION_WORD
        self._device = device

    def __call__(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch of one row.

        Args:
            observation: images (3, H, W) in [0, 1] by "observation.images.NAME", "task" and "observation.state".
        """
        images = [observation[key].to("cpu") for key in self._keys if key in observation]
        state = observation["observation.state"].to("cpu")
        return self.batch([images], [list(observation["task"].encode())], state[None])

    def batch(self, images: list[list[Tensor]], texts: list[list[int]], states: Tensor) -> dict[str, Any]:
        """Return the model's inputs for rows of images (3, H, W), texts as lists of numbers, and states (B, d)."""
        places = [self._action_word] * self._chunk
        tails = [[*(3 + number % 390 for number in text), self._state_word, *places] for text in texts]
        found = pictured(self._config, self.side, images, tails)
        found["mm_token_type_ids"] = (found["input_ids"] == self._config.image_token_id).int()
        found["observation.state"] = states.float()
        moved: dict[str, Any] = {name: value.to(self._device) for name, value in found.items()}
        return {**moved, "state_token_id": self._state_word, "action_token_id": self._action_word}
