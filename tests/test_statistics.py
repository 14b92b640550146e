"""Intervals against published values and against brute force."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest

from vla_pruner.statistics import NEWCOMBE, TANGO, Pairs, mcnemar_p, paired_difference, percentile, wilson


def _pairs(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    """(baseline, arm) outcomes with these counts."""
    arm = [True] * both + [True] * gained + [False] * lost + [False] * neither
    baseline = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return baseline, arm


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_the_published_table(successes: int, total: int, low: float, high: float) -> None:
    rate = wilson(successes, total)
    assert rate.value == successes / total
    assert (round(rate.low, 4), round(rate.high, 4)) == (low, high)


def test_wilson_is_symmetric_and_holds_its_value() -> None:
    for total in range(1, 40):
        for successes in range(total + 1):
            rate, mirrored = wilson(successes, total), wilson(total - successes, total)
            assert 0.0 <= rate.low <= rate.value <= rate.high <= 1.0
            assert rate.low == pytest.approx(1 - mirrored.high)


def test_wilson_without_trials_knows_nothing() -> None:
    rate = wilson(0, 0)
    assert math.isnan(rate.value)
    assert (rate.low, rate.high) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "total"), [(-1, 4), (5, 4)])
def test_wilson_refuses_impossible_counts(successes: int, total: int) -> None:
    with pytest.raises(ValueError, match="impossible"):
        wilson(successes, total)


def test_wilson_refuses_an_impossible_confidence() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson(1, 2, confidence=95)


def test_tangos_interval_is_what_the_score_test_does_not_refuse() -> None:
    """At the interval's ends the score statistic is 1.96, with the nuisance share from a search over the likelihood."""
    from scipy.optimize import minimize_scalar

    for both, gained, lost, neither in [(36, 12, 2, 0), (176, 17, 7, 0), (1, 1, 7, 12), (0, 5, 0, 1), (3, 4, 4, 3)]:
        n, pairs = both + gained + lost + neither, Pairs(((both, gained, lost, neither),))

        def cost(share: float, d: float, counts: tuple[int, int, int] = (gained, lost, both + neither)) -> float:
            shares = (share + d, share, 1 - 2 * share - d)
            return -sum(count * math.log(max(p, 1e-300)) for count, p in zip(counts, shares, strict=True) if count)

        for d in pairs.tango():
            found: Any = minimize_scalar(
                cost, bounds=(max(0.0, -d), (1 - d) / 2), args=(d,), method="bounded", options={"xatol": 1e-12}
            )
            variance = n * (2 * found.x + d * (1 - d))
            assert abs(gained - lost - n * d) / math.sqrt(variance) == pytest.approx(1.959964, abs=1e-4)


def test_tangos_interval_at_its_edges() -> None:
    # Two other implementations (fieldtrial 0.3.0, robostats 0.2.0) return the same.
    low, high = Pairs(((176, 17, 7, 0),)).tango()
    assert (round(low, 4), round(high, 4)) == (0.0021, 0.1021)
    mirrored = Pairs(((176, 7, 17, 0),)).tango()
    assert mirrored == pytest.approx((-high, -low))
    z = 1.959964
    low, high = Pairs(((50, 0, 0, 0),)).tango()
    assert (low, high) == pytest.approx((-z * z / (50 + z * z), z * z / (50 + z * z)), abs=1e-6)
    assert Pairs(((0, 4, 0, 0),)).tango()[1] == 1.0
    assert Pairs(()).tango() == (-1.0, 1.0)


def test_the_interval_of_a_difference_is_the_one_that_was_asked_for() -> None:
    outcomes = _pairs(176, 17, 7, 0)
    tango, newcombe = (paired_difference(*outcomes, interval=name) for name in (TANGO, NEWCOMBE))
    assert (round(tango.low, 4), round(tango.high, 4)) == (0.0021, 0.1021)
    assert newcombe == paired_difference(*outcomes)
    assert (tango.value, tango.gained, tango.lost, tango.p_value) == (0.05, 17, 7, newcombe.p_value)
    wide = paired_difference(*outcomes, confidence=0.99, interval=TANGO)
    assert wide.low < tango.low < tango.high < wide.high
    with pytest.raises(ValueError, match=r"interval is 'wald'; it is one of newcombe, tango"):
        paired_difference(*outcomes, interval="wald")


def test_paired_interval_matches_the_published_example() -> None:
    # Newcombe, Statistics in Medicine 17 (1998) 2635-2650, method 10: 36 both, 12 and 2 discordant, 0 neither.
    difference = paired_difference(*_pairs(36, 12, 2, 0))
    assert difference.value == pytest.approx(0.2)
    assert (round(difference.low, 4), round(difference.high, 4)) == (0.0569, 0.3404)


@pytest.mark.parametrize("cells", [(0.7, 0.1, 0.1, 0.1), (0.85, 0.02, 0.08, 0.05), (0.3, 0.1, 0.4, 0.2)])
def test_paired_interval_covers_the_truth(cells: tuple[float, float, float, float]) -> None:
    """The exact probability, over all tables of 24 pairs, that the interval holds the true difference."""
    n, truth, coverage = 24, cells[1] - cells[2], 0.0
    for both, gained, lost in product(range(n + 1), repeat=3):
        neither = n - both - gained - lost
        if neither < 0:
            continue
        counts = (both, gained, lost, neither)
        ways = math.factorial(n) / math.prod(math.factorial(count) for count in counts)
        chance = ways * math.prod(p**count for p, count in zip(cells, counts, strict=True))
        difference = paired_difference(*_pairs(*counts))
        coverage += chance * (difference.low <= truth <= difference.high)
    assert 0.93 < coverage <= 0.995


def test_paired_difference_is_antisymmetric_and_contains_its_value() -> None:
    for table in product(range(4), repeat=4):
        if sum(table) == 0:
            continue
        baseline, arm = _pairs(*table)
        forward, backward = paired_difference(baseline, arm), paired_difference(arm, baseline)
        assert -1.0 <= forward.low <= forward.value <= forward.high <= 1.0
        assert (forward.gained, forward.lost) == (backward.lost, backward.gained) == (table[1], table[2])
        assert forward.low == pytest.approx(-backward.high)
        assert forward.p_value == backward.p_value


def test_within_noise_follows_the_interval() -> None:
    assert paired_difference(*_pairs(10, 1, 1, 0)).within_noise
    assert not paired_difference(*_pairs(10, 0, 20, 2)).within_noise


def test_paired_difference_needs_pairs() -> None:
    with pytest.raises(ValueError, match="baseline has 1 outcomes and the arm 2"):
        paired_difference([True], [True, False])
    empty = paired_difference([], [])
    assert math.isnan(empty.value)
    assert (empty.low, empty.high, empty.p_value) == (-1.0, 1.0, 1.0)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(0, 6) == 2 / 64
    assert mcnemar_p(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar_p(3, 3) == 1.0
    with pytest.raises(ValueError, match="negative"):
        mcnemar_p(-1, 2)


def test_percentile_interpolates() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0], 99) == pytest.approx(1.99)
    assert percentile([7.0], 99) == 7.0
    assert math.isnan(percentile([], 50))
    with pytest.raises(ValueError, match="between 0 and 100"):
        percentile([1.0], 101)
