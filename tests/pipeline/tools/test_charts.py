"""Charts: limits of axes, what is drawn of many points, and SVG that stands alone."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tools import charts
from pipeline.tools.charts import (
    CHECK,
    INK,
    MOST_POINTS,
    SERIES,
    Bar,
    as_chart,
    bar_list,
    draw_columns,
    draw_dots,
    draw_line,
    draw_mark,
    name_axis,
    new_axes,
    round_up,
)


def points_of(svg: str, color: str) -> list[list[tuple[float, float]]]:
    """The points of each path of a color, in pixels of the chart."""
    paths = re.findall(rf'<path d="([^"]*)" style="[^"]*{re.escape(color)}', svg)
    return [
        [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
        for path in paths
    ]


@settings(deadline=None)
@given(st.floats(1e-6, 1e12))
def test_an_axis_ends_at_a_round_number_not_far_above(most: float) -> None:
    top = round_up(most)
    assert most * (1 - 1e-6) <= top <= 2 * most
    digits = top / 10 ** math.floor(math.log10(top) + 1e-9)
    assert abs(2 * digits - round(2 * digits)) < 1e-6


@pytest.mark.parametrize("most", [0.0, -1.0, math.nan, math.inf])
def test_an_axis_of_nothing(most: float) -> None:
    assert round_up(most) == 1


@pytest.mark.parametrize(
    ("high", "ticks"),
    [
        (100, [0, 20, 40, 60, 80, 100]),
        (64_000, [0, 20_000, 40_000, 60_000]),
        (2.3, [0, 0.5, 1, 1.5, 2]),
    ],
)
def test_ticks_of_familiar_axes(high: float, ticks: list[float]) -> None:
    axes = new_axes((0, high), (0, high))
    for found in (axes.get_xticks(), axes.get_yticks()):
        assert [tick for tick in found if tick <= high] == pytest.approx(ticks)


def test_a_line_runs_from_corner_to_corner_and_stays_inside() -> None:
    axes = new_axes((0, 10), (0, 4))
    draw_line(axes, np.array([0.0, 5.0, 10.0, np.nan]), np.array([0.0, 9.0, 4.0, 1.0]), CHECK)
    ((start, middle, end),) = points_of(as_chart(axes, "x").svg, "var(--check)")
    assert start[0] < middle[0] < end[0]
    assert start[1] > middle[1] == end[1], "9 is beyond the axis"


def test_a_long_line_is_thinned_and_a_line_of_nothing_is_none() -> None:
    axes = new_axes((0, 100_000), (0, 1))
    draw_line(axes, np.arange(1e5), np.random.default_rng(0).random(100_000), CHECK)
    draw_line(axes, np.array([np.nan]), np.array([np.nan]), CHECK)
    (line,) = points_of(as_chart(axes, "x").svg, "var(--check)")
    assert MOST_POINTS / 2 < len(line) <= MOST_POINTS


def test_dots_are_thinned_but_the_last_stays() -> None:
    count = 3 * MOST_POINTS
    axes = new_axes((0, count), (0, count))
    x = np.arange(float(count))
    draw_dots(axes, x, x, CHECK, [f'dot "{n}" <&>' for n in range(count)])
    hints = re.findall(r"<title>(.*?)</title>", as_chart(axes, "x").svg)
    assert len(hints) == MOST_POINTS
    assert hints[-1] == f'dot "{count - 1}" &lt;&amp;&gt;'


def test_columns_are_as_high_as_their_numbers() -> None:
    axes = new_axes((0, 2), (0, 4))
    draw_columns(axes, np.array([0.0, 1.0, 2.0]), np.array([4.0, 2.0]), CHECK)
    (points,) = points_of(as_chart(axes, "x").svg, "var(--check)")
    low, high = max(y for _, y in points), min(y for _, y in points)
    assert {round((low - y) / (low - high), 2) for _, y in points} == {0, 0.5, 1}


def test_a_chart_is_one_element_without_links_names_or_fonts() -> None:
    def made() -> str:
        axes = new_axes((0, 10), (0, 1), y_label=lambda value: f"{value:g} %")
        draw_line(axes, np.array([0.0, 10.0]), np.array([0.0, 1.0]), INK, "a <line>", dashes="--")
        draw_dots(axes, np.array([5.0]), np.array([0.5]), CHECK, ["half"])
        draw_mark(axes, 5, "middle")
        name_axis(axes, "images", "epochs")
        return as_chart(axes, "Title & more", "a caption").__html__()

    html = made()
    assert html == made(), "the same numbers give the same bytes"
    root = ElementTree.fromstring(html)
    texts = ["".join(text.itertext()) for text in root.iter("text")]
    assert {"images", "epochs", "middle", "0 %", "1 %", "10"} <= set(texts)
    assert root.findtext("header/h3") == "Title & more"
    assert root.findtext("header/div/span") == "a <line>"
    assert 'class="dashed" style="--k:var(--ink)"' in html
    for unwanted in ("href", "url(", " id=", "<style", "font-family", "http", INK, CHECK):
        assert unwanted not in html


def read_colors() -> tuple[dict[str, str], dict[str, str]]:
    """The variables of page.css that are a color, in light and in dark mode."""
    text = (Path(charts.__file__).parent / "page.css").read_text(encoding="utf-8")
    light, dark = text.split("prefers-color-scheme: dark", 1)
    found = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part)) for part in (light, dark)]
    assert found[0].keys() == found[1].keys() >= {"paper", "ink", "soft", "a", "b", "s1", "s6"}
    return found[0], found[1]


def linear(color: str) -> np.ndarray:
    """Linear light of a color in sRGB (IEC 61966-2-1), float [3]."""
    values = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2.2."""
    low, high = sorted(float(linear(color) @ [0.2126, 0.7152, 0.0722]) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


EYES = (
    np.eye(3),
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
     [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
     [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
     [0.004733, 0.691367, 0.303900]],
)  # fmt: skip
"""Linear light as eyes see it: with all cones, or without one kind (Machado and others 2009)."""


def oklab(light: np.ndarray) -> np.ndarray:
    """Linear light in Oklab (Ottosson 2020), where distances are about what eyes see."""
    cones = np.cbrt(
        [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
         [0.0883024619, 0.2817188376, 0.6299787005]] @ light.clip(0, 1)
    )  # fmt: skip
    return (
        [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
         [0.0259040371, 0.7827717662, -0.8086757660]] @ cones
    )  # fmt: skip


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colors_of_pages_can_be_read_and_told_apart(mode: int) -> None:
    colors = read_colors()[mode]
    for name in ("ink", "soft", "a", "b", "check", "alarm"):  # text: AA wants 4.5
        for paper in ("paper", "sheet", "faint") if name == "ink" else ("paper", "sheet"):
            assert contrast(colors[name], colors[paper]) >= 4.5, (name, paper)
    series = [colors[f"s{number}"] for number in range(1, len(SERIES) + 1)]
    for color in [*series, colors["bar"]]:  # lines and bars: AA wants 3
        assert contrast(color, colors["paper"]) >= 3, color
    for one, other in itertools.combinations(series, 2):
        apart = [np.linalg.norm(oklab(eye @ linear(one)) - oklab(eye @ linear(other)))
                 for eye in EYES]  # fmt: skip
        assert min(apart) > 0.09, (one, other)
    if mode == 0:
        assert tuple(series) == SERIES, "the colors that charts are drawn with"


def test_bars_have_their_lengths_names_and_marks() -> None:
    html = bar_list([Bar("a <b>", "7", 0.25, start=0.5, limit=0.75, note="why"), Bar("c", "8", 1)])
    assert "left:50.00%;width:25.00%" in html
    assert '<b style="left:75.00%">' in html
    assert html.count("a &lt;b&gt;") == 2
    assert html.count('class="note"') == 1
