"""What a compiled program takes for granted of the modules that it runs, as far as it changes in practice: their
submodules, and the types and devices of their weights. Guards on all of it would cost a millisecond a call.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from torch import nn


class Parts:
    """The submodules and weights of some modules, read again in every control step.

    Args:
        owners: the modules; others are passed over.
    """

    def __init__(self, owners: Iterable[Any]) -> None:
        self._owners = [owner for owner in owners if isinstance(owner, nn.Module)]
        self._changes = 0
        self._collect()

    @property
    def graph_key(self) -> Hashable:
        """A key that is another once a submodule was exchanged or added, or a weight has another type or device; and
        the old one again once the types and devices are as before.
        """
        same = all(len(held) == count for held, count in self._sizes)
        if not (same and all(held.get(name) is child for held, name, child in self._children)):
            self._changes += 1
            self._collect()
        weights = [held.get(name) for held, name in self._weights]
        placed = tuple([None if weight is None else (weight.dtype, weight.device) for weight in weights])
        return self._changes, placed

    def _collect(self) -> None:
        # A module may be below several owners, and is read once.
        modules = list(dict.fromkeys(module for owner in self._owners for module in owner.modules()))
        tables: list[dict[str, Any]] = [table for one in modules for table in (one._modules, one._parameters)]
        self._sizes = [(table, len(table)) for table in tables]
        self._children = [(module._modules, *item) for module in modules for item in module._modules.items()]
        self._weights = [(module._parameters, name) for module in modules for name in module._parameters]
