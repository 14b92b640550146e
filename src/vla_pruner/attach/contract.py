"""The contract of a user's own method, checked where it is called, so that a mistake is a sentence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vla_pruner.attach.layout import ensure
from vla_pruner.errors import BudgetError, OptionError
from vla_pruner.methods.base import Evidence, Method

EVIDENCE = ("semantic", "action", "features", "embeddings", "similarity", "relevance")
"""The names that `Method.needs` may hold."""


def check_needs(method: Method, reuses: bool) -> None:
    """Refuse a `needs` that no session can meet.

    Args:
        method: the method of a stage.
        reuses: whether the keys and values of the last control step are held.

    Raises:
        OptionError: it is no set of names of evidence, or has one that this session does not have.
    """
    needs: Any = method.needs
    name = type(method).__name__
    if not isinstance(needs, frozenset | set):
        raise OptionError(
            f"{name}.needs is {needs!r}; it is a frozenset of names, such as frozenset({{'semantic'}}), or a property "
            "that returns one."
        )
    unknown = sorted(str(need) for need in needs if need not in EVIDENCE)
    if unknown:
        raise OptionError(f"{name}.needs has {', '.join(map(repr, unknown))}; it may have {', '.join(EVIDENCE)}.")
    if "similarity" in needs and not reuses:
        raise OptionError(
            f"{name}.needs has 'similarity', which is there for methods that reuse tokens (pruned=\"reuse\"); leave it "
            "out."
        )


def budget_of(method: Method, tokens: int) -> int:
    """Return `method.budget(tokens)`.

    Raises:
        BudgetError: it is no whole number from 1 on; a larger one than the tokens is refused once their number is
            known.
    """
    found: Any = method.budget(tokens)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise BudgetError(
            f"{type(method).__name__}.budget({tokens}) returned {found!r}; it returns how many of the visual tokens "
            "stay: an int of 1 or more."
        )
    return found


def selected(method: Method, evidence: Evidence, k: int) -> Tensor:
    """Return `method.select(evidence, k)`: (B, k) int64, sorted ids, each once.

    Raises:
        OptionError: it returned something else.
        SessionError: its ids are out of range, not sorted or there twice.
    """
    given: Any = method.select(evidence, k)
    rows, tokens = evidence.valid.shape
    what = f"{type(method).__name__}.select"
    fits = isinstance(given, Tensor) and tuple(given.shape) == (rows, k) and given.dtype == torch.int64
    if not fits:
        found = f"{tuple(given.shape)} of {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
        raise OptionError(f"{what} returned {found}; it returns ids of shape {(rows, k)} and dtype torch.int64.")
    in_range = (given >= 0).all() & (given < tokens).all()
    ensure(in_range, f"{what} returned ids that are not from 0 to {tokens - 1}.")
    ensure((given[:, 1:] > given[:, :-1]).all(), f"{what} returned ids that are not in rising order, each once.")
    return given
