"""pi0 as transformers ships it, loaded with every weight accounted for and called with images and a sentence.

`PI0ForConditionalGeneration` is the module; the steps around it are done here, because transformers' image processor
needs torchvision, and because its `from_pretrained` misses the vision tower of published checkpoints before 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_pruner.checkpoints.files import (
    checkpoint_folder,
    described_by,
    is_file,
    read_json,
    refuse_quantized,
    settings_for,
    shown,
)
from vla_pruner.checkpoints.numbers import check_counts, finite_action, finite_row
from vla_pruner.checkpoints.weights import check_depth, check_finite, check_fit, misfit, read_headers, read_weights
from vla_pruner.checks import check_attention
from vla_pruner.errors import CheckpointError, ObservationError, OptionError
from vla_pruner.families.pi0 import anatomy_of
from vla_pruner.observations import HOLDS_IMAGE, check_images, check_instruction, state_of
from vla_pruner.policies.options import as_dtype
from vla_pruner.versions import check_transformers

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""The published model's cameras, in its order."""

_OPTIONAL = ("model.dit.embed_tokens.weight",)
_STATISTICS = ("state_mean", "state_std", "actions_mean", "actions_std")
_RENAMES = (
    (r"^model\.(?=paligemma_with_expert\.|(state|action\w*)_(in|out)?_?proj\.|action_time_mlp)", ""),
    (r"^paligemma_with_expert\.paligemma\.lm_head\.", "model.vlm.language_model.embed_tokens."),
    (r"^paligemma_with_expert\.gemma_expert\.lm_head\.", "model.dit.embed_tokens."),
    (r"^paligemma_with_expert\.paligemma\.model\.", "model.vlm."),
    (r"^paligemma_with_expert\.gemma_expert\.model\.", "model.dit."),
    (r"^model\.vlm\.language_model\.model\.", "model.vlm.language_model."),
    (r"^(state_proj|action_in_proj|action_time_mlp_in|action_time_mlp_out)\.", r"embed_action_time.\1."),
)


_Weight = TypeVar("_Weight")


class TransformersPI0:
    """transformers' pi0 with its preparation of images, text and state.

    Attributes:
        takes_absent_cameras: True: `act` accepts fewer images than there are cameras.

    Args:
        module: a `PI0ForConditionalGeneration`.
        cameras: names of the images, in the order in which the model was trained on them.
        tokenizer: of transformers, or any with its call and `bos_token_id`; None: `act` refuses.
        statistics: mean and standard deviation of state and actions (`state_mean`, `state_std`, `actions_mean`,
            `actions_std`). Values without statistics are not scaled: `act` then takes a normalised state, or gives
            normalised actions of all `max_action_dim` columns.
    """

    takes_absent_cameras = True

    def __init__(
        self,
        module: nn.Module,
        cameras: Sequence[str] = CAMERAS,
        tokenizer: Any = None,
        statistics: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    ) -> None:
        self.module: Any = module
        self.cameras = tuple(cameras)
        self.tokenizer = tokenizer
        self._statistics = {name: np.asarray(values) for name, values in (statistics or {}).items()}

    @property
    def vision_towers(self) -> tuple[nn.Module, ...]:
        """SigLIP."""
        return anatomy_of(self.module).towers

    @property
    def proprio_size(self) -> int:
        """The number of values in the robot's state; without statistics, the largest possible one."""
        mean = self._statistics.get("state_mean")
        return self.module.config.max_state_dim if mean is None else len(mean)

    @property
    def action_size(self) -> int:
        """The number of values in an action; without statistics, all columns of the model."""
        mean = self._statistics.get("actions_mean")
        if mean is None or "actions_std" not in self._statistics:
            return self.module.config.max_action_dim
        return len(mean)

    def reset(self) -> None:
        """Begin a new episode. The policy itself has no memory."""

    def act(self, images: Mapping[str, np.ndarray], instruction: str, proprio: np.ndarray | None = None) -> np.ndarray:
        """Run one control step: return the action chunk (chunk, dim) float32.

        The noise that the flow starts from is drawn from torch's global generator; seed it for repeatable actions.

        Args:
            images: (H, W, 3) uint8 by camera; they are resized to fit and padded on both sides with black. Cameras may
                be left out, but not all of them: absent ones are masked, as in openpi.
            instruction: the task in words.
            proprio: (d,) the robot's state, d at most `proprio_size`.

        Raises:
            ObservationError: images, cameras or state are not as the policy takes them.
            CheckpointError: the policy has no tokenizer, or its network gives numbers that are not finite.
        """
        check_images(images, self.cameras)
        check_instruction(instruction)
        if not images or not set(images) <= set(self.cameras):
            raise ObservationError(
                f"The images are {', '.join(map(repr, images)) or 'none'}; this policy takes one or more of "
                f"{', '.join(map(repr, self.cameras))}. Other names can be given to load_policy(cameras=...)."
            )
        weight = self.module.action_out_proj.weight
        size = self.module.config.vlm_config.vision_config.image_size
        here = [camera in images for camera in self.cameras]
        black = torch.full((3, size, size), -1.0)
        pixels = [prepare_image(images[camera], size) if camera in images else black for camera in self.cameras]
        ids, mask = self._tokens(instruction, sum(here))
        actions: Tensor = self.module.sample_actions(
            state=self._state(proprio).to(weight.device, weight.dtype),
            input_ids=ids.to(weight.device),
            pixel_values=torch.stack(pixels)[None].to(weight.device, weight.dtype),
            # Without a mask transformers counts positions from 1, which the model was not trained with.
            attention_mask=mask.to(weight.device),
            pixel_attention_mask=torch.tensor([here], device=weight.device),
        )
        return finite_action(self._scaled(actions[0].float().cpu().numpy()), self.module)

    def _tokens(self, instruction: str, present: int) -> tuple[Tensor, Tensor]:
        """Return ids and mask, (1, N) int64 each: image tokens of the `present` cameras, BOS, the instruction, a new
        line and, for each absent camera, as much padding as it has tokens.
        """
        if self.tokenizer is None:
            raise CheckpointError(
                "This policy has no tokenizer. Put tokenizer.json and tokenizer_config.json of PaliGemma into the "
                "checkpoint's folder, or call .module.sample_actions with token ids of yours."
            )
        vlm = self.module.config.vlm_config
        each = (vlm.vision_config.image_size // vlm.vision_config.patch_size) ** 2
        text = self.tokenizer(f"{instruction}\n", add_special_tokens=False)["input_ids"]
        from vla_pruner.models.openvla.tokenizer import check_ids

        check_ids([self.tokenizer.bos_token_id, *text], vlm.text_config.vocab_size)
        if vlm.image_token_id in text:
            raise ObservationError(HOLDS_IMAGE.format(what="the image token"))
        ids = [*([vlm.image_token_id] * each * present), self.tokenizer.bos_token_id, *text]
        padding = [0] * each * (len(self.cameras) - present)
        return torch.tensor([ids + padding]), torch.tensor([[1] * len(ids) + padding])

    def _state(self, proprio: np.ndarray | None) -> Tensor:
        """Return (1, max_state_dim) float32, normalised, zeros after the robot's own numbers."""
        if proprio is None:
            raise ObservationError("pi0 reads the robot's state; give proprio.")
        state = state_of(proprio)
        mean, deviation = (self._statistics.get(name) for name in ("state_mean", "state_std"))
        exact = mean is not None
        if state.ndim != 1 or len(state) > self.proprio_size or (exact and len(state) != len(mean)):
            raise ObservationError(
                f"proprio has the shape {state.shape}; this policy takes ({self.proprio_size},)"
                f"{'' if exact else ' or fewer, normalised'}."
            )
        if mean is not None and deviation is not None:
            state = (state - mean) / (deviation + 1e-8)
        padded = np.zeros((1, self.module.config.max_state_dim), dtype=np.float32)
        padded[0, : len(state)] = state
        return torch.from_numpy(padded)

    def _scaled(self, actions: np.ndarray) -> np.ndarray:
        mean, deviation = (self._statistics.get(name) for name in ("actions_mean", "actions_std"))
        if mean is None or deviation is None:
            return actions
        return (actions[:, : len(mean)] * (deviation + 1e-8) + mean).astype(np.float32)


def prepare_image(image: np.ndarray, size: int) -> Tensor:
    """Return an image (H, W, 3) uint8 as pi0 sees it: (3, size, size) float32 in [-1, 1].

    It is scaled to fit (bilinear, antialiased, rounded to whole levels) and centred on black, as in training.

    Raises:
        ObservationError: it is no such image.
    """
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ObservationError(f"An image has shape {pixels.shape} and type {pixels.dtype}; give (H, W, 3) uint8.")
    tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float()
    height, width = pixels.shape[:2]
    if (height, width) != (size, size):
        ratio = max(height, width) / size
        fitted = (max(1, int(height / ratio)), max(1, int(width / ratio)))
        tensor = F.interpolate(tensor, fitted, mode="bilinear", align_corners=False, antialias=True)
        above, left = (size - fitted[0]) // 2, (size - fitted[1]) // 2
        tensor = F.pad(tensor, (left, size - fitted[1] - left, above, size - fitted[0] - above))
        tensor = tensor.round().clamp(0, 255)
    return tensor[0] / 127.5 - 1


def load_pi0(
    path_or_hub_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    cameras: Sequence[str] = CAMERAS,
    attn_implementation: str = "sdpa",
) -> TransformersPI0:
    """transformers' pi0 from a folder or the hub, in eval mode.

    Args:
        path_or_hub_id: with config.json and safetensors, in the published layout or in transformers' own; a tokenizer
            and, in processor_config.json, statistics if they are there.
        device: of the policy.
        dtype: of the weights; None: as config.json has it, else float32.
        cameras: names of the images, in the order in which the model was trained on them.
        attn_implementation: "sdpa" or "eager".

    Raises:
        CheckpointError: a file is missing or damaged, weights are missing or unexpected, or weights or statistics are
            not finite: it lists them.
        UnsupportedModelError: `attn_implementation` is another one, or transformers was not tested.
    """
    check_transformers()
    check_attention(attn_implementation)
    folder = checkpoint_folder(path_or_hub_id)
    path = folder / "config.json"
    config, stored_dtype = _config(path)
    dtype = stored_dtype if dtype is None else dtype
    headers = read_headers(folder)
    statistics = _statistics(folder, config)
    tokenizer = _tokenizer(folder)
    _check_depths(path, config, _renamed(headers, nested=False))
    with described_by(path):
        described = build(config, "meta", dtype, attn_implementation).state_dict()
    nested = any("vision_tower.vision_model." in name for name in described)
    check_fit(folder, misfit(described, _renamed(headers, nested), _OPTIONAL))
    module = build(config, device, dtype, attn_implementation)
    module.load_state_dict(_renamed(read_weights(headers), nested), strict=False)
    check_finite(module, folder, _renamed(headers, nested))
    return TransformersPI0(module, cameras, tokenizer, statistics)


def _config(path: Path) -> tuple[Any, torch.dtype]:
    """Return the configuration that config.json describes, and the dtype that it names."""
    from transformers import PI0Config

    settings = read_json(path)
    refuse_quantized(path, settings)
    check_counts(path, settings, "chunk_size", "num_inference_steps", "max_state_dim", "max_action_dim", most=10_000)
    name = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    try:
        dtype = as_dtype(name if isinstance(name, str) else "")
    except OptionError:
        dtype = None
    if dtype is None:
        raise CheckpointError(f"{path} has dtype {shown(repr(name))}, which is none of weights.")
    with described_by(path):
        return PI0Config.from_dict(settings_for(PI0Config, settings)), dtype


def _check_depths(path: Path, config: Any, names: Mapping[str, Any]) -> None:
    """Refuse a config with more layers in a part of the model than there are weights of."""
    with described_by(path):
        vlm = config.vlm_config
        depths = {
            "model.vlm.language_model.layers.": vlm.text_config.num_hidden_layers,
            "model.vlm.vision_tower.encoder.layers.": vlm.vision_config.num_hidden_layers,
            "model.dit.layers.": config.dit_config.num_hidden_layers,
        }
        for before, layers in depths.items():
            check_depth(path, "num_hidden_layers", layers, names, before)


def build(config: Any, device: str | torch.device, dtype: torch.dtype, attn_implementation: str = "sdpa") -> nn.Module:
    """Build a `PI0ForConditionalGeneration` whose weights are not set yet, directly on the device."""
    from transformers import PI0ForConditionalGeneration
    from transformers.initialization import no_init_weights

    with torch.device(device), no_init_weights():
        module: Any = PI0ForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    # The expert's token embeddings are never read, and some checkpoints lack them.
    nn.init.zeros_(module.model.dit.embed_tokens.weight)
    return module.eval()


def _renamed(weights: Mapping[str, _Weight], nested: bool) -> dict[str, _Weight]:
    """Stored names to the model's own. `nested`: the vision tower has a `vision_model` inside (before 5.6 or so)."""
    renamed: dict[str, _Weight] = {}
    for stored in sorted(weights, key=lambda name: "lm_head" not in name):
        name = stored
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        name = name.replace("vision_tower.vision_model.", "vision_tower.")
        if nested:
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        # Heads come first, so that token embeddings stored beside their tied head win over it.
        renamed[name] = weights[stored]
    return renamed


def _tokenizer(folder: Path) -> Any:
    if not any(is_file(folder / name) for name in ("tokenizer.json", "tokenizer.model")):
        return None
    from vla_pruner.models.openvla.tokenizer import read_tokenizer

    return read_tokenizer(folder)


def _statistics(folder: Path, config: Any) -> dict[str, np.ndarray]:
    path = folder / "processor_config.json"
    if not is_file(path):
        return {}
    values = read_json(path)
    found = {name: finite_row(path, name, values[name]) for name in _STATISTICS if values.get(name) is not None}
    for part, most in (("state", config.max_state_dim), ("actions", config.max_action_dim)):
        mean, deviation = (found.get(f"{part}_{name}") for name in ("mean", "std"))
        if mean is None and deviation is None:
            continue
        if mean is None or deviation is None or len(mean) != len(deviation) or len(mean) > most:
            sizes = ["none" if row is None else len(row) for row in (mean, deviation)]
            raise CheckpointError(
                f"{path} has {sizes[0]} numbers of {part}_mean and {sizes[1]} of {part}_std; it needs as many of both, "
                f"and no more than the model's {most}. Download the checkpoint again."
            )
        if (deviation < 0).any():
            raise CheckpointError(f"{path} has {part}_std {shown(deviation)}, and no deviation is below 0.")
    return found
