"""LeRobot's GR00T N1.7 with random weights, tiny or at its published size, without any download.

While such a policy is built, the class in LeRobot's module that would read a checkpoint is replaced by one that builds
a model of the size that is given here; afterwards it is restored.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vla_pruner.errors import UnsupportedModelError
from vla_pruner.families.groot import MODULE
from vla_pruner.families.lerobot_common import check_version
from vla_pruner.models.drawn import draw_weights
from vla_pruner.policies.qwen_prompts import pictured

if TYPE_CHECKING:
    from vla_pruner.policies.lerobot import LeRobotPolicy

CAMERAS = ("ego_view", "left_wrist", "right_wrist")
STATE, ACTION = 8, 7
_EMBODIMENT = 3
_TINY_HEAD = {
    "backbone_embedding_dim": 64,
    "select_layer": 6,
    "hidden_size": 32,
    "input_embedding_dim": 48,
    "max_state_dim": 12,
    "max_action_dim": 12,
    "action_horizon": 10,
    "max_seq_len": 64,
    "num_inference_timesteps": 3,
    "diffusion_model_cfg": {
        "positional_embeddings": None,
        "num_layers": 8,
        "num_attention_heads": 4,
        "attention_head_dim": 12,
        "norm_type": "ada_norm",
        "dropout": 0.2,
        "final_dropout": True,
        "output_dim": 32,
        "interleave_self_attention": True,
    },
    "vl_self_attention_cfg": {
        "positional_embeddings": None,
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "dropout": 0.2,
        "final_dropout": True,
    },
}
_TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 8,
    "vocab_size": 600,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [4, 2, 2],
        "rope_type": "default",
        "rope_theta": 5e6,
    },
    "max_position_embeddings": 4096,
}
_TINY_VISION = {
    "deepstack_visual_indexes": [0, 1, 2],
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "num_position_embeddings": 64,
    "out_hidden_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
_SIDES = {"tiny": 64, "full": 256}


def random_groot_policy(
    size: str = "tiny",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    cameras: tuple[str, ...] | None = None,
    **config: Any,
) -> LeRobotPolicy:
    """Make a GR00T N1.7 with random weights, drawn so that its actions depend on its images.

    Its preprocessor is a stand-in. The prompt is the images' tokens and the bytes of the text. Nothing is normalised.

    Args:
        size: "tiny", or "full" for the published size.
        device: the device on which it is built.
        dtype: torch.float32, or torch.bfloat16, in which LeRobot runs it under autocast.
        seed: of the weights.
        cameras: names of the images; None: three.
        **config: fields of LeRobot's config, in place of its defaults.

    Raises:
        UnsupportedModelError: another size or dtype; or lerobot, or a package that it needs for GR00T, is missing.
    """
    from vla_pruner.policies.lerobot import LeRobotPolicy, lerobot_features

    check_version("groot")
    if size not in _SIDES or dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedModelError(
            f"A GR00T of size {size!r} and dtype={dtype} was asked for; size is 'tiny' or 'full', dtype torch.float32 "
            "or torch.bfloat16."
        )
    modeling: Any = importlib.import_module(MODULE)
    network: Any = importlib.import_module("lerobot.policies.groot.groot_n1_7")
    try:
        network.require_package("diffusers", extra="groot")
        network.require_package("dm-tree", extra="groot", import_name="tree")
    except ImportError as error:
        raise UnsupportedModelError(f"GR00T needs packages that are not installed: {error}") from error
    side = _SIDES[size]
    features = lerobot_features(cameras or CAMERAS, side, STATE, ACTION)
    defaults = {"device": str(device), "use_bf16": dtype == torch.bfloat16}
    if size == "tiny":
        defaults |= {"chunk_size": 10, "n_action_steps": 10, "max_state_dim": 12, "max_action_dim": 12}
    given = modeling.GrootConfig(
        **features,
        **defaults | config,
    )
    known, config_of = modeling.GR00TN17, network._cosmos_reason2_qwen3_vl_config
    modeling.GR00TN17 = SimpleNamespace(from_pretrained=lambda **_: _build(network, known, size))
    if size == "tiny":
        network._cosmos_reason2_qwen3_vl_config = tiny_qwen3_vl
    try:
        with torch.device(device):
            policy: Any = modeling.GrootPolicy(given)
    finally:
        modeling.GR00TN17, network._cosmos_reason2_qwen3_vl_config = known, config_of
    policy.to(device).eval()
    draw_weights(policy, seed)
    _draw_others(policy, seed)
    return LeRobotPolicy(policy, GrootPromptMaker(policy, side, device), lambda actions: actions.cpu())


def random_groot(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> LeRobotPolicy:
    """Make a GR00T N1.7; arguments as of `random_policy`."""
    return random_groot_policy(size, device, dtype, seed)


def _build(network: Any, kind: Any, size: str) -> nn.Module:
    fields = dict(network.GR00T_N1_7_DEFAULTS) | {"model_dtype": "float32", "dtype": "float32"}
    if size == "tiny":
        fields |= _TINY_HEAD
    return kind(network.GR00TN17Config(**fields), load_backbone_weights=False).float()


def tiny_qwen3_vl() -> Any:
    """Return the config of a tiny Qwen3-VL."""
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(
        text_config=_TINY_TEXT,
        vision_config=_TINY_VISION,
        image_token_id=500,
        video_token_id=501,
        vision_start_token_id=502,
        vision_end_token_id=503,
        tie_word_embeddings=True,
    )


@torch.no_grad()
def _draw_others(policy: Any, seed: int) -> None:
    """Draw the weights of each embodiment's layers, which are parameters without modules, and enlarge the normed
    queries.
    """
    generator = torch.Generator(next(policy.parameters()).device).manual_seed(seed)
    head = policy._groot_model.action_head
    for name, weight in head.named_parameters():
        if name.endswith(".W"):
            weight.normal_(std=weight.shape[-2] ** -0.5, generator=generator)
    for layer in policy._groot_model.backbone.language_model.layers:
        layer.self_attn.q_norm.weight.fill_(2)


class GrootPromptMaker:
    """Stands in for LeRobot's preprocessor, which needs a tokenizer: turns images, text and state into model inputs.

    Args:
        policy: the policy whose cameras and sizes are used.
        side: side of the square images in pixels.
        device: the device of the tensors.
    """

    def __init__(self, policy: Any, side: int, device: str | torch.device) -> None:
        self._config = policy._groot_model.backbone.model.config
        self._state = policy._groot_model.config.max_state_dim
        self._keys = list(policy.config.image_features)
        self._side = side
        self._device = device

    def __call__(self, observation: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return a batch of one row.

        Args:
            observation: images (3, H, W) in [0, 1] by "observation.images.NAME", "task" and "observation.state".
        """
        images = [observation[key].to("cpu") for key in self._keys if key in observation]
        state = observation["observation.state"].to("cpu")
        return self.batch([images], [list(observation["task"].encode())], state[None])

    def batch(self, images: list[list[Tensor]], texts: list[list[int]], states: Tensor) -> dict[str, Tensor]:
        """Return the model's inputs for rows of images (3, H, W), texts as lists of numbers, and states (B, d); padded
        on the left.
        """
        tails = [[3 + number % 400 for number in text] for text in texts]
        found = pictured(self._config, self._side, images, tails)
        padded = nn.functional.pad(states.float(), (0, self._state - states.shape[1]))
        found |= {
            "state": padded[:, None],
            "embodiment_id": torch.full((len(texts),), _EMBODIMENT, device="cpu"),
        }
        return {name: value.to(self._device) for name, value in found.items()}
