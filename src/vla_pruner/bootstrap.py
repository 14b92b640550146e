"""Bootstrap intervals by scipy: of a mean, and of a rank correlation."""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_pruner.statistics import PackageMissing
from vla_pruner.wording import install

RESAMPLES = 9999
FEWEST_EPISODES = 8
"""The number of episodes below which a bound of their mean says nothing."""
FEWEST_PAIRS = 4
"""The number of pairs below which a rank correlation says nothing."""

FEWEST_CLUSTERS = 8
"""The number of clusters below which a rank correlation has no interval: of few pairs in the same order every resample
is in that order too.
"""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; the interval is None if there are too few values for one."""

    value: float
    low: float | None
    high: float | None


def mean_estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean of independent values, with the bias-corrected and accelerated bootstrap interval (Efron 1987).

    Few values make the interval too narrow: of 12 draws from a lognormal distribution it misses the mean in more than 5
    % of all cases.

    Args:
        values: one for each episode; two at least for an interval.

    Raises:
        PackageMissing: scipy is not installed.
    """
    value = float(np.mean(values))
    if len(values) < 2:
        return Estimate(value, None, None)
    if np.ptp(values) <= 1e-9 * abs(value):  # equal but for rounding, for which scipy would return nan
        return Estimate(value, value, value)
    found = _stats().bootstrap(
        (np.asarray(values, float),),
        np.mean,
        n_resamples=RESAMPLES,
        method="BCa",
        random_state=np.random.default_rng(seed),
    )
    return Estimate(value, float(found.confidence_interval.low), float(found.confidence_interval.high))


def mean_upper_bound(values: Sequence[float], comparisons: int) -> float | None:
    """Return a bound above the mean of independent values that holds for all of several such means together with a
    chance of 97.5 % or more: Student's t, by Bonferroni. The bootstrap's bound is too low if the best of many is
    picked.

    Args:
        values: one for each episode.
        comparisons: means among which one is chosen.

    Returns:
        the bound; None for fewer than `FEWEST_EPISODES` values.

    Raises:
        PackageMissing: scipy is not installed.
    """
    if len(values) < FEWEST_EPISODES:
        return None
    quantile = float(_stats().t.ppf(1 - 0.025 / comparisons, len(values) - 1))
    return float(np.mean(values)) + quantile * float(np.std(values, ddof=1)) / len(values) ** 0.5


def rank_correlation(
    one: Sequence[float],
    other: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Estimate:
    """Return Spearman's rank correlation of pairs, with the percentile bootstrap interval over clusters of pairs.

    There is an interval from `FEWEST_CLUSTERS` clusters on. A resample in which one side is all the same counts as no
    correlation.

    Args:
        one, other: the two sides of each pair.
        clusters: the cluster of each pair; pairs of one cluster are alike, so they are resampled together. None: each
            pair stands alone.
        groups: the group of each pair: the correlation is then the mean over groups of `FEWEST_PAIRS` pairs or more in
            which neither side is all the same. None: all pairs are one group.

    Raises:
        ValueError: no group has `FEWEST_PAIRS` pairs, or one side is all the same.
        PackageMissing: scipy is not installed.
    """
    first, second = np.asarray(one, float), np.asarray(other, float)
    if len(first) != len(second) or len(first) < FEWEST_PAIRS:
        raise ValueError(f"{len(first)} and {len(second)} values are no {FEWEST_PAIRS} pairs or more.")
    numbers = _numbered(range(len(first)) if clusters is None else clusters)
    of_group = _numbered([0] * len(first) if groups is None else groups)
    ranked = ranked_groups(first.tolist(), second.tolist(), of_group.tolist())
    if not ranked:
        raise ValueError("All values of one side are the same, so they have no ranks.")
    stats = _stats()

    def of_pairs(places: np.ndarray) -> float:
        a, b = first[places], second[places]
        if len(places) == 0 or np.ptp(a) == 0.0 or np.ptp(b) == 0.0:
            return 0.0
        return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])

    def correlation(chosen: np.ndarray) -> float:
        places = np.concatenate([members[number] for number in chosen])
        return float(np.mean([of_pairs(places[of_group[places] == group]) for group in ranked]))

    members = [np.flatnonzero(numbers == number) for number in range(numbers.max() + 1)]
    value = correlation(np.arange(len(members)))
    if len(members) < FEWEST_CLUSTERS:
        return Estimate(value, None, None)
    found = stats.bootstrap(
        (np.arange(len(members)),),
        correlation,
        vectorized=False,
        n_resamples=RESAMPLES // 5,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return Estimate(value, float(found.confidence_interval.low), float(found.confidence_interval.high))


def ranked_groups(one: Sequence[float], other: Sequence[float], groups: Sequence[Hashable]) -> list[Hashable]:
    """Return the groups of `FEWEST_PAIRS` pairs or more in which neither side is all the same."""
    found = []
    for group in dict.fromkeys(groups):
        places = [place for place, mine in enumerate(groups) if mine == group]
        sides = [{side[place] for place in places} for side in (one, other)]
        if len(places) >= FEWEST_PAIRS and min(map(len, sides)) > 1:
            found.append(group)
    return found


def _numbered(names: Iterable[Hashable]) -> np.ndarray:
    """Return (pairs,): equal names as equal numbers, from 0 on."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names])


def _stats() -> Any:
    try:
        return importlib.import_module("scipy.stats")
    except ImportError as error:
        raise PackageMissing(f"Intervals need scipy, which is not installed; run: {install('eval')}") from error
