"""The common parts of LeRobot's families: versions, a batch's cameras, and the methods replaced on a policy's instances
while a session is attached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy
from vla_pruner.attach.family import Call
from vla_pruner.attach.layout import Layout
from vla_pruner.errors import SessionError, UnsupportedModelError
from vla_pruner.families.base import TransformersFamily
from vla_pruner.replacements import Replacements

VERSIONS = ((0, 6), (0, 7))
INSTALL = "pip install 'lerobot[pi,smolvla]>=0.6,<0.7'"
IMAGES = "observation.images."


def check_version() -> str:
    """Return the installed lerobot's version.

    Raises:
        UnsupportedModelError: none is installed, or one that was not tested.
    """
    try:
        version = metadata.version("lerobot")
    except metadata.PackageNotFoundError:
        raise UnsupportedModelError(f"lerobot is not installed. It needs Python 3.12: {INSTALL}") from None
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not VERSIONS[0] <= numbers < VERSIONS[1]:
        raise UnsupportedModelError(f"lerobot {version} is installed; 0.6 is supported. Run: {INSTALL}")
    return version


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

    def __init__(self, model: nn.Module) -> None:
        check_version()
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


def is_one_of(model: nn.Module, classes: Collection[tuple[str, str]]) -> bool:
    """Return True if the class of `model`, or one that it inherits from, is in `classes` by its module and name."""
    return any((kind.__module__, kind.__name__) in classes for kind in type(model).__mro__)


def refuse_training(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stand in for a policy's loss while a session is attached: raise SessionError."""
    raise SessionError("The loss was asked for while a session is attached; detach before training.")
