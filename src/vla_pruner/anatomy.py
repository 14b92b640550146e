"""The parts of a policy's model, named by its family and read by timers, benchmarks and compilers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Anatomy:
    """The parts of a policy.

    Attributes:
        decoder: the decoder (`.layers`, `.norm`, `.config`) that reads the prompt.
        experts: decoders that read its cache, if there are any.
        cross_layers: layers of the experts that attend to the prompt alone, and not to their own rows.
        towers: vision encoders; each is given every camera's image once a control step.
        projectors: modules that bring vision features to the decoder's width.
        language_model: the module that calls the decoder and then `lm_head`, its head over the vocabulary; None: no
            tokens are decoded.
        loop: the module whose `forward` runs the layers of decoder and expert itself, so that theirs never run; None:
            they are called as modules.
    """

    decoder: Any
    experts: tuple[Any, ...] = ()
    cross_layers: frozenset[int] = frozenset()
    towers: tuple[nn.Module, ...] = ()
    projectors: tuple[nn.Module, ...] = ()
    language_model: Any = None
    loop: Any = None

    @property
    def head(self) -> nn.Module | None:
        """The head over the vocabulary."""
        return None if self.language_model is None else self.language_model.lm_head
