"""Line charts as a few SVG paths in a unit square, with ticks to be set as text around it.

The template stretches the square over any width and keeps strokes and letters at their size, so
one chart reads well on a phone, on a desk and on paper, in the colours of the page. Whatever
the number of rows, a chart stays a few tens of kilobytes: a line is thinned to `BUCKETS` points.

The charts of a report: loss, error, images a second, waiting for data, moving weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.report.records import Floats, Records, Series

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


MOST_MARKS = 12  # more have no room for their labels
SAME_RATE = 0.01


def curves(records: Records) -> list[Chart]:
    """All charts of a run with at least one step."""
    charts = [_loss(records), _error(records), _speed(records), _wait(records)]
    return [*charts, _updates(records)] if len(records.updates) > 1 else charts


def _loss(records: Records) -> Chart:
    return _learning(records, "Loss", "loss", 1.0, 8.0)


def _error(records: Records) -> Chart:
    return _learning(records, "Top-1 error", "top1_error", 100.0, 100.0, unit=" %")


def _learning(
    records: Records, title: str, name: str, scale: float, limit: float, unit: str = ""
) -> Chart:
    """Training and validation over the images seen, with the drops of the rate."""
    metrics, validation = records.metrics, records.validation
    values, checked = metrics[name] * scale, validation[name] * scale
    across = _across(metrics, validation)
    most = max(_most(values), _most(checked))
    axes = across, axis_to(min(most, limit))
    lines = [
        line(metrics["position"], values, axes, "raw", noisy=True),
        _smoothed(metrics, values, axes, "training"),
        line(validation["position"], checked, axes, "check", "validation"),
    ]
    hints = [
        f"step {step:,.0f}: {value:.3g}{unit}"
        for step, value in zip(validation["step"], checked, strict=True)
    ]
    points = dots(validation["position"], checked, axes, "check", hints)
    caption = _caption(metrics)
    if not len(validation):
        caption += " No validation rows yet."
    drops = _rate_marks(records, across)
    return _chart(records, title, axes, lines, points, unit, caption, drops)


def _speed(records: Records) -> Chart:
    metrics = records.metrics
    axes = _across(metrics, records.validation), axis_to(_most(metrics["img_s"], 98) * 1.1)
    lines = [
        line(metrics["position"], metrics["img_s"], axes, "raw", noisy=True),
        _smoothed(metrics, metrics["img_s"], axes, "whole job"),
    ]
    return _chart(records, "Images per second", axes, lines, [], "", _caption(metrics))


def _wait(records: Records) -> Chart:
    metrics = records.metrics
    values = metrics["data_wait"] * 100
    axes = _across(metrics, records.validation), axis_to(max(4.0, _most(values, 98) * 1.1))
    lines = [
        line(metrics["position"], values, axes, "raw", noisy=True),
        _smoothed(metrics, values, axes, "share of a step"),
    ]
    return _chart(records, "Waiting for data", axes, lines, [], " %", _caption(metrics))


def _updates(records: Records) -> Chart:
    """How far a step moves the weights of each layer, as a share of them; powers of ten."""
    across = _across(records.metrics, records.validation)
    places = records.updates["position"]
    layers = {
        name: np.log10(np.where(values > 0, values, math.nan))
        for name, values in records.updates.items()
        if name != "position"
    }
    known = np.concatenate([values[np.isfinite(values)] for values in layers.values()])
    low, high = (math.floor(known.min()), math.ceil(known.max())) if len(known) else (-4, -2)
    axes = across, Axis(low, max(high, low + 1))
    shown = list(layers.items())
    lines = [
        line(places, values, axes, f"layer l{number}", name)
        for number, (name, values) in enumerate(shown)
    ]
    powers = range(low, max(high, low + 1) + 1)
    return Chart(
        title="Update against weight",
        x=_image_ticks(records.metrics, across),
        y=[Tick(axes[1].place(power), f"1e{power}") for power in powers],
        lines=[line for line in lines if line.path],
        marks=_rate_marks(records, across),
        caption="Mean |update| of a step over mean |weight|, of the weights of each layer.",
    )


def _chart(
    records: Records,
    title: str,
    axes: tuple[Axis, Axis],
    lines: list[Line],
    points: list[Dot],
    unit: str,
    caption: str,
    marks: Sequence[Tick] = (),
) -> Chart:
    return Chart(
        title=title,
        x=_image_ticks(records.metrics, axes[0]),
        y=[Tick(axes[1].place(v), f"{short(v)}{unit}") for v in axes[1].round_values()],
        lines=[line for line in lines if line.path],
        dots=points,
        marks=list(marks),
        caption=caption,
    )


def _smoothed(metrics: Series, values: Floats, axes: tuple[Axis, Axis], name: str) -> Line:
    return line(metrics["position"], smooth(values, window_of(len(metrics))), axes, "train", name)


def _across(metrics: Series, validation: Series) -> Axis:
    ends = [end for end in (metrics.last("position"), validation.last("position")) if end > 0]
    return Axis(0, max(ends, default=1.0))


def _most(values: Floats, percentile: float = 99.5) -> float:
    known = values[np.isfinite(values)]
    return float(np.percentile(known, percentile)) if len(known) else 0.0


def _image_ticks(metrics: Series, axis: Axis) -> list[Tick]:
    """Round numbers of images, each with the epochs that it is."""
    epoch = metrics.last("position") / max(metrics.last("epoch"), 1e-9)
    return [
        Tick(
            axis.place(value),
            short(value) if value else "0",
            short(value / epoch) if math.isfinite(epoch) else "",
        )
        for value in axis.round_values(5)
    ]


def _rate_marks(records: Records, axis: Axis) -> list[Tick]:
    """A mark for every change of the rates that was written down; else where they are seen to."""
    if not records.rates:
        return _rate_drops(records.metrics, axis)
    told = [(row["position"], _mark_label(row)) for row in records.rates]
    marks = [(axis.place(position), label) for position, label in told if label]
    return [Tick(place, label if len(marks) <= MOST_MARKS else "") for place, label in marks]


def _mark_label(row: dict[str, Any]) -> str:
    """A row of rates.jsonl in a few letters: `lr 0.001`, `conv1 0`, `colour 0`; bias rates none."""
    told = []
    for name, value in row["set"].items():
        kind, _, layer = str(name).partition(".")
        if kind in ("lr", "drop") and not layer:
            told.append(f"lr {row.get('lr', value):.2g}")
        elif kind == "lr":
            told.append(f"{layer} {value:.2g}")
        elif kind == "colour":
            told.append(f"colour {value:.2g}")
    return ", ".join(told)


def _rate_drops(metrics: Series, axis: Axis) -> list[Tick]:
    rates = metrics["lr"]
    with np.errstate(invalid="ignore", divide="ignore"):
        moved = np.abs(rates[1:] - rates[:-1]) > SAME_RATE * np.abs(rates[:-1])
    places = np.flatnonzero(moved) + 1
    if len(places) > MOST_MARKS:  # a slope, not drops
        return []
    return [Tick(axis.place(metrics["position"][i]), f"lr {rates[i]:.2g}") for i in places]


def _caption(metrics: Series) -> str:
    window = window_of(len(metrics))
    if window == 1:
        return ""
    faint = "every step" if len(metrics) <= BUCKETS else "the middle nine tenths of the steps"
    return f"Line: mean over {window:,} steps; faint: {faint}."
