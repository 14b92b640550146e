"""The feed of a benchmark: a policy's control step as a function without arguments, and its sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vla_pruner.cost import Expert

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Feed:
    """The inputs of a kind of policy for a benchmark, and the sizes that follow from them.

    Attributes:
        step: one control step, from prepared inputs on the host to actions on the host.
        visual: visual tokens of all cameras.
        other: other tokens of the prompt.
        decoded: passes that decode a token after the prompt; with `count`, the most that there can be.
        denoised: rows of one pass of the expert, and passes; None without an expert.
        expert: the expert's sizes; None: its config has them by transformers' names.
        uses_head: whether the language model's head over the vocabulary runs.
        prepare: prepares images and words for `step`; None if `step` does that too.
        attach: options for `Method.attach`.
        count: runs a control step and returns in how many passes it decoded; None: in `decoded`.
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
    count: Callable[[], int] | None = None


def on_host(actions: Tensor) -> Tensor:
    """Return actions as a robot needs them: on the CPU, which also waits for the device."""
    return actions.detach().float().cpu()
