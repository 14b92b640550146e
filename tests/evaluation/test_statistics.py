"""Intervals, tests and verdicts: against published examples, against scipy and statsmodels, and by simulation."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from vla_pruner import statistics
from vla_pruner.statistics import (
    PackageMissing,
    Pairs,
    holm,
    mcnemar_p,
    paired_difference,
    paired_mean_difference,
    solved_within,
    steps_until,
    wilson,
)

scipy_stats = pytest.importorskip("scipy.stats")
multitest = pytest.importorskip("statsmodels.stats.multitest")


def test_wilson_and_mcnemar_are_those_of_statsmodels() -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    for successes, total in product(range(0, 30, 7), (30, 200)):
        for confidence in (0.9, 0.95):
            rate = wilson(successes, total, confidence)
            assert (rate.low, rate.high) == pytest.approx(
                proportion.proportion_confint(successes, total, 1 - confidence, "wilson"), abs=1e-12
            )
    for gained, lost in product(range(1, 12, 3), range(0, 20, 4)):
        assert mcnemar_p(gained, lost) == pytest.approx(
            tables.mcnemar([[50, lost], [gained, 20]], exact=True).pvalue, rel=1e-9
        )


def test_wilson_is_scipys_to_the_last_bit() -> None:
    generator = np.random.default_rng(0)
    for total in (1, 2, 7, 48, 200, 1500):
        for confidence in (1e-15, *generator.random(3), 0.95, 1 - 1e-12):
            for successes in {0, 1, total // 3, total - 1, total}:
                limits = scipy_stats.binomtest(successes, total).proportion_ci(confidence, method="wilson")
                rate = wilson(successes, total, confidence)
                assert (rate.low, rate.high) == (float(limits.low), float(limits.high))


def test_mcnemar_matches_its_documented_example() -> None:
    # statsmodels' example of two measurements of the same subjects: 59 and 6 discordant of 101 + 59 + 6 + 33? The
    # exact test needs the discordant alone: scipy's binomtest(6, 65).
    assert mcnemar_p(6, 59) == pytest.approx(scipy_stats.binomtest(6, 65, 0.5).pvalue)
    # Agresti, Categorical Data Analysis, approval of a prime minister: 86 and 150, z = -4.17.
    assert mcnemar_p(86, 150) == pytest.approx(3.7e-5, rel=0.02)


def test_holm_matches_its_published_steps() -> None:
    # Holm, Scandinavian Journal of Statistics 6 (1979): the smallest times m, the next times m - 1, never falling.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_one_stratum_is_newcombes_published_interval() -> None:
    # Newcombe, Statistics in Medicine 17 (1998) 2635-2650, method 10: 36 both, 12 and 2 discordant, 0 neither.
    assert Pairs(((36, 12, 2, 0),)).limits() == pytest.approx((0.0569, 0.3404), abs=5e-5)
    baseline, arm = [True] * 36 + [False] * 12 + [True] * 2, [True] * 48 + [False] * 2
    assert paired_difference(baseline, arm, strata=["a"] * 50) == paired_difference(baseline, arm)


def test_strata_that_differ_narrow_the_interval_and_equal_ones_do_not() -> None:
    differing, alike = Pairs(((0, 0, 50, 0), (0, 30, 0, 20))), Pairs(((20, 5, 5, 20), (20, 5, 5, 20)))
    for pairs, narrower in ((differing, 0.8), (alike, 1.01)):
        whole = Pairs((pairs.total,)).limits()
        low, high = pairs.limits()
        assert low <= pairs.value <= high
        assert (high - low) / (whole[1] - whole[0]) < narrower
    low, high = alike.limits()
    whole = Pairs((alike.total,)).limits()
    assert (high - low) / (whole[1] - whole[0]) == pytest.approx(1.0, abs=0.01)


def _draw(cells: list[tuple[float, float, float, float]], n: int, runs: int, seed: int) -> list[Pairs]:
    generator = np.random.default_rng(seed)
    drawn = np.stack([generator.multinomial(n, cell, runs) for cell in cells], axis=1)
    return [Pairs(tuple(tuple(map(int, counts)) for counts in run)) for run in drawn]  # type: ignore[misc]


ALIKE = [(0.93, 0.01, 0.03, 0.03)] * 8
"""Both, gained, lost, neither in each of 8 tasks: a loss of 2 points."""
ONE_BAD = [(0.97, 0.01, 0.01, 0.01)] * 7 + [(0.5, 0.02, 0.34, 0.14)]
"""No loss in 7 tasks, 32 points in one: 4 in all."""
NOISY = [(0.6, 0.1, 0.1, 0.2)] * 8


@pytest.mark.parametrize(("cells", "n"), [(ALIKE, 50), (ONE_BAD, 50), (NOISY, 10), (NOISY, 50), (ALIKE, 10)])
def test_the_interval_of_strata_covers_the_truth(cells: list[tuple[float, float, float, float]], n: int) -> None:
    truth = sum(cell[1] - cell[2] for cell in cells) / len(cells)
    limits = [pairs.limits() for pairs in _draw(cells, n, 2000, 1)]
    above = sum(low > truth for low, _ in limits) / len(limits)
    below = sum(high < truth for _, high in limits) / len(limits)
    # 2000 draws of a chance of 2.5 % have a standard error of .35 %.
    assert above < 0.036
    assert below < 0.036
    if n == 50:
        assert above + below > 0.02, "far too wide"


@pytest.mark.parametrize("cells", [ALIKE, NOISY])
def test_the_verdict_errs_as_often_as_it_says(cells: list[tuple[float, float, float, float]]) -> None:
    """At a margin that is the true loss, "not worse" is wrong, and so is "worse": each in at most 2.5 % of runs."""
    truth = sum(cell[1] - cell[2] for cell in cells) / len(cells)
    margin = -truth if truth < 0 else 0.02
    shifted = cells if truth < 0 else [(b - 0.02, g, lo + 0.02, ne) for b, g, lo, ne in cells]
    limits = [pairs.limits() for pairs in _draw(shifted, 50, 2000, 2)]  # what the p-value agrees with; see below
    assert sum(low > -margin for low, _ in limits) / len(limits) < 0.036
    assert sum(high < -margin for _, high in limits) / len(limits) < 0.036


@pytest.mark.parametrize("counts", [(90, 2, 3, 5), (300, 1, 9, 10), (40, 20, 0, 40), (10, 0, 60, 30), (50, 0, 0, 0)])
@pytest.mark.parametrize("margin", [0.02, 0.05, 0.2])
def test_the_p_value_agrees_with_the_interval(counts: tuple[int, int, int, int], margin: float) -> None:
    pairs = Pairs((counts, (20, 1, 1, 3)))
    p = pairs.p_not_worse(margin)
    for confidence in (0.5, 0.8, 0.95, 0.99):
        low, high = pairs.limits(confidence)
        assert (low > -margin) == (p < (1 - confidence) / 2)
        assert (high < -margin) == (1 - p < (1 - confidence) / 2)


def test_the_p_value_at_its_ends() -> None:
    assert Pairs(()).p_not_worse(0.02) == 0.5
    assert Pairs(((1000, 1000, 0, 0),)).p_not_worse(0.02) < 1e-9
    assert Pairs(((1000, 0, 1000, 0),)).p_not_worse(0.02) > 1 - 1e-9
    with pytest.raises(ValueError, match="margin is 2"):
        Pairs(()).p_not_worse(2)


def test_pairs_needed_is_the_textbooks_number_where_that_holds() -> None:
    # A margin of 2 points at 2 % discordance needs 310 pairs one-sided at .05 by the normal approximation; Newcombe's
    # interval is a little wider for so few. With many pairs they agree.
    pairs = Pairs(((49_000, 1_000, 1_000, 49_000),))
    needed = pairs.pairs_needed(0.02, level=0.05)
    assert needed is not None
    assert 310 < needed < 400
    assert pairs.pairs_needed(0.002) == pytest.approx(0.02 * ((1.959964 + 0.841621) / 0.002) ** 2, rel=0.02)
    assert Pairs(((96, 0, 2, 2),)).pairs_needed(0.02) is None, "it is the margin itself"
    assert Pairs(((980, 0, 20_001, 979_019),)).pairs_needed(0.02) is None, "too many to be of use"
    assert Pairs(()).pairs_needed(0.02) is None


@pytest.mark.parametrize("counts", [(930, 10, 30, 30), (700, 50, 150, 100)])
def test_pairs_needed_are_enough(counts: tuple[int, int, int, int]) -> None:
    needed = Pairs((counts,)).pairs_needed(0.05)
    assert needed is not None
    drawn = _draw([tuple(count / 1000 for count in counts)], needed, 1000, 3)  # type: ignore[list-item]
    worse = counts[2] - counts[1] > 50
    decided = [pairs.limits()[1] < -0.05 if worse else pairs.limits()[0] > -0.05 for pairs in drawn]
    assert 0.7 < sum(decided) / len(decided) < 0.9


def test_the_mean_difference_is_the_paired_t_test_within_strata() -> None:
    before, after = [3.0, 5.0, 4.0, 8.0, 7.0], [4.0, 5.5, 6.0, 8.0, 9.5]
    found = paired_mean_difference(before, after)
    expected = scipy_stats.ttest_rel(after, before).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    apart = paired_mean_difference([0.0] * 6, [1, 1.1, 0.9, 9, 9.1, 8.9], ["a"] * 3 + ["b"] * 3)
    assert apart is not None
    assert (apart.value, apart.high - apart.low < 0.5) == (pytest.approx(5.0), True)
    assert paired_mean_difference([1.0], [2.0]) is None
    with pytest.raises(ValueError, match="baseline has 1 and the arm 2"):
        paired_mean_difference([1.0], [2.0, 3.0])


def test_the_mean_difference_covers_the_truth() -> None:
    generator = np.random.default_rng(4)
    missed = 0
    for _ in range(1000):
        shifts = np.repeat([-3.0, 0.0, 6.0], 12)
        values = generator.gamma(2.0, 2.0, 36) - 4.0 + shifts
        found = paired_mean_difference([0.0] * 36, values.tolist(), shifts.tolist())
        assert found is not None
        missed += not found.low <= 1.0 <= found.high
    assert 0.025 < missed / 1000 < 0.075


def test_time_to_success_counts_failures_as_unsolved() -> None:
    curve = solved_within([5, 9, 5, 40, 12, 40], [True, True, True, False, True, False])
    assert curve == [(5.0, pytest.approx(2 / 6)), (9.0, pytest.approx(3 / 6)), (12.0, pytest.approx(4 / 6))]
    assert steps_until(curve, 0.5) == 9.0
    assert steps_until(curve, 0.7) is None
    assert solved_within([3, 4], [False, False]) == []
    # One that was cut off at 6 may have been solved later: scipy's estimator shares its weight among those after it.
    assert solved_within([5, 6, 9], [True, False, True]) == [(5.0, pytest.approx(1 / 3)), (9.0, pytest.approx(1.0))]


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(statistics.importlib, "import_module", missing)
    with pytest.raises(
        PackageMissing, match=r"need scipy, which is not installed; run: pip install 'vla-pruner\[eval\]'"
    ):
        wilson(1, 3)
    with pytest.raises(PackageMissing, match="need statsmodels"):
        holm([0.1, 0.2])
    assert math.isnan(wilson(0, 0).value), "nothing to compute"
