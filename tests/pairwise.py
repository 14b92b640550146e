"""A few cases in which every two conditions meet, in place of all of their products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any


def pairs_of(case: Sequence[Any]) -> set[tuple[int, int, Any, Any]]:
    """Every two conditions of a case, each with its place."""
    return {(i, j, case[i], case[j]) for i, j in combinations(range(len(case)), 2)}


def pairwise(*factors: Sequence[Any], possible: Callable[..., bool] = lambda *_: True) -> list[tuple[Any, ...]]:
    """Cases such that every pair of conditions that occurs in a possible case occurs in one of them.

    Greedy, and the same in every run: always the case with the most pairs that are new.

    Args:
        factors: the conditions of each kind; a case has one of each.
        possible: whether a case, one argument for each kind, can be.
    """
    left = [case for case in product(*factors) if possible(*case)]
    missing = set[tuple[int, int, Any, Any]]().union(*map(pairs_of, left))
    found = []
    while missing:
        best = max(left, key=lambda case: len(pairs_of(case) & missing))
        found.append(best)
        missing -= pairs_of(best)
    return found
