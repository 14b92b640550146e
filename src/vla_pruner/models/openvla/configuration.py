"""The published config.json of OpenVLA and OpenVLA-OFT, and the sizes of the vision towers that it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from vla_pruner.checkpoints.files import AGAIN, described_by, refuse_quantized, settings_for, shown
from vla_pruner.checkpoints.numbers import check_counts, check_positive
from vla_pruner.errors import CheckpointError, UnsupportedModelError

IMAGE_SIZE = 224
PUBLISHED_PAD = 32000
"""Id of the padding token in every published config.json."""

DINO = "vit_large_patch14_reg4_dinov2.lvd142m"
SIGLIP = "vit_so400m_patch14_siglip_224"


@dataclass(frozen=True)
class TowerSize:
    """The shape of one vision tower.

    Attributes:
        width: of its hidden states.
        depth: number of blocks in the checkpoint; the last one is not used.
        heads: attention heads.
        mlp_width: hidden width of the feed-forward part.
        prefix: tokens before the patches: a class token and registers, or none.
        layer_scale: whether each branch of a block is scaled by a learned vector.
        patch: side of a patch in pixels.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    prefix: int = 0
    layer_scale: bool = False
    patch: int = 14

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return (IMAGE_SIZE // self.patch) ** 2


PUBLISHED_TOWERS = {
    DINO: TowerSize(width=1024, depth=24, heads=16, mlp_width=4096, prefix=5, layer_scale=True),
    SIGLIP: TowerSize(width=1152, depth=27, heads=16, mlp_width=4304),
}


class OpenVLAConfig(PretrainedConfig):
    """The content of a published checkpoint's config.json.

    Args:
        text_config: of the language model. Keys that are absent have LlamaConfig's defaults, as when the checkpoints
            were made; so rms_norm_eps is 1e-6, which is not Llama 2's.
        timm_model_ids: names of the two vision towers, DINOv2 first.
        image_sizes: side of the image for each tower.
        norm_stats: statistics of each dataset, by `unnorm_key`.
        n_action_bins: edges of the action bins.
        pad_to_multiple_of: rows that were added to the vocabulary; the action tokens end before them.
        pad_token_id: the token that pads short rows of a batch; none of Llama's own tokens.
        use_fused_vision_backbone: whether there are two towers.
        kwargs: all other entries of the file.
    """

    model_type = "openvla"
    sub_configs = {"text_config": LlamaConfig}  # noqa: RUF012 # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    def __init__(
        self,
        text_config: Mapping[str, Any] | LlamaConfig | None = None,
        timm_model_ids: Sequence[str] = (DINO, SIGLIP),
        image_sizes: Sequence[int] = (IMAGE_SIZE, IMAGE_SIZE),
        norm_stats: dict[str, Any] | None = None,
        n_action_bins: int = 256,
        pad_to_multiple_of: int = 64,
        pad_token_id: int = PUBLISHED_PAD,
        use_fused_vision_backbone: bool = True,
        **kwargs: Any,
    ) -> None:
        if not isinstance(text_config, LlamaConfig):
            text = {"vocab_size": 32064, "pad_token_id": pad_token_id, **(text_config or {})}
            kind = text.pop("model_type", "llama")
            if kind != "llama":
                raise UnsupportedModelError(f"The language model is of type {kind!r}; only 'llama' is supported.")
            text_config = LlamaConfig(**text)
        self.text_config = text_config
        self.timm_model_ids = list(timm_model_ids)
        self.image_sizes = list(image_sizes)
        self.norm_stats = norm_stats or {}
        self.n_action_bins = n_action_bins
        self.pad_to_multiple_of = pad_to_multiple_of
        self.use_fused_vision_backbone = use_fused_vision_backbone
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
        self.pad_token_id = pad_token_id


_SETTINGS = (
    *("timm_model_ids", "image_sizes", "norm_stats", "n_action_bins", "pad_to_multiple_of", "pad_token_id"),
    *("use_fused_vision_backbone", "timm_override_act_layers", "image_resize_strategy"),
    *("arch_specifier", "hf_llm_id", "llm_backbone_id", "llm_max_length", "vision_backbone_id"),
    "output_projector_states",
)
_TEXT_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_TEXT_SETTINGS = (
    *_TEXT_SIZES,
    *("model_type", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "initializer_range", "attention_dropout", "use_cache"),
)


def config_of(path: Path, values: Mapping[str, Any]) -> OpenVLAConfig:
    """Return the configuration that an untrusted config.json describes, with the settings that a policy reads.

    Args:
        path: the file, for messages.
        values: its content.

    Raises:
        CheckpointError: a setting is of another type, or no size that a model can have.
        UnsupportedModelError: as `OpenVLAConfig`.
    """
    refuse_quantized(path, values)
    text = values.get("text_config") or {}
    if not isinstance(text, Mapping):
        raise CheckpointError(f"{path} has text_config {shown(repr(text))}, which is no table of settings. {AGAIN}")
    refuse_quantized(path, text)
    for name in ("timm_model_ids", "image_sizes"):
        found = values.get(name, [])
        kind = str if name == "timm_model_ids" else int
        if not isinstance(found, list) or not all(type(item) is kind for item in found):
            raise CheckpointError(f"{path} has {name} {shown(repr(found))}; it is a list of {kind.__name__}. {AGAIN}")
    check_counts(path, text, *_TEXT_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings")
    check_positive(path, text, "rms_norm_eps", "rope_theta")
    check_counts(path, values, "n_action_bins", least=2)
    check_counts(path, values, "pad_to_multiple_of", least=0)
    towers = {
        name: table for name, table in values.items() if name.endswith("timm_args") and isinstance(table, Mapping)
    }
    for tower in (tower for table in towers.values() for tower in table.values() if isinstance(tower, Mapping)):
        check_counts(path, tower, "embed_dim", "depth", "num_heads", "patch_size")
        check_counts(path, tower, "reg_tokens", least=0)
    with described_by(path):
        text = {name: text[name] for name in _TEXT_SETTINGS if name in text}
        kept: dict[str, Any] = {name: values[name] for name in _SETTINGS if name in values} | towers
        config = OpenVLAConfig(text_config=settings_for(LlamaConfig, text), **kept)
    vocabulary = config.text_config.vocab_size
    if type(config.pad_token_id) is not int or not 0 <= config.pad_token_id < vocabulary:
        raise CheckpointError(
            f"{path} has a vocabulary of {vocabulary} tokens and pad_token_id {shown(repr(config.pad_token_id))}, "
            "which is none of them. Copy config.json from the published checkpoint."
        )
    if config.pad_to_multiple_of + config.n_action_bins > vocabulary:
        raise CheckpointError(
            f"{path} has a vocabulary of {vocabulary} tokens, too few for n_action_bins {config.n_action_bins} and "
            f"pad_to_multiple_of {config.pad_to_multiple_of}. Copy config.json from the published checkpoint."
        )
    return config


def tower_sizes(config: OpenVLAConfig) -> tuple[TowerSize, TowerSize]:
    """Sizes of the DINOv2 and the SigLIP tower.

    They are known for the published names; for others the config may have a key that ends in `timm_args` and maps names
    to timm's constructor arguments.

    Raises:
        UnsupportedModelError: the vision backbone is another one, or its size is not known.
    """
    names, sizes = list(config.timm_model_ids), list(config.image_sizes)
    if not config.use_fused_vision_backbone or len(names) != 2:
        raise UnsupportedModelError(
            f"The vision backbone is {' and '.join(names)}; supported is DINOv2 and SigLIP together "
            "(dinosiglip-vit-so-224px), as in every published OpenVLA checkpoint."
        )
    if sizes != [IMAGE_SIZE, IMAGE_SIZE]:
        raise UnsupportedModelError(f"The vision backbone takes images of {sizes} pixels; supported is {IMAGE_SIZE}.")
    override = getattr(config, "timm_override_act_layers", None) or []
    if any(layer is not None for layer in override):
        raise UnsupportedModelError(f"The vision towers' activations are {override}; supported is GELU (null) in both.")
    dino, siglip = (_tower_size(config, name) for name in names)
    if dino.patches != siglip.patches:
        raise UnsupportedModelError("The two vision towers cut the image into different patches; they must agree.")
    return dino, siglip


def _tower_size(config: OpenVLAConfig, name: str) -> TowerSize:
    if name in PUBLISHED_TOWERS:
        return PUBLISHED_TOWERS[name]
    tables = [value for key, value in vars(config).items() if key.endswith("timm_args") and isinstance(value, Mapping)]
    found = next((table[name] for table in tables if name in table), None)
    if found is None:
        raise UnsupportedModelError(
            f"The size of the vision tower {name!r} is not known; known are {', '.join(PUBLISHED_TOWERS)}. For another "
            "one, add its constructor arguments to config.json under a key that ends in 'timm_args'."
        )
    arguments = dict(found)
    width = arguments.pop("embed_dim")
    class_token = arguments.pop("class_token", True)
    if class_token and not arguments.pop("no_embed_class", False):
        raise UnsupportedModelError(f"The vision tower {name!r} gives its class token a position; none may have one.")
    size = TowerSize(
        width=width,
        depth=arguments.pop("depth"),
        heads=arguments.pop("num_heads"),
        mlp_width=int(width * arguments.pop("mlp_ratio", 4.0)),
        prefix=int(class_token) + arguments.pop("reg_tokens", 0),
        layer_scale=arguments.pop("init_values", None) is not None,
        patch=arguments.pop("patch_size"),
    )
    arguments.pop("global_pool", None)  # the output after the last block is not used
    if arguments:
        raise UnsupportedModelError(f"The vision tower {name!r} has arguments that are not supported: {arguments}.")
    if size.prefix and not class_token:
        raise UnsupportedModelError(f"The vision tower {name!r} has registers without a class token.")
    return size
