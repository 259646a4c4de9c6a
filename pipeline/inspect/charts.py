"""Stepped charts as SVG paths in a unit square, with ticks to be set as text around it.

The template stretches the square over any width and keeps strokes and letters at their size. A
thousand classes or fourteen million pictures are some hundred steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.describe.facts import SplitFacts

SIDE = 1000  # units of the square; y points down, as in SVG
BINS = 60
STEPS = 400  # classes that get a step of their own
LISTED = 40  # classes up to which each is named

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tick:
    """A label at a share 0..1 of the axis, from its start."""

    place: float
    label: str


@dataclass(frozen=True)
class Chart:
    """All that the template needs to draw one chart."""

    title: str
    path: str
    """The outline, closed along the lower edge."""
    x: list[Tick]
    y: list[Tick]
    caption: str


@dataclass(frozen=True)
class Bar:
    """A class in a list of bars."""

    label: int
    count: int
    share: float
    """Of the longest bar, 0..1."""


def round_values(high: float, about: int = 5) -> list[float]:
    """Some `about` round numbers 0..high: multiples of 1, 2 or 5 times a power of ten."""
    rough = high / about
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= rough * (1 - 1e-9))
    return [gap * number for number in range(math.floor(high / gap + 1e-9) + 1)]


def steps(heights: npt.NDArray[np.float64], top: float) -> str:
    """Return the outline of columns of equal width, side by side; `top` is the height of 1."""
    width = SIDE / len(heights)
    down = SIDE * (1 - np.clip(heights / top, 0, 1))
    moves = [f"V{y:.1f}H{width * (place + 1):.1f}" for place, y in enumerate(down.tolist())]
    return f"M0 {SIDE}{''.join(moves)}V{SIDE}Z"


def bars(counts: Counts) -> list[Bar]:
    """Return a bar for each class, in the order of the labels; none for more than `LISTED`."""
    if len(counts) > LISTED:
        return []
    most = max(1, int(counts.max()))
    return [Bar(label, count, count / most) for label, count in enumerate(counts.tolist())]


def class_chart(facts: SplitFacts) -> Chart:
    """Pictures per class, the largest class first."""
    ranked = np.sort(facts.per_class)[::-1].astype(np.float64)
    classes = len(ranked)
    drawn = ranked
    if classes > STEPS:
        places = np.linspace(0, classes - 1, STEPS).round().astype(int)
        drawn = ranked[places]
    top = max(1.0, float(ranked[0]) * 1.08)
    empty = int(np.count_nonzero(ranked == 0))
    caption = (
        f"{classes:,} classes, {ranked[-1]:,.0f} to {ranked[0]:,.0f} pictures each, "
        f"median {np.median(ranked):,.0f}"
    )
    return Chart(
        title=facts.name,
        path=steps(drawn, top),
        x=[Tick(v / classes, short(v)) for v in round_values(classes) if v],
        y=[Tick(v / top, short(v)) for v in round_values(top) if v == round(v)],
        caption=caption + (f"; {empty:,} without any" if empty else ""),
    )


def size_chart(facts: SplitFacts) -> Chart:
    """Histogram of the stored bytes of a picture."""
    sizes = facts.picture_bytes
    if not len(sizes):
        return Chart(facts.name, "", [], [], "no pictures")
    most = float(np.percentile(sizes, 99.8)) * 1.05
    counts, _ = np.histogram(sizes, BINS, (0, most))
    top = float(counts.max()) * 1.08
    beyond = int(np.count_nonzero(sizes > most))
    caption = (
        f"{sizes.min() / 1e3:,.1f} to {sizes.max() / 1e3:,.1f} kB, "
        f"mean {sizes.mean() / 1e3:,.1f}, median {np.median(sizes) / 1e3:,.1f}"
    )
    return Chart(
        title=facts.name,
        path=steps(counts.astype(np.float64), top),
        x=[Tick(v / most, f"{v / 1e3:g} kB") for v in round_values(most)],
        y=[Tick(v / top, short(v)) for v in round_values(top) if v == round(v)],
        caption=caption + (f"; {beyond:,} beyond the right edge" if beyond else ""),
    )


def short(value: float) -> str:
    """A number in few letters: 250, 12k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (1 - 1e-9):
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
