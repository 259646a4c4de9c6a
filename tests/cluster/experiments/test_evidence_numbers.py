"""What a difference is worth: SciPy is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from cluster.experiments.evidence.significance import (
    Spread,
    counting,
    difference,
    paired,
    signed,
    student,
)

ONE, OTHER = Spread((0.40, 0.42, 0.41)), Spread((0.45, 0.44))


def test_student_is_that_of_the_tables():
    for freedom in range(1, 11):
        exact = scipy.stats.t.ppf(0.975, freedom)
        assert student(freedom) == pytest.approx(exact, abs=0.006)
    assert student(50) > scipy.stats.t.ppf(0.975, 50)


def test_margin_over_seeds_is_that_of_a_t_test():
    found = difference(ONE, OTHER, 10**9)
    low, high = scipy.stats.ttest_ind(ONE.values, OTHER.values).confidence_interval()
    assert found.value == pytest.approx((low + high) / 2)
    assert found.margin == pytest.approx((high - low) / 2, rel=2e-3)
    assert found.telling == (high < 0)


def test_few_images_widen_the_margin():
    found = difference(ONE, OTHER, 100)
    assert found.margin == pytest.approx(counting(0.41, 0.445, 100))
    spread = np.hypot(np.sqrt(0.41 * 0.59 / 100), np.sqrt(0.445 * 0.555 / 100))
    assert found.margin == pytest.approx(scipy.stats.norm.ppf(0.975) * spread, rel=1e-3)
    assert not found.telling


def test_numbers_that_are_no_errors_have_no_binomial_margin():
    found = difference(Spread((1e5, 1.1e5)), Spread((3e5, 3.2e5)), None)
    low, high = scipy.stats.ttest_ind((1e5, 1.1e5), (3e5, 3.2e5)).confidence_interval()
    assert found.margin == pytest.approx((high - low) / 2, rel=2e-3)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected", "verdict"),
    [
        ((0.40, 0.401), (0.45, 0.451), -0.01, "as the paper says"),
        ((0.45, 0.451), (0.40, 0.401), -0.01, "contrary to the paper"),
        ((0.40, 0.401), (0.45, 0.451), None, "lower error"),
        ((0.45, 0.451), (0.40, 0.401), None, "higher error"),
        ((0.40, 0.44), (0.41, 0.45), -0.01, "cannot be told from chance"),
        ((0.40,), (0.45,), -0.01, "no verdict: one seed each"),
    ],
)
def test_verdicts(ours, theirs, expected, verdict):
    assert difference(Spread(ours), Spread(theirs), 10**6).verdict(expected) == verdict


def test_what_the_same_networks_have_in_common_cancels():
    ones, tens = [0.40, 0.50, 0.60], [0.39, 0.488, 0.591]
    found = paired(tens, ones, 0.0)
    low, high = scipy.stats.ttest_rel(tens, ones).confidence_interval()
    assert found.value == pytest.approx((low + high) / 2)
    assert found.margin == pytest.approx((high - low) / 2, rel=2e-3)
    assert paired(tens, ones, 0.05).margin == 0.05
    assert paired(tens[:1], ones[:1], 0.05).margin == 0.05
    assert not difference(Spread(tuple(tens)), Spread(tuple(ones)), 10**9).telling


def test_how_it_is_written():
    assert str(ONE) == "41.0 ± 1.0 %"
    assert str(Spread((0.5,))) == "50.0 %"
    assert signed(-0.0149) == "−1.5"
    assert str(difference(Spread((0.4,)), Spread((0.5,)), 10)) == "−10.0 points"
