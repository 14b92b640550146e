"""LeRobot's MolmoAct2 with random weights, tiny or at its published size, without any download.

LeRobot builds it from a checkpoint of transformers. While such a policy is built, the names in LeRobot's module that
would read a checkpoint are replaced by ones that return the sizes given here; afterwards they are restored.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vla_pruner.errors import UnsupportedModelError
from vla_pruner.families.lerobot_common import check_version
from vla_pruner.families.molmoact2 import MODULE
from vla_pruner.models.drawn import draw_weights

if TYPE_CHECKING:
    from vla_pruner.policies.lerobot import LeRobotPolicy

CAMERAS = ("camera1", "camera2")
STATE, ACTION = 8, 7
_SPECIALS = ("start", "end", "patch", "col", "low_res_start", "low_res", "frame_start", "frame_end")
"""The tokens around and within images in the order of their ids; the first id equals the size of the vocabulary."""
_BOS = 1


@dataclass(frozen=True)
class MolmoSize:
    """Sizes of a MolmoAct2.

    Attributes:
        text, vision, adapter, expert: keyword arguments of the configs.
        image: side of the square images in pixels.
        steps: denoising steps.
    """

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    adapter: Mapping[str, Any]
    expert: Mapping[str, Any]
    image: int
    steps: int


_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
SIZES = {
    # The text is Qwen3-4B, by the notes of third parties; the other numbers are the defaults of LeRobot's configs.
    "full": MolmoSize(
        text={
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
        vision={},
        adapter={"intermediate_size": 9728},
        expert={},
        image=378,
        steps=10,
    ),
    "tiny": MolmoSize(
        text={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 300,
        },
        vision={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, **_HEADS},
        adapter={"vit_layers": (-1, -3), "hidden_size": 32, "intermediate_size": 64, **_HEADS},
        expert={"hidden_size": 32, "num_heads": 2, "timestep_embed_dim": 16, "ffn_multiple_of": 8},
        image=224,
        steps=3,
    ),
}


def random_molmoact2_policy(
    size: str = "tiny",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int | None = None,
    cameras: tuple[str, ...] | None = None,
    backend: str = "sdpa",
    text: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    **config: Any,
) -> LeRobotPolicy:
    """Make a MolmoAct2 with random weights, drawn so that its actions depend on its images.

    Its preprocessor is a stand-in that assembles the prompt like LeRobot's: the images' tokens, then the bytes of the
    text and the bins of the state. Nothing is normalised.

    Args:
        size: "tiny", or "full" for the published size.
        device: the device on which it is built.
        dtype: torch.float32 or torch.bfloat16.
        seed: of the weights.
        layers: depth of the decoder and of the expert; None: that of the size.
        cameras: names of the images; None: two.
        backend: attention backend of the model.
        text, model: fields of the text's and of the model's config, in place of those of the size.
        **config: fields of LeRobot's config, in place of its defaults.

    Raises:
        UnsupportedModelError: another size or dtype, or lerobot is missing or of an untested version.
    """
    from vla_pruner.policies.lerobot import LeRobotPolicy, lerobot_config, policy_class

    check_version("molmoact2")
    if size not in SIZES or dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedModelError(
            f"A MolmoAct2 of size {size!r} and dtype={dtype} was asked for; size is 'tiny' or 'full', dtype "
            "torch.float32 or torch.bfloat16."
        )
    sizes = SIZES[size]
    sizes = replace(sizes, text={**sizes.text, **(text or {})})
    if layers is not None:
        sizes = replace(sizes, text={**sizes.text, "num_hidden_layers": layers})
    defaults: dict[str, Any] = {"device": str(device), "model_dtype": str(dtype).removeprefix("torch.")}
    defaults |= {"inference_action_mode": "continuous"}
    if size == "tiny":
        defaults |= {"chunk_size": 10, "n_action_steps": 10}
    given = lerobot_config("molmoact2", cameras or CAMERAS, sizes.image, STATE, ACTION, **defaults | config)
    with _built_with(sizes, backend, dict(model or {}), dtype), torch.device(device):
        policy: Any = policy_class("molmoact2")(given)
    policy.to(device).eval()
    draw_weights(policy, seed)
    _draw_others(policy, seed)
    return LeRobotPolicy(policy, PromptMaker(policy, device), lambda actions: actions.cpu())


def random_molmoact2(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> LeRobotPolicy:
    """Make a MolmoAct2; arguments as of `random_policy`."""
    return random_molmoact2_policy(size, device, dtype, seed)


@torch.no_grad()
def _draw_others(policy: Any, seed: int) -> None:
    """Draw the weights that are no matrix of a Linear, and enlarge queries and keys, which share a matrix with the
    values and are normed.
    """
    backbone = policy._backbone()
    words, vit = backbone.transformer.wte, backbone.vision_backbone.image_vit
    for number, weight in enumerate((words.embedding, words.new_embedding, vit.positional_embedding)):
        generator = torch.Generator(weight.device).manual_seed(seed + number)
        weight.normal_(std=1 / math.sqrt(weight.shape[-1]), generator=generator)
    for layer in backbone.transformer.blocks:
        attention = layer.self_attn
        attention.att_proj.weight[: attention.fused_dims[0] + attention.fused_dims[1]].mul_(2)
        if attention.q_norm is not None:
            attention.q_norm.weight.fill_(2)


@contextlib.contextmanager
def _built_with(size: MolmoSize, backend: str, fields: dict[str, Any], dtype: torch.dtype) -> Iterator[None]:
    module: Any = importlib.import_module(MODULE)
    patches = {
        "_resolve_checkpoint_location": lambda path, **_: path,
        "HFMolmoAct2Config": SimpleNamespace(from_pretrained=lambda *_, **__: _config(size, backend, fields)),
        "MolmoAct2ForConditionalGeneration": SimpleNamespace(from_pretrained=_builder(module, dtype)),
        "_strict_load_safetensors_weights": lambda *_: None,
    }
    saved = {name: getattr(module, name) for name in patches}
    vars(module).update(patches)
    try:
        yield
    finally:
        vars(module).update(saved)


def _builder(module: Any, dtype: torch.dtype) -> Any:
    kind = module.MolmoAct2ForConditionalGeneration

    def build(*_: Any, config: Any, **__: Any) -> nn.Module:
        return kind(config).to(dtype)

    return build


def _config(size: MolmoSize, backend: str, fields: dict[str, Any]) -> Any:
    kinds: Any = importlib.import_module("lerobot.policies.molmoact2.molmoact2_hf_model.configuration_molmoact2")
    patch = 14
    vision = {"image_default_input_size": (size.image, size.image), "image_num_pos": (size.image // patch) ** 2}
    norms = {"use_qk_norm": True, "qk_norm_type": "qwen3", "qkv_bias": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # LeRobot requests a check that transformers no longer makes
        text = kinds.MolmoAct2TextConfig(
            **{**norms, "additional_vocab_size": 128, "attn_implementation": backend, **size.text}
        )
    words = {name: size.text["vocab_size"] + number for number, name in enumerate(_SPECIALS)}
    expert = kinds.MolmoAct2ActionExpertConfig(**size.expert, num_layers=text.num_hidden_layers)
    config = kinds.MolmoAct2Config(
        **{
            "text_config": text,
            "vit_config": kinds.MolmoAct2VitConfig(**size.vision, **vision),
            "adapter_config": kinds.MolmoAct2AdapterConfig(**size.adapter, text_hidden_size=text.hidden_size),
            "action_expert_config": expert,
            "image_start_token_id": words["start"],
            "image_end_token_id": words["end"],
            "image_patch_id": words["patch"],
            "image_col_id": words["col"],
            "low_res_image_start_token_id": words["low_res_start"],
            "image_low_res_id": words["low_res"],
            "frame_start_token_id": words["frame_start"],
            "frame_end_token_id": words["frame_end"],
            "flow_matching_num_steps": size.steps,
            "eos_token_id": 2,
            **fields,
        }
    )
    config._attn_implementation = backend
    return config


class PromptMaker:
    """Stands in for LeRobot's preprocessor, which needs a tokenizer: turns images, text and state into model inputs.

    Args:
        policy: the policy whose cameras and sizes are used.
        device: the device of the tensors.
    """

    def __init__(self, policy: Any, device: str | torch.device) -> None:
        self._config = policy._backbone().config
        self._keys = sorted(policy.config.image_features)
        self._device = device
        self._action_dim = policy.config.action_feature.shape[0]

    def __call__(self, observation: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return a batch of one row.

        Args:
            observation: images (3, H, W) in [0, 1] by "observation.images.NAME", "task" and "observation.state".
        """
        keys = [key for key in self._keys if key in observation]
        images = [observation[key].to("cpu") for key in keys]
        text = [*observation["task"].encode(), *self._bins(observation["observation.state"])]
        found = self.batch([images], [text])
        found |= {key: observation[key][None].to(self._device) for key in keys}
        return found

    def batch(self, images: list[list[Tensor]], texts: list[list[int]]) -> dict[str, Tensor]:
        """Return the model's inputs for rows of images (3, H, W) and texts as lists of numbers; padded on the left."""
        config = self._config
        side, patch = config.vit_config.image_default_input_size[0], config.vit_config.image_patch_size
        grid = side // patch
        tokens = -(-grid // 2)
        flat = [image.float()[None] for row in images for image in row]  # of sizes of their own
        seen = [nn.functional.interpolate(image, (side, side), mode="bilinear", antialias=True) for image in flat]
        resized = torch.cat(seen).clamp(0, 1)
        cut = nn.functional.unfold(resized * 2 - 1, patch, stride=patch)
        pixels = cut.unflatten(1, (3, patch * patch)).permute(0, 3, 2, 1).flatten(2)
        line = [config.image_patch_id] * tokens + [config.image_col_id]
        image = [config.image_start_token_id, *line * tokens, config.image_end_token_id]
        words = config.text_config.vocab_size - 3
        rows = [
            [_BOS, *image * len(row), *(3 + number % words for number in text)]
            for row, text in zip(images, texts, strict=True)
        ]
        length = max(map(len, rows))
        ids = torch.tensor([[-1] * (length - len(row)) + row for row in rows], device="cpu")
        mask = ids >= 0
        ids = ids.clamp_min(0)
        count = len(flat)
        found = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": (ids >= config.image_start_token_id).long(),
            "pixel_values": pixels,
            "image_token_pooling": _pooling(grid).repeat(count, 1),
            "image_grids": torch.tensor([[tokens, tokens, 0, 0]] * count, device="cpu"),
            "image_num_crops": torch.ones(count, dtype=torch.int64, device="cpu"),
            "action_dim_is_pad": (torch.arange(config.max_action_dim, device="cpu") >= self._action_dim).repeat(
                len(rows), 1
            ),
        }
        return {name: value.to(self._device) for name, value in found.items()}

    def _bins(self, state: Tensor) -> list[int]:
        """Return the bins of a state in [-1, 1], 256 for each number, as values from 256 to 511."""
        return [256 + int(number) for number in ((state.clamp(-1, 1) + 1) * 127.5).round().tolist()]


def _pooling(grid: int) -> Tensor:
    """Return the patches (tokens, 4) int64 of each token, two by two; -1 beyond the edge."""
    numbers = torch.arange(grid * grid, device="cpu").view(1, 1, grid, grid).float()
    padded = nn.functional.pad(numbers, (0, grid % 2, 0, grid % 2), value=-1)
    return nn.functional.unfold(padded, 2, stride=2)[0].T.long()
