"""Line charts as a few SVG paths in a unit square, with ticks to be set as text around it.

The template stretches the square over any width and keeps strokes and letters at their size, so
one chart reads well on a phone, on a desk and on paper, in the colours of the page. Whatever
the number of rows, a chart stays a few tens of kilobytes: a line is thinned to `BUCKETS` points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.report.records import Floats

SIDE = 1000  # units of the square; y points down, as in SVG
BUCKETS = 500
SMOOTHING = 50  # a smoothed point is the mean over one part in so many of the rows


@dataclass(frozen=True)
class Tick:
    """A label at a share 0..1 of the axis, from its start."""

    place: float
    label: str
    second: str = ""


@dataclass(frozen=True)
class Line:
    """A path in the square and how it looks: a CSS class of the template."""

    path: str
    look: str
    name: str = ""
    """For the legend; none without."""


@dataclass(frozen=True)
class Dot:
    """A point with a text that shows under the mouse."""

    x: float
    y: float
    look: str
    hint: str


@dataclass(frozen=True)
class Chart:
    """All that the template needs to draw one chart."""

    title: str
    x: list[Tick]
    y: list[Tick]
    lines: list[Line]
    dots: list[Dot] = field(default_factory=list)
    marks: list[Tick] = field(default_factory=list)
    caption: str = ""
    across: tuple[str, str] = ("pictures", "epochs")
    """What the labels of the x axis count, and those below them."""


@dataclass(frozen=True)
class Axis:
    """Values low..high onto 0..1."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """Share of the axis, kept within it."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def places(self, values: Floats) -> Floats:
        """`place` of many values."""
        return np.clip((values - self.low) / (self.high - self.low), 0, 1)

    def round_values(self, about: int = 5) -> list[float]:
        """Some `about` round numbers on the axis: multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        gap = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / gap - 1e-9), math.floor(self.high / gap + 1e-9)
        return [gap * number for number in range(first, last + 1)]


def axis_to(most: float, about: int = 4) -> Axis:
    """An axis from 0 to the first round number at or above `most`."""
    if not (math.isfinite(most) and most > 0):
        return Axis(0, 1)
    gap = Axis(0, most).round_values(about)[1]
    return Axis(0, gap * math.ceil(most / gap - 1e-9))


def smooth(values: Floats, window: int) -> Floats:
    """Mean over `window` neighbours (fewer at the ends), leaving out NaN."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    place = np.arange(len(values))
    first, last = (
        np.maximum(0, place - window // 2),
        np.minimum(len(values), place + window // 2 + 1),
    )
    count = counts[last] - counts[first]
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)


def thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Noisy values as at most 2 * `BUCKETS` points: each stretch's 5th and 95th percentile."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= BUCKETS:
        return x, y
    starts = np.linspace(0, len(x), BUCKETS, endpoint=False).astype(int)
    ends = [np.percentile(stretch, (5, 95)) for stretch in np.split(y, starts[1:])]
    return np.repeat(x[starts], 2), np.concatenate(ends)


def line(
    x: Floats, y: Floats, axes: tuple[Axis, Axis], look: str, name: str = "", noisy: bool = False
) -> Line:
    """A polyline; of `noisy` values it shows the spread, else points are picked evenly."""
    if noisy:
        x, y = thin(x, y)
    elif len(x) > BUCKETS:
        picked = np.linspace(0, len(x) - 1, BUCKETS).round().astype(int)
        x, y = x[picked], y[picked]
    known = np.isfinite(x) & np.isfinite(y)
    across = axes[0].places(x[known]) * SIDE
    down = (1 - axes[1].places(y[known])) * SIDE
    points = [f"{a:.1f} {b:.1f}" for a, b in zip(across, down, strict=True)]
    return Line("M" + "L".join(points) if points else "", look, name)


def dots(
    x: Floats, y: Floats, axes: tuple[Axis, Axis], look: str, hints: Sequence[str]
) -> list[Dot]:
    """A dot for every known point, `BUCKETS` at most (the last is always there)."""
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if len(known) > BUCKETS:
        known = known[np.linspace(0, len(known) - 1, BUCKETS).round().astype(int)]
    return [
        Dot(
            round(axes[0].place(x[i]) * SIDE, 1),
            round((1 - axes[1].place(y[i])) * SIDE, 1),
            look,
            hints[int(i)],
        )
        for i in known
    ]


def window_of(rows: int) -> int:
    """Rows that a smoothed point is the mean of; odd."""
    return max(1, rows // SMOOTHING) | 1


def short(value: float) -> str:
    """A number in few letters: 0.05, 250, 12k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (1 - 1e-9):
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
