"""Spread, differences and their margins: against numbers computed by hand from t tables."""

from __future__ import annotations

import warnings

import pytest

from cluster.experiments.evidence.significance import (
    Spread,
    compare_groups,
    compare_pairs,
    compute_binomial_margin,
    format_points,
)

ONE, OTHER = Spread((0.40, 0.42, 0.41)), Spread((0.45, 0.44))
T_975 = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 10: 2.22814, 22: 2.07387}
"""Student's t for a two-sided 95 % interval, by degrees of freedom, from printed tables."""


@pytest.mark.parametrize("freedom", T_975)
def test_margin_over_seeds_is_that_of_the_t_tables(freedom):
    # Two groups with the values -1 and 1 in turn: both have the same variance.
    ours = Spread(tuple((-1.0) ** seed for seed in range(freedom // 2 + 1)))
    theirs = Spread(tuple((-1.0) ** seed for seed in range(freedom + 1 - freedom // 2)))
    sizes = len(ours.values), len(theirs.values)
    squares = sum(sum((value - one.mean) ** 2 for value in one.values) for one in (ours, theirs))
    expected = T_975[freedom] * (squares / freedom * (1 / sizes[0] + 1 / sizes[1])) ** 0.5
    assert compare_groups(ours, theirs, None).margin == pytest.approx(expected, rel=1e-5)


def test_a_difference_of_two_groups():
    found = compare_groups(ONE, OTHER, 10**9)
    # Variances 1e-4 (3 seeds) and 5e-5 (2): pooled 2.5e-4 / 3; 3.18245 * sqrt(2.5e-4/3 * 5/6).
    assert found.value == pytest.approx(-0.035)
    assert found.margin == pytest.approx(0.0265204, rel=1e-5)
    assert found.is_significant


def test_a_group_of_one_seed_has_the_spread_of_the_other():
    found = compare_groups(Spread((0.4,)), Spread((0.5, 0.51)), 10**9)
    # 12.7062 * sqrt(5e-5 * (1 + 1/2))
    assert found.margin == pytest.approx(0.110039, rel=1e-5)


def test_few_images_widen_the_margin():
    found = compare_groups(ONE, OTHER, 100)
    # 1.959964 * sqrt((0.41 * 0.59 + 0.445 * 0.555) / 100)
    assert found.margin == pytest.approx(0.1370399, rel=1e-5)
    assert found.margin == compute_binomial_margin(0.41, 0.445, 100)
    assert not found.is_significant


def test_numbers_that_are_no_errors_have_no_binomial_margin():
    found = compare_groups(Spread((1e5, 1.1e5)), Spread((3e5, 3.2e5)), None)
    # Variances 5e7 and 2e8, pooled 1.25e8: 4.30265 * sqrt(1.25e8).
    assert found.margin == pytest.approx(48105.1, rel=1e-5)


def test_seeds_that_do_not_differ_have_no_margin_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare_groups(Spread((0.4, 0.4)), Spread((0.5, 0.5)), None).margin == 0
        assert compare_pairs([0.4] * 3, [0.5] * 3, 0.0).margin == 0


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
    assert compare_groups(Spread(ours), Spread(theirs), 10**6).judge(expected) == verdict


def test_what_the_same_networks_have_in_common_cancels():
    ones, tens = [0.40, 0.50, 0.60], [0.39, 0.488, 0.591]
    found = compare_pairs(tens, ones, 0.0)
    # Changes -0.010, -0.012, -0.009: deviation 0.00152753; 4.30265 * 0.00152753 / sqrt(3).
    assert found.value == pytest.approx(-0.0310 / 3)
    assert found.margin == pytest.approx(0.00379458, rel=1e-5)
    assert compare_pairs(tens, ones, 0.05).margin == 0.05
    assert compare_pairs(tens[:1], ones[:1], 0.05).margin == 0.05
    assert not compare_groups(Spread(tuple(tens)), Spread(tuple(ones)), 10**9).is_significant


def test_how_it_is_written():
    assert str(ONE) == "41.0 ± 1.0 %"
    assert str(Spread((0.5,))) == "50.0 %"
    assert format_points(-0.0149) == "−1.5"
    assert str(compare_groups(Spread((0.4,)), Spread((0.5,)), 10)) == "−10.0 points"
