"""What is refused of the caches that a model is called with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vla_pruner.errors import SessionError, UnsupportedModelError
from vla_pruner.wording import a_type


def filled(cache: Any) -> int | None:
    """How many positions a cache holds; None without one, and where the host would have to wait to know."""
    held = None if cache is None else cache.get_seq_length()
    if held is None or (isinstance(held, Tensor) and held.device.type != "cpu"):
        return None
    return int(held)


def check_prompt_cache(cache: Any) -> None:
    """Raise unless a prompt may be run with this cache.

    Raises:
        UnsupportedModelError: it is of a type that was not tested.
        SessionError: it holds something already.
    """
    if cache is None:
        return
    from transformers import DynamicCache, StaticCache

    if not isinstance(cache, (DynamicCache, StaticCache)) or getattr(cache, "offloading", False):
        raise UnsupportedModelError(
            f"The prefill was given {a_type(cache)}; supported are DynamicCache and StaticCache, not offloaded."
        )
    held = filled(cache)
    if held:
        raise SessionError(
            f"The prefill was given a cache that holds {held} positions already; each control step needs an empty one "
            "(a new cache, or reset() the static one)."
        )


def check_held(cache: Any, expected: int | None) -> None:
    """Raise SessionError if a cache holds another number of positions than the call before left in it, `expected`."""
    held = filled(cache)
    if held is not None and expected is not None and held != expected:
        raise SessionError(
            f"The cache holds {held} positions, but the call before left {expected} in it: it was reset or cropped "
            "within a control step. Decode one token after the other, without speculative decoding (prompt lookup, an "
            "assistant), and reset a cache between control steps."
        )
