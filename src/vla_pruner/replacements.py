"""Methods replaced on single instances, for changes that no hook can make, and put back without a trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vla_pruner.errors import SessionError

WRITTEN = "_torchdynamo_orig_callable"
"""The attribute in which torch keeps the original of a function that it compiled. If a function with this attribute is
compiled, torch compiles that original.
"""
ATTACHED = "A policy with a session attached was copied or pickled; detach first."


class Replaced:
    """A method that stands in the place of another on one instance. It cannot be copied or pickled: the copy would call
    into the model that it was copied from.

    Args:
        around: the function that is called instead, with the original before the arguments.
        owner, name: the owner and the name of the method.
        refusal: the error's message if it is copied.
    """

    def __init__(self, around: Callable[..., Any], owner: Any, name: str, refusal: str) -> None:
        original = getattr(owner, name)
        functools.update_wrapper(self, original)
        vars(self).pop(WRITTEN, None)  # or torch would compile the original instead of this object
        # Set last: if the original is such an object itself, its attributes were copied just now.
        self._around = around
        self._refusal = refusal
        self.original = original
        self.stood = name in vars(owner)
        self._call = functools.partial(around, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def skip(self, below: Replaced) -> None:
        """Replace the original by that of `below`, which is taken away."""
        self.original, self.stood = below.original, below.stood
        self._call = functools.partial(self._around, self.original)

    def __deepcopy__(self, memo: Any) -> Any:
        raise SessionError(self._refusal)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__deepcopy__(None)


class Replacements:
    """Methods replaced on instances, all of them put back by `remove`, in whatever order several such sets go.

    Args:
        refusal: the error's message if an owner is copied or pickled.
    """

    def __init__(self, refusal: str = ATTACHED) -> None:
        self._refusal = refusal
        self._put: list[tuple[Any, str, Replaced]] = []

    def put(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Make `owner.name(...)` call `around(original, ...)`."""
        replaced = Replaced(around, owner, name, self._refusal)
        self._put.append((owner, name, replaced))
        setattr(owner, name, replaced)

    def remove(self) -> None:
        """Put every method back."""
        put, self._put = self._put, []
        undo(*(functools.partial(_take_away, *one) for one in reversed(put)))


def undo(*steps: Callable[[], object]) -> None:
    """Run every step, also after one that fails; then raise the first error."""
    first: BaseException | None = None
    for step in steps:
        try:
            step()
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first


def _take_away(owner: Any, name: str, replaced: Replaced) -> None:
    top = vars(owner).get(name)
    if top is replaced:
        if replaced.stood:
            setattr(owner, name, replaced.original)
        else:
            del vars(owner)[name]
        return
    # Something else was put on top since, and stays.
    while isinstance(top, Replaced) and top.original is not replaced:
        top = top.original
    if isinstance(top, Replaced):
        top.skip(replaced)
