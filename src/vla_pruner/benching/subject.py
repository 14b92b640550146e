"""A policy made ready to be timed: its control step as a function without arguments, and the step's sizes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vla_pruner.anatomy import Anatomy, layers_of, norm_of
from vla_pruner.attach.session import Session
from vla_pruner.benching.settings import BenchSettings
from vla_pruner.cost import ControlStep, DecoderShape, Expert, Tower
from vla_pruner.errors import BudgetError
from vla_pruner.families import family_of
from vla_pruner.feed import Feed
from vla_pruner.method_names import was_pruned
from vla_pruner.methods import EncoderReuse, Method
from vla_pruner.timing import Watched, watched_of


class Subject:
    """A policy and its control step.

    Args:
        policy: the object that methods attach to.
        feed: its inputs.
        settings: of the benchmark.
        device: of the policy.

    Attributes:
        step: one control step.
        family: its adapter.
        anatomy: its parts.
        control_step: the sizes of one robot's control step, for the formulas.
        rows: robots in one call.
    """

    def __init__(self, policy: Any, feed: Feed, settings: BenchSettings, device: torch.device) -> None:
        self.policy = policy
        self.feed = feed
        self.settings = settings
        self.device = device
        self.step = feed.step
        self.rows = settings.batch
        self.module: nn.Module = policy if isinstance(policy, nn.Module) else policy.module
        self.family: Any = family_of(policy, **feed.attach)
        self.anatomy: Anatomy = self.family.anatomy
        self.head = self.anatomy.head if feed.uses_head else None
        self.control_step = self._control_step()

    @property
    def acting(self) -> str:
        """The stage after the prompt."""
        if self.feed.denoised is not None:
            return "denoise"
        return "decode" if self.feed.decoded else ""

    @property
    def one_graph(self) -> bool:
        """True if it is compiled, and prompt and decoding are then one graph."""
        return self.settings.backend is not None and self.family.acting is not None

    def attach(self, method: Method | None, encoder: EncoderReuse | None = None) -> Any:
        """Return a context manager that gives a session of `method`, or None for the untouched model."""
        return nullcontext(None) if method is None else method.attach(self.policy, encoder=encoder, **self.feed.attach)

    def encoded(self, encoder: EncoderReuse | None) -> int | None:
        """Return the patches of each image that are encoded; None: all, or the sizes of a tower are not known."""
        towers = self.control_step.towers
        return None if encoder is None or not towers else encoder.budget(towers[0].tokens)

    def watched(self) -> Watched:
        """Return the modules of each stage, for `StageTimer`."""
        return watched_of(self.family)

    def weight_bytes(self) -> dict[str, float]:
        """Bytes of weights that one control step reads, stage by stage: every pass reads its own once."""
        decoder = _bytes(layers_of(self.family.decoder)) + (0 if self.head is None else _bytes(self.head))
        after = self.feed.decoded * decoder
        if self.feed.denoised is not None:
            after += self.feed.denoised[1] * self._expert_bytes()
        vision = sum(_bytes(module) for module in (*self.anatomy.towers, *self.anatomy.projectors))
        return {"vision": vision, "prefill": decoder * self.control_step.prompt_passes, "decode": after}

    def _expert_bytes(self) -> float:
        """Return the bytes of weights that one denoising pass reads."""
        expert = self.feed.expert
        if expert is None:
            return sum(_bytes(layers_of(expert)) for expert in self.anatomy.experts)
        # Its layers also hold the weights of the modulations, which are computed once and kept from step to step.
        return self.element_bytes * expert.weights()

    @property
    def element_bytes(self) -> int:
        """Bytes of a number in the key-value cache."""
        return norm_of(self.family.decoder).weight.element_size()

    def _control_step(self) -> ControlStep:
        feed = self.feed
        decoder = _shape(self.family.decoder, self.head is not None)
        expert = feed.expert
        if feed.denoised is not None and expert is None:
            expert = Expert(_shape(self.anatomy.experts[0], False), *feed.denoised, self.anatomy.cross_layers)
        towers = tuple(tower for tower in map(_tower, self.anatomy.towers) if tower is not None)
        return ControlStep(
            decoder=decoder,
            visual=feed.visual,
            other=feed.other,
            towers=towers,
            cameras=max(1, len(getattr(self.policy, "cameras", ()))) * getattr(self.policy, "tiles", 1),
            projector=sum(2.0 * _matrices(module) for module in self.anatomy.projectors),
            decoded=feed.decoded,
            expert=expert,
        )

    @property
    def vision_by_formula(self) -> bool:
        """True if the sizes of all vision towers are known."""
        return len(self.control_step.towers) == len(self.anatomy.towers)


def warm(subject: Subject, session: Session) -> Any:
    """Run control steps until one is pruned; return the memory before the next.

    Raises:
        BudgetError: the method prunes none of the first steps.
    """
    session.reset()
    for _ in range(session.method.history + 16):
        subject.step()
        if session.kept is not None:
            return session.memory
    if was_pruned(session):
        return session.memory  # all visual tokens stay, and patches are reused
    raise BudgetError(
        f"{session.method!r} pruned none of the first {session.method.history + 16} control steps, so there is "
        "nothing to compare; give a smaller keep."
    )


def _shape(decoder: Any, with_head: bool) -> DecoderShape:
    shape = DecoderShape.of(decoder.config)
    layers = len(layers_of(decoder))
    return replace(shape, layers=layers, vocabulary=shape.vocabulary if with_head else 0)


def _tower(module: Any) -> Tower | None:
    """Return the sizes of a vision encoder; None if they are not known."""
    size, config = getattr(module, "size", None), getattr(module, "config", None)
    if size is not None and hasattr(size, "mlp_width"):
        width, heads, layers, feed_forward = size.width, size.heads, size.depth - 1, size.mlp_width
        patch, patches, prefix = size.patch, size.patches, size.prefix
    elif config is not None and all(
        isinstance(getattr(config, name, None), int)
        for name in ("patch_size", "image_size", "intermediate_size", "num_attention_heads")
    ):
        width, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
        feed_forward, patch = config.intermediate_size, config.patch_size
        prefix = 1 if config.model_type == "clip_vision_model" else 0
        patches = (config.image_size // patch) ** 2
    else:
        return None
    shape = DecoderShape(layers, width, heads, heads, width // heads, feed_forward, matrices=2)
    return Tower(shape, patches + prefix, layers, patching=2.0 * 3 * patch**2 * width * patches)


def _bytes(module: Any) -> int:
    """Return the bytes of its weights, each counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _matrices(module: nn.Module) -> int:
    """Return the number of elements in its matrices."""
    return sum(weight.numel() for weight in module.parameters() if weight.dim() == 2)
