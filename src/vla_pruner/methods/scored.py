"""The base of methods that rank the visual tokens by one score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vla_pruner.errors import OptionError
from vla_pruner.methods.base import Evidence
from vla_pruner.methods.budgeted import Budgeted
from vla_pruner.methods.selection import top_ids


@dataclass(frozen=True)
class Scored(Budgeted):
    """Keeps the k visual tokens with the highest score. A subclass adds `needs` and `score`:

        @dataclass(frozen=True)
        class LargestNorm(Scored):
            @property
            def needs(self) -> frozenset[str]:
                return frozenset({"features"})

            def score(self, evidence: Evidence) -> Tensor:
                return evidence.features.norm(dim=2)

    Ties go to the smaller id, NaNs rank last, and a masked-out token stays only if a row has fewer than k others.

    Attributes:
        keep, warmup_steps: see `Budgeted`.
        layer, pruned: see `Method`.
    """

    def score(self, evidence: Evidence) -> Tensor:
        """Return (B, M) floats; tokens with a higher score are kept first."""
        raise NotImplementedError(f"{type(self).__name__} does not rank the tokens: define score(evidence).")

    def select(self, evidence: Evidence, k: int) -> Tensor:
        score: Any = self.score(evidence)
        shape = tuple(evidence.valid.shape)
        if not isinstance(score, Tensor) or tuple(score.shape) != shape or score.is_complex():
            found = f"{tuple(score.shape)} of {score.dtype}" if isinstance(score, Tensor) else type(score).__name__
            raise OptionError(f"{type(self).__name__}.score returned {found}; it returns numbers of shape {shape}.")
        return top_ids(score, evidence.valid, k)


@dataclass(frozen=True)
class SemanticallyScored(Scored):
    """Keeps the k visual tokens with the highest semantic score: the attention that they receive in the prefill."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"semantic"})

    def score(self, evidence: Evidence) -> Tensor:
        assert evidence.semantic is not None
        return evidence.semantic
