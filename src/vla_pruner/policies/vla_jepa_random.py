"""LeRobot's VLA-JEPA with random weights, tiny or at its published size, without any download.

While such a policy is built, the class in LeRobot's module that holds its Qwen3-VL is replaced by one that builds a
model of the size given here, with prompts that need no tokenizer; afterwards it is restored.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vla_pruner.errors import UnsupportedModelError
from vla_pruner.families.lerobot_common import check_version
from vla_pruner.models.drawn import draw_weights
from vla_pruner.policies.groot_random import tiny_qwen3_vl
from vla_pruner.policies.qwen_prompts import pictured

if TYPE_CHECKING:
    from vla_pruner.policies.lerobot import LeRobotPolicy

CAMERAS = ("image", "wrist_image")
STATE, ACTION = 8, 7
_SIDES = {"tiny": 64, "full": 256}
_TINY = {
    "chunk_size": 7,
    "action_hidden_size": 32,
    "action_num_layers": 2,
    "action_num_heads": 2,
    "action_attention_head_dim": 16,
    "num_inference_timesteps": 2,
    "num_embodied_action_tokens_per_instruction": 6,
}
MODULE = "lerobot.policies.vla_jepa.modeling_vla_jepa"


def random_vla_jepa_policy(
    size: str = "tiny",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    cameras: tuple[str, ...] | None = None,
    **config: Any,
) -> LeRobotPolicy:
    """Make a VLA-JEPA without its world model, with random weights, drawn so that its actions depend on its images.

    A stand-in makes its prompts: the images' tokens, then the bytes of the text, then the embodied action tokens.
    Nothing is normalised.

    Args:
        size: "tiny", or "full" for the published size.
        device: the device on which it is built.
        dtype: torch.float32 or torch.bfloat16, of the weights; LeRobot runs the decoder under autocast.
        seed: of the weights.
        cameras: names of the images; None: two.
        **config: fields of LeRobot's config, in place of its defaults.

    Raises:
        UnsupportedModelError: another size or dtype; or lerobot, or a package that it needs for VLA-JEPA, is missing.
    """
    from vla_pruner.policies.lerobot import LeRobotPolicy, lerobot_features

    check_version("vla_jepa")
    if size not in _SIDES or dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedModelError(
            f"A VLA-JEPA of size {size!r} and dtype={dtype} was asked for; size is 'tiny' or 'full', dtype "
            "torch.float32 or torch.bfloat16."
        )
    modeling: Any = importlib.import_module(MODULE)
    head: Any = importlib.import_module("lerobot.policies.vla_jepa.action_head")
    try:
        head.require_package("diffusers", extra="vla_jepa")
    except ImportError as error:
        raise UnsupportedModelError(f"VLA-JEPA needs packages that are not installed: {error}") from error
    side = _SIDES[size]
    features = lerobot_features(cameras or CAMERAS, side, STATE, ACTION)
    defaults: dict[str, Any] = {"device": str(device), "torch_dtype": str(dtype).removeprefix("torch.")}
    defaults |= {"enable_world_model": False, **(_TINY if size == "tiny" else {})}
    given = modeling.VLAJEPAConfig(
        **features,
        **defaults | config,
    )
    known = modeling.Qwen3VLInterface
    modeling.Qwen3VLInterface = lambda config: StandInQwen(config, size, side, dtype)
    try:
        with torch.device(device):
            policy: Any = modeling.VLAJEPAPolicy(given)
    finally:
        modeling.Qwen3VLInterface = known
    policy.to(device).eval()
    draw_weights(policy, seed)
    with torch.no_grad():
        for layer in policy.model.qwen.model.model.language_model.layers:
            layer.self_attn.q_norm.weight.fill_(2)
    return LeRobotPolicy(policy, _Batches(device), lambda actions: actions.cpu())


def random_vla_jepa(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> LeRobotPolicy:
    """Make a VLA-JEPA; arguments as of `random_policy`."""
    return random_vla_jepa_policy(size, device, dtype, seed)


class StandInQwen(nn.Module):
    """Stands in for LeRobot's `Qwen3VLInterface`: the same model, and prompts that need no tokenizer.

    Args:
        config: of the policy.
        size: "tiny" or "full".
        side: side of the square images in pixels.
        dtype: of the weights.
    """

    def __init__(self, config: Any, size: str, side: int, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers import Qwen3VLForConditionalGeneration

        network: Any = importlib.import_module("lerobot.policies.groot.groot_n1_7")
        sizes = tiny_qwen3_vl() if size == "tiny" else network._cosmos_reason2_qwen3_vl_config()
        self.config = config
        model: Any = Qwen3VLForConditionalGeneration._from_config(sizes, attn_implementation="sdpa")
        self.model = model.to(dtype)
        self.model.config.hidden_size = sizes.text_config.hidden_size
        self._side = side
        self._embodied = sizes.vision_end_token_id + 10

    def expand_tokenizer(self) -> tuple[list[str], list[int], int]:
        """Return the names and ids of the action tokens, and the id of the embodied action token."""
        count = self.config.chunk_size * 4
        names = [self.config.special_action_token.format(number) for number in range(count)]
        return names, [self._embodied + 1 + number for number in range(count)], self._embodied

    def build_inputs(
        self, images: Sequence[Sequence[Tensor]], instructions: Sequence[str], action_prompt: str, embodied_prompt: str
    ) -> dict[str, Tensor]:
        """Return the model's inputs."""
        places = embodied_prompt.count(self.config.embodied_action_token)
        tails = [[*(3 + byte % 400 for byte in text.encode()), *[self._embodied] * places, 3] for text in instructions]
        rows = [[image.to("cpu") for image in row] for row in images]
        found = pictured(self.model.config, self._side, rows, tails)
        found["mm_token_type_ids"] = (found["input_ids"] == self.model.config.image_token_id).int()
        return {name: value.to(self.model.device) for name, value in found.items()}

    @staticmethod
    def to_pixel_values(image: Tensor) -> Tensor:
        """Return the images unchanged, in float32."""
        return image.detach().float()


class _Batches:
    """Stands in for LeRobot's preprocessor: a row becomes a batch of one."""

    def __init__(self, device: str | torch.device) -> None:
        self._device = device

    def __call__(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        batch = {name: value[None].to(self._device) for name, value in observation.items() if isinstance(value, Tensor)}
        return {**batch, "task": [observation["task"]]}
