"""The common parts of LeRobot's families: versions, a batch's cameras, and the methods replaced on a policy's instances
while a session is attached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy
from vla_pruner.attach.family import Call
from vla_pruner.attach.layout import Layout, ensure
from vla_pruner.errors import SessionError, UnsupportedModelError
from vla_pruner.families.base import TransformersFamily, is_one_of
from vla_pruner.replacements import Replaced, Replacements

VERSIONS = ((0, 6), (0, 7))
EXTRAS = {
    "pi0": "pi",
    "pi05": "pi",
    "pi0_fast": "pi",
    "smolvla": "smolvla",
    "molmoact2": "molmoact2",
    "groot": "groot",
    "eo1": "eo1",
    "vla_jepa": "vla-jepa",
}
"""The extra of lerobot that brings the packages of a policy, by LeRobot's name of the policy."""
IMAGES = "observation.images."


def check_version(kind: str | None = None) -> str:
    """Return the installed lerobot's version.

    Args:
        kind: LeRobot's name of the policy, whose extra the message then names; None: all of them.

    Raises:
        UnsupportedModelError: none is installed, or one that was not tested.
    """
    try:
        version = metadata.version("lerobot")
    except metadata.PackageNotFoundError:
        raise UnsupportedModelError(f"lerobot is not installed. It needs Python 3.12: {install(kind)}") from None
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not VERSIONS[0] <= numbers < VERSIONS[1]:
        raise UnsupportedModelError(f"lerobot {version} is installed; 0.6 is supported. Run: {install(kind)}")
    return version


def install(kind: str | None = None) -> str:
    """Return the command that installs lerobot with what a policy needs; `kind` as of `check_version`."""
    found = EXTRAS.get(kind or "")
    extras = ",".join(dict.fromkeys(EXTRAS.values())) if found is None else found
    return f"pip install 'lerobot[{extras}]>=0.6,<0.7'"


def camera_names(config: Any) -> tuple[str, ...]:
    """Return a LeRobot policy's cameras in its own order, without "observation.images."."""
    return tuple(key.removeprefix(IMAGES).removeprefix("observation.") for key in config.image_features)


class LeRobotFamily(TransformersFamily):
    """A LeRobot policy whose prefix is [image blocks][text...] and whose expert reads the prefix' cache.

    Visual token ids run through the cameras in the config's order. LeRobot puts the cameras that a batch has first and
    blank images for the others behind them, so where a camera's block lies depends on the batch.
    """

    classes: frozenset[tuple[str, str]] = frozenset()
    """Modules and names of the policies' classes."""

    prepare = ""
    """The name of the policy's method that turns a batch into images."""

    embed = "embed_prefix"
    """Name of the model's method that makes the prefix of the images; it returns the embeddings first, then the mask of
    its real tokens.
    """

    paired = "paligemma_with_expert"
    """The name of the model's part that holds the decoder, and whose method `embed_image` encodes an image."""

    def __init__(self, model: nn.Module) -> None:
        check_version(kind_of(model))
        self._policy: Any = model
        self._inner = self._policy.model
        self.cameras = camera_names(self._policy.config)
        self._replaced = Replacements()
        self._shown: tuple[int, ...] | None = None
        self._blocks: list[tuple[int, int]] | None = None
        self._in_order: tuple[tuple[int, ...], frozenset[int]] = ((), frozenset())
        self._prompt: Tensor | None = None

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return is_one_of(model, cls.classes)

    @staticmethod
    def anatomy_of(model: Any) -> Anatomy:
        """Return the parts of a policy of this family, which need not be one that a method can be attached to."""
        raise NotImplementedError

    @property
    def anatomy(self) -> Anatomy:
        return self.anatomy_of(self._policy)

    @property
    def first_layer(self) -> int:
        return 1

    @property
    def whole_steps(self) -> tuple[tuple[Any, str], ...]:
        return (self._policy, "select_action"), (self._policy, "predict_action_chunk")

    @property
    def backend(self) -> str:
        # LeRobot sets it anew in every call.
        return "eager"

    def opens_step(self, call: Call) -> bool:
        return True

    def action_rows(self, layout: Layout) -> Tensor | None:
        return None

    def block_lengths(self, images: list[Tensor]) -> list[int]:
        """Return the number of visual tokens that each image (B, 3, H, W) becomes."""
        raise NotImplementedError

    def around_block(self) -> tuple[int, int]:
        """Return the number of other tokens before and behind each image's."""
        return 0, 0

    def layout(self, call: Call) -> Layout:
        if self._blocks is None or self._prompt is None:
            raise SessionError(
                "The prefix was run without images. Call select_action(batch) or predict_action_chunk(batch)."
            )
        order, absent = self._in_order
        counts, positions = [0] * len(self.cameras), {}
        for camera, (start, count) in zip(order, self._blocks, strict=True):
            counts[camera] = count
            positions[camera] = torch.arange(start, start + count, device=call.device)
        visual = torch.cat([positions[camera] for camera in sorted(positions)]).expand(call.rows, -1)
        prompt = self._prompt.to(call.device)
        return Layout(
            visual=visual,
            valid=prompt.gather(1, visual),
            prompt=prompt,
            cameras=tuple(counts),
            absent=absent,
        )

    def encode_together(self, replaced: Replacements) -> None:
        seeing = getattr(self._inner, self.paired)
        if _is_lerobots(self._inner, self.embed) and _is_lerobots(seeing, "embed_image"):
            together = _Together()
            replaced.put(self._inner, self.embed, together.embed)
            replaced.put(seeing, "embed_image", together.encode)

    def install(self) -> None:
        self._replaced.put(self._policy, self.prepare, self._prepare_images)
        self._replaced.put(self._inner, self.embed, self._embed_prefix)
        self._replaced.put(self._inner, "forward", refuse_training)

    def remove(self) -> None:
        self._replaced.remove()
        self._shown = self._blocks = self._prompt = None

    def _prepare_images(self, original: Callable[..., Any], batch: Any) -> Any:
        """Note the batch's cameras: the host has them, without reading a mask."""
        keys = list(self._policy.config.image_features)
        self._shown = tuple(camera for camera, key in enumerate(keys) if key in batch)
        return original(batch)

    def _embed_prefix(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = list(inspect.signature(original).bind(*args, **kwargs).arguments.values())
        images: list[Tensor] = given[0]
        cameras = range(len(self.cameras))
        # Without a batch (a direct call of sample_actions) the images are taken to be those of the config.
        shown = tuple(cameras) if self._shown is None else self._shown
        self._shown = None
        missing = tuple(camera for camera in cameras if camera not in shown)
        order = (shown + missing)[: len(images)]
        if len(order) != len(images):
            raise SessionError(
                f"sample_actions was called with {len(images)} images, but the policy's cameras are "
                f"{', '.join(map(repr, self.cameras))}."
            )
        self._in_order = (order, frozenset(missing))
        found = original(*args, **kwargs)
        before, behind = self.around_block()
        self._blocks, end = [], 0
        for count in self.block_lengths(images):
            self._blocks.append((end + before, count))
            end += before + count + behind
        self._prompt = found[1]
        return found


class _Together:
    """Encodes all images of a prefix when the first of them is to be encoded."""

    def __init__(self) -> None:
        self._images: list[Tensor] = []
        self._features: tuple[Tensor, ...] = ()

    def embed(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make the prefix of the images, whose calls of `embed_image` go through `encode`."""
        images = _images_of(original, args, kwargs)
        alike = len({(image.shape, image.dtype, image.device) for image in images}) == 1
        self._images = images if alike else []
        try:
            return original(*args, **kwargs)
        finally:
            self._images, self._features = [], ()

    def encode(self, original: Callable[..., Tensor], image: Tensor) -> Tensor:
        """Return the features (B, n, D) of an image (B, 3, H, W)."""
        place = next((place for place, one in enumerate(self._images) if one is image), None)
        if place is None:
            return original(image)
        if not self._features:
            self._features = original(torch.cat(self._images)).chunk(len(self._images))
        return self._features[place]


def _images_of(embed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the images (B, 3, H, W) of a call that makes a prefix."""
    return list(next(iter(inspect.signature(embed).bind(*args, **kwargs).arguments.values())))


def _is_lerobots(owner: Any, name: str) -> bool:
    """Return True if a method is LeRobot's own, neither overridden nor replaced by other code."""
    found = getattr(owner, name)
    while isinstance(found, Replaced):
        found = found.original
    written = getattr(found, "__func__", None)
    return getattr(written, "__globals__", {}).get("__name__", "").startswith("lerobot.policies.")


def image_blocks(
    ids: Tensor, count: int, images: int, marks: tuple[int, int], uneven: str
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the places (B, M) int64 of the visual tokens in prompts that hold each image in one piece, and how many
    tokens each image of a row has.

    Args:
        ids: (B, N) int64, the prompts' tokens.
        count: visual tokens of all rows together.
        images: images of all rows together.
        marks: the token that stands for a visual token, and the one that stands between two images.
        uneven: the message if rows have different numbers of visual tokens, or an image lies in several pieces.

    Raises:
        SessionError: rows have different numbers of images, or images different numbers of tokens.
    """
    rows, (image_token, between) = len(ids), marks
    each, rest = divmod(count, rows)
    views, others = divmod(images, rows)
    if rest or others or not views or each % views:
        raise SessionError(
            f"The prompts hold {count} visual tokens of {images} images in {rows} rows; every row must have as many "
            "images, each of as many tokens."
        )
    is_visual = ids == image_token
    ensure((is_visual.sum(dim=1) == each).all(), uneven)
    visual = torch.sort((~is_visual).to(torch.int8), dim=1, stable=True).indices[:, :each]
    before = (ids == between).cumsum(dim=1).gather(1, visual).view(rows, views, -1)
    ensure((before == before[:, :, :1]).all() & (before[:, 1:, 0] > before[:, :-1, 0]).all(), uneven)
    return visual, (each // views,) * views


def kind_of(model: Any) -> str:
    """Return LeRobot's name of a policy."""
    return str(getattr(type(model), "name", ""))


def refuse_training(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stand in for a policy's loss while a session is attached: raise SessionError."""
    raise SessionError("The loss was asked for while a session is attached; detach before training.")
