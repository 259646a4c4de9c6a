"""The arithmetic of the charts: round ticks, means, thinning, paths."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.report.charts import (
    BUCKETS,
    SIDE,
    Axis,
    axis_to,
    dots,
    line,
    short,
    smooth,
    thin,
    window_of,
)


@settings(deadline=None)
@given(st.floats(1e-6, 1e12), st.integers(3, 10))
def test_ticks_are_few_round_and_on_the_axis(high: float, about: int) -> None:
    ticks = Axis(0, high).round_values(about)
    assert ticks[0] == 0
    assert ticks[-1] <= high * (1 + 1e-6)
    assert about // 2.5 <= len(ticks) - 1 <= about
    gap = ticks[1]
    mantissa = gap / 10 ** math.floor(math.log10(gap) + 1e-9)
    assert min(abs(mantissa - unit) for unit in (1, 2, 5, 10)) < 1e-6
    np.testing.assert_allclose(np.diff(ticks), gap, rtol=1e-6)


def test_ticks_of_familiar_axes() -> None:
    assert Axis(0, 100).round_values(5) == [0, 20, 40, 60, 80, 100]
    assert Axis(0, 64000).round_values(5) == [0, 20000, 40000, 60000]
    assert Axis(0, 2.3).round_values(5) == [0, 0.5, 1, 1.5, 2]


@settings(deadline=None)
@given(st.floats(1e-6, 1e12))
def test_axis_ends_at_a_tick_not_far_above(most: float) -> None:
    axis = axis_to(most)
    assert most * (1 - 1e-6) <= axis.high <= 2 * most
    assert axis.round_values(5)[-1] == pytest.approx(axis.high)


@pytest.mark.parametrize("most", [0.0, -1.0, math.nan, math.inf])
def test_axis_of_nothing(most: float) -> None:
    assert axis_to(most) == Axis(0, 1)


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
    """Of uniform noise the middle nine tenths are 0.05..0.95 everywhere."""
    count = 200_000
    x, y = thin(np.arange(float(count)), np.random.default_rng(0).random(count))
    assert len(x) == len(y) == 2 * BUCKETS
    assert np.all(np.diff(x[::2]) > 0)
    np.testing.assert_allclose(y[::2], 0.05, atol=0.05)
    np.testing.assert_allclose(y[1::2], 0.95, atol=0.05)


def test_line_runs_from_corner_to_corner() -> None:
    path = line(np.array([0.0, 10.0]), np.array([0.0, 4.0]), (Axis(0, 10), Axis(0, 4)), "look").path
    assert path == f"M0.0 {SIDE}.0L{SIDE}.0 0.0"


def test_line_stays_inside_and_small() -> None:
    x, y = np.arange(100_000.0), np.full(100_000, 9.0)
    drawn = line(x, y, (Axis(0, 100_000), Axis(0, 3)), "look")
    assert drawn.path.count("L") == BUCKETS - 1
    assert all(point.endswith(" 0.0") for point in drawn.path[1:].split("L"))


def test_line_of_nothing_is_empty() -> None:
    nothing = np.array([np.nan])
    assert line(nothing, nothing, (Axis(0, 1), Axis(0, 1)), "look").path == ""


def test_dots_are_thinned_but_the_last_stays() -> None:
    count = 3 * BUCKETS
    x = np.arange(float(count))
    drawn = dots(x, x, (Axis(0, count), Axis(0, count)), "look", [f"{n}" for n in range(count)])
    assert len(drawn) == BUCKETS
    assert drawn[-1].hint == f"{count - 1}"


def test_window_is_odd_and_grows() -> None:
    assert [window_of(rows) for rows in (1, 99, 500, 200_000)] == [1, 1, 11, 4001]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.05, "0.05"),
        (250, "250"),
        (12_000, "12k"),
        (1_281_167, "1.28M"),
        (3e9, "3G"),
        (999, "999"),
    ],
)
def test_short(value: float, text: str) -> None:
    assert short(value) == text
