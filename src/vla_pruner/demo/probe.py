"""The measurements of each arm before the episodes: FLOPs of a pruned control step, and the cost of the stage timer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch

from vla_pruner.cost import DecoderShape, Flops, StepShape, count_flops, decoder_flops
from vla_pruner.demo.arms import Arm
from vla_pruner.families import family_of
from vla_pruner.fate import Fate
from vla_pruner.observations import Observation
from vla_pruner.statistics import percentile
from vla_pruner.timing import StageTimer

_LONGEST_WARM_UP = 16
"""The number of steps after which a method that has not pruned is taken to never prune."""


@dataclass(frozen=True)
class ArmCost:
    """The FLOPs of one pruned control step (of any step if the arm never prunes)."""

    counted: float
    """The whole step as torch's dispatcher counts it: vision, decoder, scoring, selecting and waste."""
    floor: Flops
    """The decoder by formula: the least that this rule can cost."""
    kept: int
    visual: int

    def to_json(self) -> dict[str, float]:
        return {
            "counted_flops": self.counted,
            "decoder_floor_flops": self.floor.total,
            "decoder_floor_flops_linear": self.floor.linear,
            "decoder_floor_flops_quadratic": self.floor.quadratic,
            "visual_tokens_kept": self.kept,
            "visual_tokens": self.visual,
        }


def decoder_shapes(policy: Any) -> tuple[DecoderShape, StepShape]:
    """Return the decoder's shape, and that of a control step: decoded action tokens, or action rows behind the
    prompt.
    """
    family, config = family_of(policy), policy.config
    decoder, visual = DecoderShape.of(family.decoder.config), config.num_visual_tokens
    other = config.prompt_length - visual
    if family.anatomy.head is None:
        return replace(decoder, vocabulary=0), StepShape(visual, other + config.chunk, actions=1)
    return decoder, StepShape(visual, other, config.action_dimensions)


def vision_flops(policy: Any, observation: Observation) -> float:
    """Return the counted FLOPs of image encoder and projector for one look at all cameras."""
    calls: list[tuple[Any, Any, Any]] = []

    def remember(module: Any, args: Any, kwargs: Any) -> None:
        calls.append((module, args, kwargs))

    anatomy = family_of(policy).anatomy
    parts = (*anatomy.towers, *anatomy.projectors)
    handles = [part.register_forward_pre_hook(remember, with_kwargs=True) for part in parts]
    try:
        act(policy, observation)
    finally:
        for handle in handles:
            handle.remove()
    seen = list(calls)

    @torch.inference_mode()
    def again() -> None:
        for module, args, kwargs in seen:
            module(*args, **kwargs)

    return count_flops(again)


def arm_cost(policy: Any, arm: Arm, observation: Observation) -> ArmCost:
    """Run one arm on one observation until it prunes, then count one more step. This also warms the machine up."""
    decoder, step = decoder_shapes(policy)
    kept: int | None = None
    with arm.attach(policy, 0) as session:
        if session is None:
            for _ in range(2):
                act(policy, observation)
        else:
            until_pruned(policy, session, observation)
            kept = None if session.kept is None else int(session.kept.shape[1])
        counted = count_flops(lambda: act(policy, observation))
    method: Any = arm.method
    layer, pruned = (0, Fate.DROP) if method is None else (method.layer, method.pruned)
    floor = decoder_flops(decoder, step, kept, layer, pruned)
    return ArmCost(counted, floor, step.visual if kept is None else kept, step.visual)


def until_pruned(policy: Any, session: Any, observation: Observation) -> None:
    """Begin an episode and run control steps up to the first that is pruned, or as many as any method waits."""
    session.reset()
    for _ in range(_LONGEST_WARM_UP):
        act(policy, observation)
        if session.kept is not None:
            return


def timer_overhead(policy: Any, observation: Observation, pairs: int = 15) -> float:
    """Return the milliseconds that the stage timer adds to an unpruned control step: the median over alternating
    pairs.
    """
    differences: list[float] = []
    for _ in range(pairs):
        start = perf_counter()
        act(policy, observation)
        plain = perf_counter() - start
        with StageTimer(policy) as timer:
            with timer.step():
                act(policy, observation)
            differences.append(timer.steps[0].total - 1e3 * plain)
    return percentile(differences, 50)


def paces(first: Any, second: Any, observation: Observation, rounds: int = 15) -> tuple[float, float]:
    """Return the median milliseconds of a control step of two policies that take turns."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for policy, times in zip((first, second), taken, strict=True):
            start = perf_counter()
            act(policy, observation)
            times.append(1e3 * (perf_counter() - start))
    return percentile(taken[0], 50), percentile(taken[1], 50)


def act(policy: Any, observation: Observation) -> None:
    """Run one control step on an observation."""
    policy.act(observation.images, observation.instruction, observation.proprio)
