"""A method: one frozen dataclass, whose fields are the options of --method after colons."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import vla_pruner as vp


@dataclass(frozen=True)
class Brightest(vp.Scored):
    """Keeps the visual tokens whose hidden states have the largest norm.

    Attributes:
        power: of the norm.
        smallest: keep the smallest instead.
        keep, warmup_steps: see `vla_pruner.Scored`.
        layer, pruned: see `vla_pruner.Method`.
    """

    power: float = 2.0
    smallest: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power <= 0:
            raise ValueError("the power of a norm is larger than 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"features"})

    def score(self, evidence: vp.Evidence) -> Tensor:
        assert evidence.features is not None
        norms = evidence.features.norm(p=self.power, dim=2)
        return -norms if self.smallest else norms
