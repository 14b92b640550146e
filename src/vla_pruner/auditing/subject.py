"""The policy under audit, with the needs of every check: scenes, repeatable control steps, and its decoder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_pruner.accelerators import accelerators_of, generators_put_back
from vla_pruner.anatomy import layers_of, norm_of, projection_of
from vla_pruner.attach.layout import Layout
from vla_pruner.attach.session import Session
from vla_pruner.auditing.probes import HiddenProbe
from vla_pruner.checks import is_seed
from vla_pruner.errors import ObservationError, OptionError, UnsupportedModelError
from vla_pruner.families import family_of
from vla_pruner.methods import Method
from vla_pruner.policies.base import Policy, example_of, module_of

_LONGEST_WARM_UP = 16
"""The control steps after which a method that has not pruned is taken to never prune."""

Images = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Pruned:
    """The pruned control step that an episode ended with.

    Attributes:
        action: (chunk, dim).
        kept: (1, k) ids of the visual tokens that stayed.
        layout: of its prompt.
    """

    action: np.ndarray
    kept: Tensor
    layout: Layout


class Subject:
    """A policy under audit.

    Args:
        policy: with `act`, `reset`, `cameras` and `vision_towers`.
        method: the method that prunes it.
        instruction: the policy's instruction; None: one of its training, or a usual one.
        seed: of images and of the noise that flow policies start from.

    Raises:
        UnsupportedModelError: the policy lacks something of the above, or its model is not supported.
        OptionError: `method` is no method or does not fit the model, or `seed` is no seed.
        ObservationError: the instruction is empty, or not one for this policy.
        SessionError: a session is attached to it already.

    Attributes:
        acted: control steps so far.
    """

    def __init__(self, policy: Policy, method: Method, instruction: str | None = None, seed: int = 0) -> None:
        check_request(method, instruction, seed)
        self.policy = check_policy(policy)
        self.seed = seed
        self.module = module_of(policy)
        self.family: Any = family_of(policy)
        self.method = method.fitted(self.family.one_pass)
        self.example = example_of(policy)
        self.instruction = self.example.instruction if instruction is None else instruction
        self.acted = 0
        self._broke: Exception | None = None
        self._steps = self._first_pruned()

    @property
    def steps(self) -> int | None:
        """The control steps until the first pruned one, that one included; None if none of the first few is pruned.

        An error that the policy or the session raised in them is raised again: it fails the checks that need these
        steps.
        """
        if self._broke is not None:
            raise self._broke
        return self._steps

    @property
    def device(self) -> torch.device:
        """The device of the first of the decoder's layers from the pruning layer on."""
        layers = layers_of(self.family.decoder)
        return next(layers[min(self.method.layer, len(layers) - 1)].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the decoder computes."""
        weight = projection_of(layers_of(self.family.decoder)[0]).weight
        return weight.dtype if weight.is_floating_point() else norm_of(self.family.decoder).weight.dtype

    @property
    def exact(self) -> bool:
        """True if the decoder computes in full precision, with weights that are not quantised."""
        weight = projection_of(layers_of(self.family.decoder)[0]).weight
        exact = weight.is_floating_point() and self.dtype in (torch.float32, torch.float64)
        return exact and not self.family.in_half

    def flat(self, level: int) -> Images:
        """Return images of one colour for every camera."""
        return {camera: np.full_like(image, level) for camera, image in self.example.images.items()}

    def noise(self, number: int) -> Images:
        """Return images of pixels drawn at random, other ones for every number and camera."""
        generator = np.random.default_rng((self.seed, number, 1))
        shapes = {camera: image.shape for camera, image in self.flat(0).items()}
        return {camera: generator.integers(0, 256, shape, dtype=np.uint8) for camera, shape in shapes.items()}

    def scene(self, number: int) -> Images:
        """Return images of coloured blocks on a shaded table, other ones for every number and camera."""
        generator = np.random.default_rng((self.seed, number, 2))
        return {camera: _draw_scene(image.shape[0], generator) for camera, image in self.flat(0).items()}

    def act(self, images: Images, step: int = 0) -> np.ndarray:
        """Run one control step: (chunk, dim) float64. The noise of a flow depends on the seed and on `step` alone."""
        self.acted += 1
        state = self.example.proprio
        proprio = None if state is None else np.asarray(state, dtype=np.float64)
        with generators_put_back(accelerators_of(module_of(self.policy).parameters())):
            torch.manual_seed(self.seed * 1009 + step)
            return np.asarray(self.policy.act(images, self.instruction, proprio), dtype=np.float64)

    def watch(self, images: Images, step: int = 0) -> tuple[np.ndarray, list[Tensor]]:
        """Run `act` and return the final hidden states of every call too: action tokens hide changes of less than a
        bin.
        """
        with HiddenProbe(self.family) as probe:
            action = self.act(images, step)
        return action, [hidden for _, hidden in probe.calls]

    def attach(self, method: Method | None = None) -> Session:
        """Return a session of `method`, or of the method that is audited."""
        policy: Any = self.policy
        return (self.method if method is None else method).attach(policy)

    def begin(self) -> None:
        """Begin a new episode, for a session that is attached as well."""
        self.policy.reset()

    def run(
        self, session: Session, scenes: list[int], watching: AbstractContextManager[Any] | None = None
    ) -> Pruned | None:
        """Run an episode of these scenes, from its beginning; return its last step, None if that was not pruned.

        `watching` is open during the last step.
        """
        self.begin()
        for step, scene in enumerate(scenes[:-1]):
            self.act(self.scene(scene), step)
        with nullcontext() if watching is None else watching:
            action = self.act(self.scene(scenes[-1]), len(scenes) - 1)
        if session.kept is None or session.step is None:
            return None
        return Pruned(action, session.kept.clone(), session.step.layout)

    def _first_pruned(self) -> int | None:
        images = self.scene(0)
        with self.attach() as session:
            try:
                self.begin()
                for step in range(max(_LONGEST_WARM_UP, self.method.history + 2)):
                    self.act(images, step)
                    if session.kept is not None:
                        return step + 1
            except (UnsupportedModelError, OptionError, ObservationError):
                raise  # The request does not fit; sizes and instructions show in the first step.
            except Exception as error:
                self._broke = error
        return None


def identical(one: tuple[np.ndarray, list[Tensor]], other: tuple[np.ndarray, list[Tensor]]) -> bool:
    """Return True if two results of `Subject.watch` are the same, bit by bit."""
    same = len(one[1]) == len(other[1]) and all(torch.equal(*pair) for pair in zip(one[1], other[1], strict=True))
    return same and np.array_equal(one[0], other[0])


def check_request(method: object, instruction: str | None, seed: int) -> None:
    """Refuse a request with which no policy can be audited.

    Raises:
        OptionError: `method` is no `Method` or one that the checks do not cover, or `seed` no int in [0, 2**32).
        ObservationError: the instruction has no words.
    """
    if not isinstance(method, Method):
        given = f"the class {method.__name__}" if isinstance(method, type) else repr(method)
        raise OptionError(f"method is {given}; it must be a Method, such as vla_pruner.VLAPruner(keep=0.25).")
    if len(method.stages()) > 1 or method.motion or method.fate.needs_last_step:
        what = "prunes by how far the arm moves" if method.motion else "prunes at several layers"
        what = "reuses what the last control step computed" if method.fate.needs_last_step else what
        raise OptionError(
            f"{type(method).__name__} as it was made {what}, which the audit does not cover; audit a method that "
            "drops or freezes at one layer, without a gate, on the same policy."
        )
    if not is_seed(seed):
        raise OptionError(f"seed={seed!r} was given; it is an int from 0 to {2**32 - 1}.")
    if instruction is not None and not instruction.strip():
        raise ObservationError(
            "The instruction is empty; say what the policy is to do, or leave it out for one that it knows."
        )


def check_policy(policy: Any) -> Policy:
    """Return the policy itself if it has all attributes of `Policy`.

    Raises:
        UnsupportedModelError: it lacks one; the message says which and how to get it.
    """
    if "transformers_modules" in type(policy).__module__:
        raise UnsupportedModelError(
            f"{type(policy).__name__} was loaded through remote code, which does not see on current transformers. Load "
            "the same checkpoint with vla_pruner.load_policy(path)."
        )
    wanted = ("act", "reset", "cameras", "vision_towers", "proprio_size")
    missing = [name for name in wanted if not hasattr(policy, name)]
    if missing:
        raise UnsupportedModelError(
            f"{type(policy).__name__} has no {', '.join(missing)}, so it cannot be audited. Load it with "
            "vla_pruner.load_policy(path); or wrap a model that is there already: policies.lerobot.LeRobotPolicy, "
            "policies.pi0.TransformersPI0, or a class of yours as policies.base.Policy describes it."
        )
    if not isinstance(module_of(policy), nn.Module):
        raise UnsupportedModelError(f"{type(policy).__name__}.module is no torch module.")
    return policy


def _draw_scene(side: int, generator: np.random.Generator) -> np.ndarray:
    """Return (side, side, 3) uint8."""
    line = np.linspace(0.0, 1.0, side)
    slope = generator.uniform(-90, 90, (2, 3))
    image = generator.uniform(60, 190, 3) + line[:, None, None] * slope[0] + line[None, :, None] * slope[1]
    for _ in range(int(generator.integers(3, 7))):
        height, width = (generator.uniform(0.08, 0.35, 2) * side).astype(int)
        top, left = generator.integers(0, side - height), generator.integers(0, side - width)
        image[top : top + height, left : left + width] = generator.uniform(0, 255, 3)
    image += generator.normal(0, 6, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)
