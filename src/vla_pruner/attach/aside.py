"""Sequences that are no control step: calls of the model without an image run untouched while a session is attached."""

from __future__ import annotations

import weakref
from typing import Any

from vla_pruner.caches import held


class Aside:
    """The caches of sequences that began without an image, by which later calls of such a sequence are recognised."""

    def __init__(self) -> None:
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()

    def takes(self, cache: Any, prompt_cache: Any) -> bool:
        """Return True if a call without an image begins or continues such a sequence.

        Args:
            cache: the call's cache; None: it has none.
            prompt_cache: the cache of the control step that is running, or of the last one.
        """
        if cache is None or cache in self._caches:
            return True
        count = held(cache)
        begins = cache is not prompt_cache if count is None else count == 0
        if begins:
            self._caches.add(cache)
        return begins

    def remember(self, cache: Any) -> None:
        """Remember a cache that a call of such a sequence returned."""
        if cache is not None:
            self._caches.add(cache)

    def forget(self, cache: Any) -> None:
        """Forget a cache with which the prompt of a control step is run."""
        if cache is not None:
            self._caches.discard(cache)
