"""LeRobot's pi0, pi0.5, pi0-FAST and SmolVLA with random weights, tiny or as published, without any download.

LeRobot takes its sizes from constants in its own modules and from the hub. While such a policy is built, these names in
its modules answer with the sizes given here; nothing of it stays behind.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vla_pruner.errors import UnsupportedModelError
from vla_pruner.families.lerobot_common import check_version
from vla_pruner.families.smolvla import SmolVLA
from vla_pruner.models.drawn import draw_weights

if TYPE_CHECKING:
    from vla_pruner.policies.lerobot import LeRobotPolicy

CAMERAS: dict[str, tuple[str, ...]] = dict.fromkeys(("pi0", "pi05", "pi0_fast"), ("base", "left_wrist", "right_wrist"))
SMOLVLA_CAMERAS = ("camera1", "camera2", "camera3")
STATE, ACTION = 8, 7


@dataclass(frozen=True)
class PiSize:
    """Sizes of a pi0, pi0.5 or pi0-FAST.

    Attributes:
        vlm, expert: width, depth, mlp_dim, num_heads, num_kv_heads, head_dim; None: as published.
        vision: attributes of the SigLIP config; None: as published.
        vocabulary: number of text tokens; None: as published.
        image: side of the square images in pixels.
    """

    vlm: Mapping[str, int] | None = None
    expert: Mapping[str, int] | None = None
    vision: Mapping[str, int] | None = None
    vocabulary: int | None = None
    image: int = 224


@dataclass(frozen=True)
class SmolVLASize:
    """Sizes of a SmolVLA.

    Attributes:
        text, vision: keyword arguments of the Llama and the SigLIP config.
        scale_factor: side of the squares of patches that become one token.
        layers: the number of text layers that are used.
        specials: ids of the image token, the fake image token and the global image token.
    """

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    scale_factor: int
    layers: int
    specials: tuple[int, int, int]

    @property
    def image(self) -> int:
        """Side of the square images in pixels."""
        return self.vision["image_size"]


_TINY_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_GEMMA_2B = {"width": 2048, "depth": 18, "mlp_dim": 16384, "num_heads": 8, "num_kv_heads": 1, "head_dim": 256}
_GEMMA_300M = {**_GEMMA_2B, "width": 1024, "mlp_dim": 4096}
_PALIGEMMA_WORDS = 257152
_TINY_GEMMA = {"depth": 6, "num_heads": 8, "num_kv_heads": 1, "head_dim": 16}
SIZES: dict[tuple[str, str], PiSize | SmolVLASize] = {
    ("pi", "full"): PiSize(),
    ("pi", "tiny"): PiSize(
        vlm={"width": 64, "mlp_dim": 128, **_TINY_GEMMA},
        expert={"width": 32, "mlp_dim": 64, **_TINY_GEMMA},
        vision=_TINY_VISION,
        vocabulary=512,
        image=112,
    ),
    # HuggingFaceTB/SmolVLM2-500M-Video-Instruct, of which SmolVLA uses the first 16 layers.
    ("smolvla", "full"): SmolVLASize(
        text={
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 16,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "head_dim": 64,
            "vocab_size": 49280,
            "rms_norm_eps": 1e-5,
        },
        vision={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
        scale_factor=4,
        layers=16,
        specials=(49190, 49189, 49152),
    ),
    ("smolvla", "tiny"): SmolVLASize(
        text={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 300,
        },
        vision={**_TINY_VISION, "image_size": 128, "patch_size": 8},
        scale_factor=2,
        layers=6,
        specials=(290, 291, 292),
    ),
}


def random_lerobot(
    kind: str = "pi0",
    size: str = "tiny",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int | None = None,
    cameras: tuple[str, ...] | None = None,
    **config: Any,
) -> LeRobotPolicy:
    """Make a LeRobot policy with random weights, drawn so that its actions depend on its images.

    Its processors are LeRobot's own without statistics, so nothing is normalised, and their tokenizer is a stand-in:
    the bytes of the text. Both need no download.

    Args:
        kind: "pi0", "pi05", "pi0_fast" or "smolvla".
        size: "tiny", or "full" for the published size.
        device: of the policy.
        dtype: torch.float32 or torch.bfloat16, in the places where LeRobot uses it.
        seed: of the weights.
        layers: depth of the decoder and of the expert; None: that of the size.
        cameras: names of the images; None: three.
        **config: fields of LeRobot's config that are to differ from its defaults.

    Raises:
        UnsupportedModelError: another kind, size or dtype, or lerobot is missing or of an untested version.
    """
    from vla_pruner.policies.lerobot import KINDS, LeRobotPolicy, lerobot_config, policy_class

    if kind in ("molmoact2", "eo1", "vla_jepa"):
        raise UnsupportedModelError(
            f"random_lerobot({kind!r}) was called; vla_pruner.policies.{kind}_random.random_{kind}_policy makes it."
        )
    if kind not in KINDS or size not in ("tiny", "full") or dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedModelError(
            f"random_lerobot({kind!r}, {size!r}, dtype={dtype}) was called; kind is one of "
            f"{', '.join(map(repr, KINDS))}, size 'tiny' or 'full', dtype torch.float32 or torch.bfloat16."
        )
    sizes = SIZES["smolvla" if kind == "smolvla" else "pi", size]
    if layers is not None:
        sizes = _of_depth(sizes, layers)
    is_tiny = size == "tiny"
    defaults: dict[str, Any] = {"device": str(device)}
    if is_tiny:
        defaults |= {"chunk_size": 10, "n_action_steps": 10, "tokenizer_max_length": 48}
    if isinstance(sizes, SmolVLASize):
        cameras = cameras or SMOLVLA_CAMERAS
        defaults |= {"num_vlm_layers": sizes.layers, "resize_imgs_with_padding": (sizes.image, sizes.image)}
    else:
        cameras = cameras or CAMERAS[kind]
        defaults |= {"image_resolution": (sizes.image, sizes.image), "dtype": str(dtype).removeprefix("torch.")}
    if kind == "pi0_fast":
        # Tokens that random weights decode neither begin like actions nor end with the marker.
        defaults |= {"validate_action_token_prefix": False, "max_decoding_steps": 8 if is_tiny else 60}
    given = lerobot_config(kind, cameras, sizes.image, STATE, ACTION, **defaults | config)
    # LeRobot prints what it builds.
    with built_with(kind, sizes), torch.device(device), contextlib.redirect_stdout(io.StringIO()):
        policy: Any = policy_class(kind)(given)
    if kind == "smolvla":
        policy.model.vlm_with_expert.to(dtype)
    policy.to(device).eval()
    # LeRobot's own start leaves an expert that does nothing.
    draw_weights(policy, seed)
    if kind == "smolvla":
        _calm(policy)
    return LeRobotPolicy(policy, *_processors(kind, given, _vocabulary(policy)))


def random_pi0(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> LeRobotPolicy:
    """Make LeRobot's pi0; arguments as of `random_policy`."""
    return _random("pi0", size, device, dtype, seed)


def random_pi05(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> LeRobotPolicy:
    """Make LeRobot's pi0.5; arguments as of `random_policy`."""
    return _random("pi05", size, device, dtype, seed)


def random_pi0_fast(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> LeRobotPolicy:
    """Make LeRobot's pi0-FAST; arguments as of `random_policy`."""
    return _random("pi0_fast", size, device, dtype, seed)


def random_smolvla(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> LeRobotPolicy:
    """Make LeRobot's SmolVLA; arguments as of `random_policy`."""
    return _random("smolvla", size, device, dtype, seed)


def _random(kind: str, size: str, device: torch.device, dtype: torch.dtype, seed: int) -> LeRobotPolicy:
    check_version(kind)
    return random_lerobot(kind, size, device, dtype, seed)


def _of_depth(size: PiSize | SmolVLASize, layers: int) -> PiSize | SmolVLASize:
    """Return the same size with so many layers in the decoder and in the expert."""
    if isinstance(size, SmolVLASize):
        return replace(size, text={**size.text, "num_hidden_layers": layers}, layers=layers)
    vlm, expert = size.vlm or _GEMMA_2B, size.expert or _GEMMA_300M
    return replace(size, vlm={**vlm, "depth": layers}, expert={**expert, "depth": layers})


@contextlib.contextmanager
def built_with(kind: str, size: PiSize | SmolVLASize) -> Iterator[None]:
    """Give policies of `kind` that are built in the block these sizes, and request nothing from the hub."""
    patches = _smolvla_names(size) if isinstance(size, SmolVLASize) else _pi_names(kind, size)
    saved = [(module, name, getattr(module, name)) for module, name, _ in patches]
    for module, name, value in patches:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


@torch.no_grad()
def _calm(policy: Any) -> None:
    """SmolVLA's cross-attention layers project keys that were drawn larger already: with more than that their attention
    is a choice of one token, and rounding decides which.
    """
    anatomy = SmolVLA.anatomy_of(policy)
    for index, layer in enumerate(anatomy.experts[0].layers):
        if index in anatomy.cross_layers:
            layer.self_attn.k_proj.weight.mul_(0.5)


class ByteTokenizer:
    """Stands in for an absent tokenizer: text to the numbers of its bytes, after a first token 1.

    Args:
        vocabulary: number of ids of the model.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def __call__(
        self,
        text: list[str],
        max_length: int,
        padding: str,
        padding_side: str = "right",
        truncation: bool = True,
        return_tensors: str = "pt",
    ) -> dict[str, Tensor]:
        """input_ids and attention_mask, (B, L) int64 each, as a tokenizer of transformers gives them."""
        rows = [[1, *(2 + byte % (self._vocabulary - 2) for byte in line.encode())][:max_length] for line in text]
        length = max_length if padding == "max_length" else max(map(len, rows))
        ids = torch.zeros(len(rows), length, dtype=torch.int64, device="cpu")
        for row, known in zip(ids, rows, strict=True):
            row[: len(known)] = torch.tensor(known, device="cpu")
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class WordTokenizer:
    """Stands in for pi0-FAST's text tokenizer, which turns decoded tokens into words: each word is the token's number.

    Args:
        vocabulary: number of ids that the model knows.
        marker: the id that ends a chunk; None: an id that the model cannot emit.
    """

    bos_token_id = 2

    def __init__(self, vocabulary: int, marker: int | None = None) -> None:
        self.vocab_size = vocabulary
        self.marker = vocabulary if marker is None else marker

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the ids of the text's bytes."""
        return [2 + byte % (self.vocab_size - 2) for byte in text.encode()]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Convert ids to words."""
        return ["|" if number == self.marker else f"<{number}>" for number in ids]

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """Convert words to ids."""
        if isinstance(tokens, str):
            return self.marker if tokens == "|" else int(tokens[1:-1])
        return [self.marker if token == "|" else int(token[1:-1]) for token in tokens]


class CoefficientTokenizer:
    """Stands in for the FAST tokenizer, with which pi0-FAST's actions are decoded: one coefficient per token."""

    min_token, scale = -50, 10.0

    @property
    def bpe_tokenizer(self) -> CoefficientTokenizer:
        """The object with the method `decode`: this one."""
        return self

    def decode(self, ids: Tensor) -> str:
        """Convert ids to characters, whose code points are the coefficients minus `min_token`."""
        return "".join(chr(number % 101) for number in ids.tolist())


def _pi_names(kind: str, size: PiSize) -> list[tuple[Any, str, Any]]:
    module: Any = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    known, paligemma = module.get_gemma_config, module.PaliGemmaForConditionalGenerationWithPiGemma
    gemma: Any = getattr(module, "PiGemmaForCausalLM", None)

    def get_gemma_config(variant: str) -> Any:
        given = size.vlm if variant == "gemma_2b" else size.expert
        return known(variant) if given is None else module.GemmaConfig(**given)

    def build_paligemma(config: Any) -> nn.Module:
        for name, value in (size.vision or {}).items():
            setattr(config.vision_config, name, value)
        config.vision_config.image_size = size.image
        if size.vlm is not None:
            config.vision_config.projection_dim = size.vlm["width"]
        if size.vocabulary is not None:
            config.text_config.vocab_size = config.image_token_index = size.vocabulary
        return paligemma(config=config)

    def build_gemma(config: Any) -> nn.Module:
        if size.vocabulary is not None:
            config.vocab_size = size.vocabulary
        return gemma(config=config)

    names = [
        (module, "get_gemma_config", get_gemma_config),
        (module, "PaliGemmaForConditionalGenerationWithPiGemma", build_paligemma),
    ]
    if kind != "pi0_fast":
        return [*names, (module, "PiGemmaForCausalLM", build_gemma)]
    # pi0-FAST has no expert, and loads two tokenizers from the hub.
    text, actions = WordTokenizer(size.vocabulary or _PALIGEMMA_WORDS), CoefficientTokenizer()
    return [
        *names,
        (module, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda *_, **__: text)),
        (module, "AutoProcessor", SimpleNamespace(from_pretrained=lambda *_, **__: actions)),
    ]


def _smolvla_names(size: SmolVLASize) -> list[tuple[Any, str, Any]]:
    module: Any = importlib.import_module("lerobot.policies.smolvla.smolvlm_with_expert")
    image, fake, whole = size.specials

    def config(_: str) -> Any:
        from transformers import SmolVLMConfig

        options: dict[str, Any] = {
            "text_config": {**size.text, "model_type": "llama", "pad_token_id": 2},
            "vision_config": dict(size.vision),
            "scale_factor": size.scale_factor,
            "image_token_id": image,
            "pad_token_id": 2,
        }
        return SmolVLMConfig(**options)

    tokenizer = SimpleNamespace(fake_image_token_id=fake, global_image_token_id=whole)
    return [
        (module, "AutoConfig", SimpleNamespace(from_pretrained=config)),
        (module, "AutoProcessor", SimpleNamespace(from_pretrained=lambda _: SimpleNamespace(tokenizer=tokenizer))),
    ]


def _vocabulary(policy: Any) -> int:
    inner = policy.model
    if hasattr(inner, "vlm_with_expert"):
        return inner.vlm_with_expert.config.text_config.vocab_size
    return inner.paligemma_with_expert.paligemma.config.text_config.vocab_size


def _processors(kind: str, config: Any, vocabulary: int) -> tuple[Any, Any]:
    """LeRobot's own processors for this kind, with the stand-in tokenizer."""
    module: Any = importlib.import_module(f"lerobot.policies.{kind}.processor_{kind}")
    known = module.TokenizerProcessorStep
    actions = getattr(module, "ActionTokenizerProcessorStep", None)

    def step(tokenizer_name: str, **options: Any) -> Any:
        return known(tokenizer=ByteTokenizer(vocabulary), **options)

    module.TokenizerProcessorStep = step
    if actions is not None:  # a training step, which turns actions into tokens with a tokenizer from the hub
        identity = importlib.import_module("lerobot.processor").IdentityProcessorStep
        module.ActionTokenizerProcessorStep = lambda **_: identity()
    try:
        return getattr(module, f"make_{kind}_pre_post_processors")(config)
    finally:
        module.TokenizerProcessorStep = known
        if actions is not None:
            module.ActionTokenizerProcessorStep = actions
