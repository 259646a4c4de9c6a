"""Scores of kernels: known images, noise, and SciPy as the oracle of the comparison."""

from __future__ import annotations

import numpy as np
import pytest
import scipy  # it imports scipy.stats where that is used

from cluster.report.kernels import (
    GREY_OF_NOISE,
    ORIENTATION_OF_NOISE,
    score_kernels,
    separate_columns,
)

DOWN, ACROSS = np.mgrid[-5:6, -5:6].astype(np.float32)
GREY, OPPONENT = np.ones(3), np.array([1.0, -1.0, 0.0])


def kernel(pattern: np.ndarray, hue: np.ndarray = GREY) -> np.ndarray:
    return (hue[:, None, None] * pattern)[None].astype(np.float32)


def grating(degrees: float, period: float = 5.0) -> np.ndarray:
    turned = np.deg2rad(degrees)
    return np.sin(2 * np.pi * (ACROSS * np.cos(turned) + DOWN * np.sin(turned)) / period)


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 11, 11)).astype(np.float32)


@pytest.mark.parametrize(
    ("hue", "colour"),
    [(GREY, 0), (OPPONENT, 1), (np.array([1.0, 0, 0]), 2 / 3), (np.array([2.0, 1, 0]), 0.4)],
)
def test_colour_is_the_share_of_energy_off_the_grey_axis(hue, colour):
    pattern = grating(30)
    (found,) = score_kernels(kernel(pattern, hue)).colour
    assert found == pytest.approx(colour, abs=1e-6)
    assert score_kernels(-7e-3 * kernel(pattern, hue)).colour[0] == pytest.approx(colour, abs=1e-6)


@pytest.mark.parametrize("hue", [GREY, OPPONENT])
@pytest.mark.parametrize("degrees", [0, 30, 45, 90, 117])
def test_a_grating_of_any_angle_and_hue_is_oriented_and_concentrated(degrees, hue):
    found = score_kernels(kernel(grating(degrees), hue))
    assert found.orientation[0] > 0.9
    assert found.concentration[0] > 0.3
    assert found.shaped[0]


def test_a_blob_is_concentrated_but_not_oriented():
    found = score_kernels(kernel(np.exp(-(DOWN**2 + ACROSS**2) / 12), OPPONENT))
    assert found.orientation[0] < 1e-6
    assert found.concentration[0] > 0.8


def test_noise_has_the_scores_that_the_pages_say_it_has():
    found = score_kernels(noise(4000, seed=1))
    assert found.colour.mean() == pytest.approx(GREY_OF_NOISE, abs=0.005)
    assert np.median(found.orientation) == pytest.approx(ORIENTATION_OF_NOISE, abs=0.005)
    assert np.median(found.concentration) == pytest.approx(0.11, abs=0.01)
    assert 0.002 < found.shaped.mean() < 0.03


def test_a_kernel_of_nought_has_no_scores():
    found = score_kernels(np.zeros((2, 3, 11, 11), np.float32))
    assert found.colour.tolist() == found.orientation.tolist() == [0, 0]
    assert not found.shaped.any()


@pytest.mark.parametrize("shift", [0.0, 0.5, -2.0])
def test_apart_is_the_u_of_mann_and_whitney(shift):
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=48), rng.normal(size=40).round(1) + shift
    a[:5] = b[:5]  # ties
    found = separate_columns(a, b)
    assert found is not None
    share = scipy.stats.mannwhitneyu(a, b).statistic / (48 * 40)
    assert found.apart == pytest.approx(max(share, 1 - share))
    assert found.ahead == ("a" if share > 0.5 else "b")
    # Its normal approximation; the splits are drawn.
    assert found.p == pytest.approx(scipy.stats.mannwhitneyu(a, b).pvalue, abs=0.02)
    assert found.is_significant == (shift == -2.0)


def test_p_is_that_of_all_splits_of_a_few():
    a, b = np.array([0.1, 0.4, 0.9, 0.8]), np.array([0.2, 0.3, 0.05, 0.6])

    def apart(x: np.ndarray, y: np.ndarray) -> float:
        share = (x[:, None] > y).mean()
        return float(max(share, 1 - share))

    exact = scipy.stats.permutation_test((a, b), apart, alternative="greater").pvalue
    found = separate_columns(a, b)
    assert found is not None
    assert found.p == pytest.approx(exact, abs=0.025)


def test_a_random_split_is_rarely_told_apart():
    rng = np.random.default_rng(0)
    told = [
        one.is_significant
        for _ in range(60)
        if (one := separate_columns(rng.random(48), rng.random(48)))
    ]
    assert sum(told) <= 9  # 3 expected; more than 9 once in two thousand


def test_columns_without_kernels_are_not_compared():
    assert separate_columns(np.array([]), np.array([1.0])) is None
