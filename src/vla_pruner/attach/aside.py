"""Sequences that are no control step: a model that is called without an image runs untouched beside a session."""

from __future__ import annotations

import weakref
from typing import Any

from vla_pruner.caches import held


class Aside:
    """Knows which calls of a decoder go on with a sequence that began without an image, by their caches."""

    def __init__(self) -> None:
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()

    def takes(self, cache: Any, prompt_cache: Any) -> bool:
        """Whether a call that shows the model no image begins such a sequence, or goes on with one.

        Args:
            cache: the call's; None: it has none.
            prompt_cache: that of the control step which is running, or was last.
        """
        if cache is None or cache in self._caches:
            return True
        count = held(cache)
        begins = cache is not prompt_cache if count is None else count == 0
        if begins:
            self._caches.add(cache)
        return begins

    def remember(self, cache: Any) -> None:
        """A call of such a sequence returned this cache."""
        if cache is not None:
            self._caches.add(cache)

    def forget(self, cache: Any) -> None:
        """The prompt of a control step is run with this cache."""
        if cache is not None:
            self._caches.discard(cache)
