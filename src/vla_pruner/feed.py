"""What a benchmark feeds a policy with: its control step as a function without arguments, and what that consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vla_pruner.cost import Expert

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Feed:
    """What a kind of policy is fed with, and what follows from it.

    Attributes:
        step: one control step, from prepared inputs on the host to actions on the host.
        visual: visual tokens of all cameras.
        other: other tokens of the prompt.
        decoded: passes that decode a token after the prompt.
        denoised: rows of one pass of the expert, and passes; None without an expert.
        expert: the expert's sizes; None: its config has them by transformers' names.
        uses_head: whether the language model's head over the vocabulary runs.
        prepare: from images and words to what `step` takes; None where `step` does that too.
        attach: options for `Method.attach`.
    """

    step: Callable[[], Any]
    visual: int
    other: int
    decoded: int = 0
    denoised: tuple[int, int] | None = None
    expert: Expert | None = None
    uses_head: bool = True
    prepare: Callable[[], Any] | None = None
    attach: dict[str, Any] = field(default_factory=dict)


def on_host(actions: Tensor) -> Tensor:
    """Actions as a robot needs them: on the CPU, which also waits for the device."""
    return actions.detach().float().cpu()
