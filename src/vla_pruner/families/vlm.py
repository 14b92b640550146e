"""Vision-language models of transformers that are called with `input_ids` and `pixel_values`: LLaVA, PaliGemma,
SmolVLM, InternVL, Gemma 3, Qwen-VL.

A control step is a call with images and the tokens decoded after it. Visual tokens are the positions whose id is
`config.image_token_id`. A call without an image that begins a sequence of its own runs untouched.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy
from vla_pruner.attach.family import Call, Family, StepFunction
from vla_pruner.attach.layout import Layout
from vla_pruner.checks import is_count
from vla_pruner.errors import OptionError, SessionError, UnsupportedModelError
from vla_pruner.families.base import check_cameras, check_decoder
from vla_pruner.families.decoder_lm import DecoderLM
from vla_pruner.families.wrappers import unwrapped
from vla_pruner.wording import a_type

SEPARATE = ("llava", "llava_next", "internvl", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Model types whose processors put tokens between images, so that each run of image tokens is an image."""
GLUED = ("paligemma",)
"""Model types whose images, of equally many tokens each, follow one another without tokens between them."""
TILED = ("smolvlm", "idefics3")
"""Model types that cut one image into tiles, each a run of image tokens."""
COUNTING = ("paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Model types that take a token's position from the cache's length, unless position_ids are given."""
KINDS = (*SEPARATE, *GLUED, *TILED)

_IMAGES = ("pixel_values", "image_hidden_states", "mm_encoder_outputs")
"""Arguments that hold images, or an encoder's output for them."""


@dataclass(frozen=True)
class _Given:
    """The arguments of a call of the model, kept while the call runs.

    Attributes:
        is_image: (B, N) bool on the CPU, True for image tokens; None: there is no image.
        prompt: (B, N) bool on the CPU, True for real tokens; None: the call has no mask of this shape.
        has_positions: whether the caller gave position_ids.
    """

    is_image: Tensor | None
    prompt: Tensor | None
    has_positions: bool


class VLM(DecoderLM):
    """A vision-language model with a decoder of a supported type: `...ForConditionalGeneration`, or the model inside.

    Args:
        model: the vision-language model.
        cameras: names of the images in the order of their tokens; or names with their numbers of tokens, if the
            prompt does not tell images apart (`TILED`). Needed only if `keep` is per camera.

    Raises:
        OptionError: `cameras` is neither, or names alone do not tell the images of this model apart.
        UnsupportedModelError: the model's type, or its decoder's, is not supported.
    """

    def __init__(self, model: nn.Module, cameras: Sequence[str] | Mapping[str, int] | None = None) -> None:
        self._model: Any = model
        self._inner: Any = _inner_of(model)
        self._config: Any = self._inner.config
        kind = self._config.model_type
        if kind not in KINDS:
            raise UnsupportedModelError(
                f"{type(model).__name__} is a vision-language model of type {kind!r}; supported are "
                f"{', '.join(KINDS)}. If its visual tokens have a fixed place, attach to its decoder: "
                "attach(model.model.language_model, visual=slice(start, stop))."
            )
        self.decoder = check_decoder(unwrapped(_decoder_in(self._inner)), model)
        self.cameras, self._tokens = _checked(cameras, kind)
        self._token: int = self._config.image_token_id
        self._signature = inspect.signature(self._inner.forward)
        self._call = threading.local()
        self._known: tuple[Any, _Given, Layout] | None = None
        self._handles: list[Any] = []

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        inner = _inner_of(model)
        is_seeing = getattr(getattr(inner, "config", None), "image_token_id", None) is not None
        return is_seeing and _decoder_in(inner) is not None

    @property
    def called(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] as of DecoderLM
        return True

    @property
    def anatomy(self) -> Anatomy:
        inner = self._inner
        towers = [getattr(inner, name, None) for name in ("vision_tower", "visual", "vision_model")]
        projectors = [getattr(inner, name, None) for name in ("multi_modal_projector", "connector")]
        return replace(
            super().anatomy,
            towers=tuple(tower for tower in towers if tower is not None),
            projectors=tuple(projector for projector in projectors if projector is not None),
        )

    @property
    def encoding(self) -> tuple[tuple[Any, str], ...]:
        return ()  # The calls of some depend on the images' contents or sizes.

    @property
    def camera_tokens(self) -> tuple[int, ...] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._tokens

    def shows_nothing(self, call: Call) -> bool:
        return self._given is not None and self._given.is_image is None

    def check_short_token(self) -> None:
        given = self._given
        if given is not None and not given.has_positions and self._config.model_type in COUNTING:
            raise SessionError(
                f"A token was decoded without position_ids, and {type(self._inner).__name__} takes its position from "
                "the cache, which layer=0 made short. Give position_ids, decode with generate, or prune at layer=1 or "
                "later."
            )

    def opens_step(self, call: Call) -> bool:
        if self._given is None and call.length > 1:
            raise SessionError(
                f"The decoder of {type(self._model).__name__} was called past the model, so where its visual tokens "
                "are is not known. Call the model with input_ids and pixel_values; or attach to the decoder: "
                "attach(decoder, visual=slice(start, stop))."
            )
        return self._given is not None and self._given.is_image is not None

    def layout(self, call: Call) -> Layout:
        given = self._given
        assert given is not None
        assert given.is_image is not None
        if given.is_image.shape != (call.rows, call.length):
            raise SessionError(
                f"input_ids has the shape {tuple(given.is_image.shape)}, but the decoder was called with {call.rows} "
                f"rows of {call.length} positions; the prompt must be one call."
            )
        if given.prompt is None and call.attention_mask is not None:
            return self._place(given.is_image, call.prompt(), call.device)
        # If images and padding are at the same places as before, the layout is not copied to the device again.
        key = (call.device, torch.is_inference_mode_enabled())
        if self._known is None or self._known[0] != key or not _same(self._known[1], given):
            prompt = call.prompt() if given.prompt is None else given.prompt.to(call.device)
            self._known = key, given, self._place(given.is_image, prompt, call.device)
        return self._known[2]

    @property
    def _given(self) -> _Given | None:
        """The arguments of this thread's call; None outside of a call."""
        return getattr(self._call, "given", None)

    def exported(self, example: Mapping[str, Any]) -> StepFunction:
        return Family.exported(self, example)

    def install(self) -> None:
        self._handles = [
            self._inner.register_forward_pre_hook(self._look, with_kwargs=True),
            self._inner.register_forward_hook(self._look_away, always_call=True),
        ]

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._call.given = self._known = None

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the arguments of the model's call. Ids are read on the host before the vision encoder begins, at a point
        where transformers itself waits for them to count the image tokens.
        """
        given = {**kwargs, **self._signature.bind_partial(*args).arguments}
        ids = given.get("input_ids")
        if ids is None:
            raise SessionError(
                f"{type(self._model).__name__} was called without input_ids, and where its visual tokens are is read "
                "from these; give input_ids, not inputs_embeds. If they have a fixed place, attach to the decoder: "
                "attach(decoder, visual=slice(start, stop))."
            )
        if not isinstance(ids, Tensor):
            raise SessionError(
                f"{type(self._model).__name__} was called with input_ids that are {a_type(ids)}; give a tensor (B, N)."
            )
        if given.get("pixel_values_videos") is not None:
            raise SessionError(
                "pixel_values_videos was given, and visual tokens of videos are not pruned; give images, or detach "
                "first."
            )
        is_image = None
        if any(_holds_any(given.get(name)) for name in _IMAGES):
            found = ids.cpu() == self._token
            is_image = found if bool(found.any()) else None
        mask, prompt = given.get("attention_mask"), None
        if is_image is not None and isinstance(mask, Tensor) and mask.shape == ids.shape:
            prompt = mask.cpu().bool()
        self._call.given = _Given(is_image, prompt, given.get("position_ids") is not None)

    def _look_away(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._call.given = None

    def _place(self, is_image: Tensor, prompt: Tensor, device: torch.device) -> Layout:
        counts = is_image.sum(dim=1).tolist()
        if len(set(counts)) > 1:
            raise SessionError(
                f"The rows of the batch have {', '.join(map(str, counts))} image tokens; with a session attached all "
                "rows have equally many. Give them images of one size, as many in each row, or one row a call."
            )
        visual = is_image.nonzero()[:, 1].view(len(counts), -1).to(device)
        return Layout(
            visual=visual, valid=prompt.gather(1, visual), prompt=prompt, cameras=self._of_cameras(is_image, counts[0])
        )

    def _of_cameras(self, is_image: Tensor, count: int) -> tuple[int, ...]:
        """Return the image tokens of each camera, `count` in total."""
        names, shown = self.cameras, ", ".join(map(repr, self.cameras))
        if self._tokens is not None:
            if sum(self._tokens) != count:
                raise SessionError(
                    f"The cameras {shown} were said to have {', '.join(map(str, self._tokens))} tokens, but the prompt "
                    f"has {count} image tokens. Attach with their own numbers: attach(model, cameras={{name: tokens}})."
                )
            return self._tokens
        if len(names) < 2:
            return (count,)
        if self._config.model_type in GLUED:
            vision = self._config.vision_config
            each = (vision.image_size // vision.patch_size) ** 2
            runs = {(each,) * (count // each)} if count % each == 0 else {(count,)}
        else:
            runs = {_runs(row) for row in is_image}
        found = next(iter(runs))
        if len(runs) > 1 or len(found) != len(names):
            told = " and ".join(str(len(run)) for run in sorted(runs))
            raise SessionError(
                f"The cameras {shown} were named, but the prompt has {told} separate images, or not the same in all "
                "rows. Name as many cameras as there are images, in their order, or say how many tokens each has: "
                "attach(model, cameras={name: tokens})."
            )
        return found


def _inner_of(model: Any) -> Any:
    """Return the model that takes ids and pixels and calls the decoder."""
    inner = getattr(model, "model", None)
    return model if not isinstance(inner, nn.Module) or _decoder_in(inner) is None else inner


def _decoder_in(model: Any) -> Any:
    return getattr(model, "language_model", None) or getattr(model, "text_model", None)


def _holds_any(images: Any) -> bool:
    return images is not None and not (isinstance(images, Mapping) and not images)


def _same(one: _Given, other: _Given) -> bool:
    pairs = ((one.is_image, other.is_image), (one.prompt, other.prompt))
    return all(
        first is second or (first is not None and second is not None and torch.equal(first, second))
        for first, second in pairs
    )


def _runs(row: Tensor) -> tuple[int, ...]:
    """Return the lengths of the runs of True in a row (N,) bool."""
    return tuple(len(list(run)) for value, run in groupby(row.tolist()) if value)


def _checked(cameras: Any, kind: str) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Return the cameras' names, and the tokens of each if they were given."""
    if cameras is None:
        return (), None
    if isinstance(cameras, Mapping):
        if not cameras or not all(isinstance(name, str) and is_count(count, 1) for name, count in cameras.items()):
            raise OptionError(
                f"cameras={cameras!r} was given; it maps each camera's name to its number of visual tokens, an int of "
                "1 or more; or it is a sequence of names."
            )
        return tuple(cameras), tuple(cameras.values())
    names = check_cameras(cameras)
    if kind in TILED and len(names) > 1:
        raise OptionError(
            f"cameras={cameras!r} was given, but a model of type {kind!r} cuts images into tiles, so its prompt does "
            "not tell images apart; say how many tokens each has: attach(model, cameras={name: tokens})."
        )
    return names, None
