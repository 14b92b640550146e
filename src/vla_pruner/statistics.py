"""Success rates with honest intervals: of one rate, and of the difference between arms that ran the same episodes.

All intervals are 95 % unless `confidence` says otherwise. Wilson's interval, binomial tests and Holm's procedure are
scipy's and statsmodels'; a method that those lack (paired proportions, with tasks as strata) is here, with its paper.
"""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb, isnan, sqrt
from statistics import NormalDist
from typing import Any

from vla_pruner.errors import VLAPrunerError
from vla_pruner.wording import install

POWER = 0.8
"""The chance with which `pairs_needed` pairs decide a question, if the results so far are the truth."""

NEWCOMBE, TANGO = "newcombe", "tango"
INTERVALS = (NEWCOMBE, TANGO)
"""The intervals of a paired difference, by their names: `Pairs.limits` and `Pairs.tango`."""

_MOST_PAIRS = 1_000_000

_PSEUDO_PAIRS = 4.0
"""Discordant pairs, half of them gained, that smooth the variances of strata: about z * z, as Agresti and Coull add to
a single rate. Without them a task in which every pair was lost would look free of chance.
"""


class PackageMissing(VLAPrunerError, ImportError):
    """A statistic needs a package that is not installed."""


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
    """The difference between two arms that ran the same episodes; rates in [-1, 1], counts of pairs."""

    value: float
    """Success rate of the arm minus that of the baseline."""
    low: float
    high: float
    gained: int
    """Pairs in which only the arm succeeded."""
    lost: int
    """Pairs in which only the baseline succeeded."""
    pairs: int
    p_value: float
    """Two-sided exact McNemar test of "gained and lost are equally likely"."""

    @property
    def within_noise(self) -> bool:
        """True if the interval contains zero. This says that no difference was shown, not that there is none."""
        return self.low <= 0.0 <= self.high


@dataclass(frozen=True)
class MeanDifference:
    """The mean difference between two arms that ran the same episodes, in the units of the values."""

    value: float
    low: float
    high: float
    pairs: int


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PackageMissing(
            f"Intervals and tests need {name.split('.')[0]}, which is not installed; run: {install('eval')}"
        ) from error


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1, for example 0.95.")


def _quantile(confidence: float) -> float:
    _check_confidence(confidence)
    return NormalDist().inv_cdf(0.5 + confidence / 2.0)


def wilson(successes: int, total: int, confidence: float = 0.95) -> Rate:
    """Return Wilson's score interval for a success rate: that of scipy's `binomtest`, which tests exactly before it
    gives one and takes a hundred times as long.

    Args:
        successes: number of trials that succeeded.
        total: number of independent trials; 0 gives a value of nan and the interval [0, 1].

    Raises:
        ValueError: the counts are impossible.
        PackageMissing: scipy is not installed.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total} trials is impossible.")
    _check_confidence(confidence)
    if total == 0:
        return Rate(0, 0, float("nan"), 0.0, 1.0)
    value, z = successes / total, float(_package("scipy.special").ndtri(0.5 + 0.5 * confidence))
    middle = (2 * total * value + z**2) / (2 * (total + z**2))
    half = z / (2 * (total + z**2)) * sqrt(4 * total * value * (1 - value) + z**2)
    low, high = 0.0 if successes == 0 else middle - half, 1.0 if successes == total else middle + half
    return Rate(successes, total, value, low, high)


@lru_cache(maxsize=4096)
def mcnemar_p(gained: int, lost: int) -> float:
    """Return the two-sided exact McNemar p-value: the binomial test of `gained` among the `gained + lost` discordant
    pairs.

    It holds for pairs of many tasks too: in each of them the two are equally likely.
    """
    if gained < 0 or lost < 0:
        raise ValueError(f"Counts of pairs cannot be negative, found {gained} and {lost}.")
    if gained + lost == 0:
        return 1.0
    return float(_package("scipy.stats").binomtest(gained, gained + lost).pvalue)


@dataclass(frozen=True)
class Pairs:
    """Outcomes of two arms on the same episodes, counted by stratum.

    Attributes:
        counts: for each stratum (task) the pairs that both solved, only the arm, only the baseline, and neither.
    """

    counts: tuple[tuple[int, int, int, int], ...]

    @classmethod
    def of(cls, baseline: Sequence[bool], arm: Sequence[bool], strata: Sequence[Hashable] | None = None) -> Pairs:
        """Count two lists of outcomes, pair by pair.

        Args:
            strata: the task of every pair; None: all pairs are of one.

        Raises:
            ValueError: the lists differ in length.
        """
        if len(baseline) != len(arm):
            raise ValueError(
                f"Paired episodes are needed: the baseline has {len(baseline)} outcomes and the arm {len(arm)}. "
                "Pass only the episodes that both of them finished, in the same order."
            )
        of_pair = [None] * len(arm) if strata is None else strata
        counts: dict[Hashable, list[int]] = {}
        for before, after, stratum in zip(baseline, arm, of_pair, strict=True):
            cell = (0 if before else 1) if after else (2 if before else 3)
            counts.setdefault(stratum, [0, 0, 0, 0])[cell] += 1
        return cls(tuple((both, gained, lost, neither) for both, gained, lost, neither in counts.values()))

    @property
    def total(self) -> tuple[int, int, int, int]:
        """The numbers of both, gained, lost and neither over all strata."""
        both, gained, lost, neither = (sum(cell) for cell in zip(*self.counts, strict=True)) if self.counts else [0] * 4
        return both, gained, lost, neither

    @property
    def value(self) -> float:
        """The success rate of the arm minus that of the baseline; nan without pairs."""
        n = sum(self.total)
        return (self.total[1] - self.total[2]) / n if n else float("nan")

    def limits(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the interval of the difference, for these tasks.

        Newcombe's hybrid score interval for paired proportions (Statistics in Medicine 17, 1998, method 10): the two
        Wilson intervals, combined with the correlation of the pairs. It stays sensible for few pairs and for rates
        near 0 and 1, where the usual normal interval collapses. Differences between tasks are no chance, since every
        arm runs the same tasks: both arms of the interval are multiplied by the ratio of the standard error within
        strata to that of all pairs as one. With one stratum the ratio is 1.
        """
        both, gained, lost, neither = self.total
        n = both + gained + lost + neither
        if n == 0:
            _check_confidence(confidence)
            return -1.0, 1.0
        first = wilson(both + gained, n, confidence)
        second = wilson(both + lost, n, confidence)
        correlation = _correlation(both, gained, lost, neither)

        def spread(a: float, b: float) -> float:
            return sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

        ratio = sqrt(self.variance() / Pairs((self.total,)).variance())
        low = self.value - ratio * spread(first.value - first.low, second.high - second.value)
        high = self.value + ratio * spread(first.high - first.value, second.value - second.low)
        return max(-1.0, low), min(1.0, high)

    def tango(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return Tango's score interval of the difference, with all pairs in one stratum (Statistics in Medicine 17,
        1998), as other tools report it. If tasks differ it is wider than `limits`; verdicts use `limits`.

        Its ends solve |T(d)| = z, with T(d) = (gained - lost - n d) / sqrt(n (2 q + d (1 - d))) and q the most likely
        share of lost pairs if d is the truth: the larger root of 2 n q^2 + b q - lost d (1 - d), with
        b = (2 n - gained + lost) d - gained - lost.

        Raises:
            PackageMissing: scipy is not installed.
        """
        _, gained, lost, _ = self.total
        n, z = sum(self.total), _quantile(confidence)
        if n == 0:
            return -1.0, 1.0
        brentq = _package("scipy.optimize").brentq

        def outside(d: float) -> float:
            b = (2 * n - gained + lost) * d - gained - lost
            q = (sqrt(max(0.0, b * b + 8 * n * lost * d * (1 - d))) - b) / (4 * n)
            return (gained - lost - n * d) ** 2 - z * z * n * max(0.0, 2 * q + d * (1 - d))

        def limit(end: float) -> float:
            # Just beyond the difference itself, which is also a root if no pair is discordant.
            near = self.value + 1e-9 * (end - self.value)
            return end if outside(near) >= 0.0 else float(brentq(outside, near, end, xtol=1e-12))

        return limit(-1.0), limit(1.0)

    def variance(self) -> float:
        """Return the variance of one pair's difference (+1 gained, -1 lost, 0), within strata; smoothed, so never 0."""
        found, pairs = 0.0, 0.0
        more = _PSEUDO_PAIRS / len(self.counts)
        for both, gained, lost, neither in self.counts:
            n = both + gained + lost + neither + more
            found += gained + lost + more - (gained - lost) ** 2 / n
            pairs += n
        return found / pairs

    def p_not_worse(self, margin: float) -> float:
        """Return the one-sided p-value of "the arm is worse by `margin` or more": small if it is shown not to be.

        It is the level at which the lower limit is -margin, so at .025 it agrees with the 95 % interval. One minus it
        is the p-value of "the arm is not worse by `margin`".
        """
        if not 0.0 < margin < 1.0:
            raise ValueError(f"margin is {margin}; it is a difference of success rates between 0 and 1, such as 0.02.")
        value, normal = self.value, NormalDist()
        if isnan(value) or value == -margin:
            return 0.5
        side = 0 if value > -margin else 1  # which limit comes to -margin as the confidence grows
        low, high = 0.0, 8.0  # in standard normal units
        for _ in range(30):
            z = (low + high) / 2
            limit = self.limits(min(max(2 * normal.cdf(z) - 1, 1e-15), 1 - 1e-15))[side]
            inside = limit > -margin if side == 0 else limit < -margin
            low, high = (z, high) if inside else (low, z)
        tail = 1 - normal.cdf(low)
        return tail if side == 0 else 1 - tail

    def pairs_needed(self, margin: float, level: float = 0.025) -> int | None:
        """Return the number of pairs that decide "worse by `margin` or not" with a chance of `POWER`, if the results so
        far are the truth: at that number the limit keeps that chance's distance from -margin.

        Returns:
            the pairs in all; None if the difference is the margin itself, or a million pairs would not do.
        """
        n, distance = sum(self.total), self.value + margin
        if n == 0 or distance == 0.0:
            return None
        normal = NormalDist()
        share = 1 + normal.inv_cdf(POWER) / normal.inv_cdf(1 - level)

        def decided(pairs: int) -> bool:
            scaled = Pairs(tuple(_scaled(counts, pairs / n) for counts in self.counts))
            low, high = scaled.limits(1 - 2 * level)
            return share * (scaled.value - low if distance > 0 else high - scaled.value) <= abs(distance)

        low, high = 1, _MOST_PAIRS
        if not decided(high):
            return None
        while high - low > max(1, high // 200):
            middle = (low + high) // 2
            low, high = (low, middle) if decided(middle) else (middle, high)
        return high


def _scaled(counts: tuple[int, int, int, int], factor: float) -> tuple[int, int, int, int]:
    both, gained, lost, neither = (round(factor * count) for count in counts)
    return both, gained, lost, neither


def paired_difference(
    baseline: Sequence[bool],
    arm: Sequence[bool],
    confidence: float = 0.95,
    strata: Sequence[Hashable] | None = None,
    interval: str = NEWCOMBE,
) -> PairedDifference:
    """Return the difference in success rate between two arms that ran the same episodes, in the same order.

    Args:
        strata: the task of every pair, so that differences between tasks do not widen the interval (`Pairs.limits`);
            None: all pairs are of one.
        interval: one of `INTERVALS`; Tango's knows no strata.

    Raises:
        ValueError: the lists differ in length, or there is no such interval.
        PackageMissing: scipy is not installed.
    """
    if interval not in INTERVALS:
        raise ValueError(f"interval is {interval!r}; it is one of {', '.join(INTERVALS)}.")
    pairs = Pairs.of(baseline, arm, strata)
    low, high = pairs.tango(confidence) if interval == TANGO else pairs.limits(confidence)
    _, gained, lost, _ = pairs.total
    return PairedDifference(pairs.value, low, high, gained, lost, sum(pairs.total), mcnemar_p(gained, lost))


def _correlation(both: int, gained: int, lost: int, neither: int) -> float:
    """Return Newcombe's continuity-corrected phi coefficient of the 2 x 2 table of pairs."""
    product = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    if product == 0:
        return 0.0
    cross = both * neither - gained * lost
    if cross > 0:
        cross = max(cross - (both + gained + lost + neither) / 2, 0.0)
    return cross / sqrt(product)


def paired_mean_difference(
    baseline: Sequence[float],
    arm: Sequence[float],
    strata: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> MeanDifference | None:
    """Return the mean of arm minus baseline over pairs, with Student's interval from the variance within strata.

    Returns:
        the mean; None if no stratum has two pairs.

    Raises:
        ValueError: the lists differ in length.
        PackageMissing: scipy is not installed.
    """
    _check_confidence(confidence)
    if len(baseline) != len(arm):
        raise ValueError(f"Paired values are needed: the baseline has {len(baseline)} and the arm {len(arm)}.")
    groups: dict[Hashable, list[float]] = {}
    of_pair = [None] * len(arm) if strata is None else strata
    for before, after, stratum in zip(baseline, arm, of_pair, strict=True):
        groups.setdefault(stratum, []).append(after - before)
    n = len(arm)
    freedom = n - len(groups)
    if freedom < 1:
        return None
    value = sum(sum(group) for group in groups.values()) / n
    means = [sum(group) / len(group) for group in groups.values()]
    squares = sum((x - mean) ** 2 for group, mean in zip(groups.values(), means, strict=True) for x in group)
    half = float(_package("scipy.stats").t.ppf(0.5 + confidence / 2, freedom)) * sqrt(squares / freedom / n)
    return MeanDifference(value, value - half, value + half, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given, by statsmodels: each may be compared with the level as if it
    were the only one.

    Raises:
        PackageMissing: statsmodels is not installed.
    """
    if len(p_values) < 2:
        return list(p_values)
    adjusted = _package("statsmodels.stats.multitest").multipletests(list(p_values), method="holm")[1]
    return [float(p) for p in adjusted]


def solved_within(steps: Sequence[float], solved: Sequence[bool]) -> list[tuple[float, float]]:
    """Return the time to success: (steps, share of episodes solved within them), rising; failures count as not solved
    up to their last step (Kaplan and Meier's estimate, by scipy).

    Raises:
        PackageMissing: scipy is not installed.
    """
    times = [time for time, done in zip(steps, solved, strict=True) if done]
    if not times:
        return []
    stats = _package("scipy.stats")
    ended = [time for time, done in zip(steps, solved, strict=True) if not done]
    curve = stats.ecdf(stats.CensoredData(uncensored=times, right=ended)).cdf
    known = set(times)
    pairs = zip(curve.quantiles, curve.probabilities, strict=True)
    return [(float(time), float(share)) for time, share in pairs if time in known]


def steps_until(curve: Sequence[tuple[float, float]], share: float) -> float | None:
    """Return the steps within which `share` of the episodes were solved, from `solved_within`; None if fewer ever
    were.
    """
    return next((steps for steps, reached in curve if reached >= share - 1e-12), None)


def percentile(values: Sequence[float], q: float) -> float:
    """Return the q-th percentile (0 to 100) with linear interpolation; nan for no values."""
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
    """Return the interval of the median between two of the values themselves, by the binomial test: exact for any
    distribution. None if there are too few values for one (fewer than 6 at 95 %).
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
