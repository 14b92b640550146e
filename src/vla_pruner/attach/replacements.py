"""Methods replaced on single instances while a session is attached, for what no hook reaches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vla_pruner.errors import SessionError


class Replaced:
    """A method that stands in the place of another on one instance.

    Args:
        call: what is called instead.
        original: the bound method, whose name and signature it shows.
    """

    def __init__(self, call: Callable[..., Any], original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        # Set last: where the original is such an object itself, its attributes were copied just now.
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        # The copy would call into the model that it was copied from.
        raise SessionError("A policy with a session attached was copied or pickled; detach first.")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__deepcopy__(None)


class Replacements:
    """Methods replaced on instances, all of them put back by `remove`."""

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, bool, Any]] = []

    def put(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Have `owner.name(...)` call `around(original, ...)`."""
        original = getattr(owner, name)
        own = vars(owner)
        self._saved.append((owner, name, name in own, own.get(name)))
        setattr(owner, name, Replaced(functools.partial(around, original), original))

    def remove(self) -> None:
        """Put every method back."""
        for owner, name, was_own, before in reversed(self._saved):
            if was_own:
                setattr(owner, name, before)
            else:
                vars(owner).pop(name, None)
        self._saved.clear()
