"""The arithmetic of the curves: means and thinning."""

import numpy as np
import pytest

from cluster.report.curves import choose_window, smooth, thin
from pipeline.tools.charts import MOST_POINTS


def test_smooth_is_the_mean_of_neighbours() -> None:
    values = np.random.default_rng(0).normal(size=100)
    expected = np.convolve(values, np.ones(7) / 7, mode="valid")
    np.testing.assert_allclose(smooth(values, 7)[3:-3], expected)
    assert smooth(values, 7)[0] == pytest.approx(values[:4].mean())
    assert smooth(values, 7)[-1] == pytest.approx(values[-4:].mean())


def test_smooth_leaves_out_what_is_not_known() -> None:
    values = np.array([1.0, np.nan, 3.0, np.nan, np.nan, np.nan])
    np.testing.assert_allclose(smooth(values, 3), [1, 2, 3, 3, np.nan, np.nan])


def test_short_runs_are_not_thinned() -> None:
    x, y = np.arange(5.0), np.array([1.0, np.nan, 3.0, 4.0, 5.0])
    thin_x, thin_y = thin(x, y)
    assert thin_x.tolist() == [0, 2, 3, 4]
    assert thin_y.tolist() == [1, 3, 4, 5]


def test_thinning_keeps_the_spread() -> None:
    """The middle nine tenths of uniform noise are 0.05..0.95 everywhere."""
    count = 200_000
    x, y = thin(np.arange(float(count)), np.random.default_rng(0).random(count))
    assert len(x) == len(y) == MOST_POINTS
    assert np.all(np.diff(x[::2]) > 0)
    np.testing.assert_allclose(y[::2], 0.05, atol=0.05)
    np.testing.assert_allclose(y[1::2], 0.95, atol=0.05)


def test_window_is_odd_and_grows() -> None:
    assert [choose_window(rows) for rows in (1, 99, 500, 200_000)] == [1, 1, 11, 4001]
