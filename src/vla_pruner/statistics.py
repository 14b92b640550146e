"""Success rates with honest intervals: one rate, and the difference between two arms that ran the same episodes.

All intervals are 95 % unless `confidence` says otherwise. Nothing here needs more than the standard library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist


@dataclass(frozen=True)
class Rate:
    """A success rate with its Wilson interval; all three numbers in [0, 1]."""

    successes: int
    total: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """What changes between two arms that ran the same episodes; rates in [-1, 1], counts of pairs."""

    value: float
    """Success rate of the arm minus that of the baseline."""
    low: float
    high: float
    gained: int
    """Pairs where only the arm succeeded."""
    lost: int
    """Pairs where only the baseline succeeded."""
    pairs: int
    p_value: float
    """Two-sided exact McNemar test of "gained and lost are equally likely"."""

    @property
    def within_noise(self) -> bool:
        """Whether the interval contains zero. This says that no difference was shown, not that there is none."""
        return self.low <= 0.0 <= self.high


def _quantile(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1, for example 0.95.")
    return NormalDist().inv_cdf(0.5 + confidence / 2.0)


def wilson(successes: int, total: int, confidence: float = 0.95) -> Rate:
    """Wilson's score interval for a success rate.

    Args:
        successes: how many of `total` succeeded.
        total: number of independent trials; 0 gives a value of nan and the interval [0, 1].

    Raises:
        ValueError: if the counts are impossible.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total} trials is impossible.")
    z = _quantile(confidence)
    if total == 0:
        return Rate(0, 0, float("nan"), 0.0, 1.0)
    p = successes / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    # At 0 and at `total` the exact ends are 0 and 1; rounding would leave them a hair away.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == total else min(1.0, centre + half)
    return Rate(successes, total, p, low, high)


def mcnemar_p(gained: int, lost: int) -> float:
    """Two-sided exact McNemar p-value: the binomial test of `gained` among the `gained + lost` discordant pairs."""
    if gained < 0 or lost < 0:
        raise ValueError(f"Counts of pairs cannot be negative, found {gained} and {lost}.")
    n = gained + lost
    tail = sum(comb(n, i) for i in range(min(gained, lost) + 1)) / 2**n
    return min(1.0, 2.0 * tail)


def paired_difference(baseline: Sequence[bool], arm: Sequence[bool], confidence: float = 0.95) -> PairedDifference:
    """Difference in success rate between two arms that ran the same episodes, in the same order.

    The interval is Newcombe's hybrid score interval for paired proportions (Statistics in Medicine 17, 1998, method
    10): the two Wilson intervals, combined with the correlation of the pairs. It stays sensible for few pairs and for
    rates near 0 and 1, where the usual normal interval collapses.

    Raises:
        ValueError: if the two lists differ in length.
    """
    if len(baseline) != len(arm):
        raise ValueError(
            f"Paired episodes are needed: the baseline has {len(baseline)} outcomes and the arm {len(arm)}. "
            "Pass only the episodes that both of them finished, in the same order."
        )
    pairs = len(baseline)
    both = sum(bool(a) and bool(b) for a, b in zip(arm, baseline, strict=True))
    gained = sum(bool(a) and not b for a, b in zip(arm, baseline, strict=True))
    lost = sum(bool(b) and not a for a, b in zip(arm, baseline, strict=True))
    neither = pairs - both - gained - lost
    if pairs == 0:
        _quantile(confidence)
        return PairedDifference(float("nan"), -1.0, 1.0, 0, 0, 0, 1.0)
    first = wilson(both + gained, pairs, confidence)
    second = wilson(both + lost, pairs, confidence)
    correlation = _correlation(both, gained, lost, neither)

    def spread(a: float, b: float) -> float:
        return sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    value = (gained - lost) / pairs
    low = value - spread(first.value - first.low, second.high - second.value)
    high = value + spread(first.high - first.value, second.value - second.low)
    return PairedDifference(value, max(-1.0, low), min(1.0, high), gained, lost, pairs, mcnemar_p(gained, lost))


def _correlation(both: int, gained: int, lost: int, neither: int) -> float:
    """Newcombe's continuity-corrected phi coefficient of the 2 x 2 table of pairs."""
    product = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    if product == 0:
        return 0.0
    cross = both * neither - gained * lost
    if cross > 0:
        cross = max(cross - (both + gained + lost + neither) / 2, 0.0)
    return cross / sqrt(product)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) with linear interpolation; nan for no values."""
    if not 0.0 <= q <= 100.0:
        raise ValueError(f"q is {q}; a percentile lies between 0 and 100.")
    if not values:
        return float("nan")
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100.0
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """The interval of the median between two of the values themselves, by the binomial test: exact for any
    distribution. None where there are too few values for one (fewer than 6 at 95 %).
    """
    _quantile(confidence)
    ordered, n = sorted(values), len(values)
    tail, cut = 0.0, 0
    for outside in range(n // 2):
        tail += comb(n, outside) / 2**n
        if tail > (1 - confidence) / 2:
            break
        cut = outside + 1
    return None if cut == 0 else (ordered[cut - 1], ordered[n - cut])
