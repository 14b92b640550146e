"""The adapters that PEFT put into a model: which of them act is Python, and may change from one control step to the
next. What was traced or held with other adapters no longer fits then.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from torch import nn

_KINDS = ("BaseTunerLayer", "AuxiliaryTrainingWrapper")


class Adapters:
    """PEFT's modules in some parts of a model.

    Args:
        layers: of the model; adapters that are put into it later, or taken out of it, are noticed in the first of them.
        parts: returns the parts; those that are no modules have no adapters.
    """

    def __init__(self, layers: Sequence[nn.Module], parts: Callable[[], Iterable[Any]]) -> None:
        self._layers = layers
        self._parts = parts
        self._kinds: tuple[type, ...] | None = None
        self._found: list[Any] = []

    def state(self) -> tuple[Hashable, ...]:
        """Return what decides how the parts compute besides their weights: which adapters act, whether they are turned
        off or merged into the weights, and their factors.
        """
        kinds = tuple(map(type, self._layers[0].modules()))
        if kinds != self._kinds:
            self._kinds = kinds
            every = {module: None for part in self._parts() if isinstance(part, nn.Module) for module in part.modules()}
            self._found = [module for module in every if any(kind.__name__ in _KINDS for kind in type(module).__mro__)]
        return (kinds, *map(_state_of, self._found))


def _state_of(adapter: Any) -> tuple[Hashable, ...]:
    factors = getattr(adapter, "scaling", None)  # a wrapper hands on the attributes of what it wraps
    return (
        adapter.disable_adapters,
        tuple(adapter.active_adapters),
        tuple(getattr(adapter, "merged_adapters", ())),
        tuple(factors.items()) if isinstance(factors, dict) else (),
    )
