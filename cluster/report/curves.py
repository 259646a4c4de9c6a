"""The charts of a run: loss, error, images per second, waiting for data, updates of the weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.report.records import Records, Series
from pipeline.tools import charts
from pipeline.tools.charts import MOST_POINTS, Chart, Floats
from pipeline.tools.text import short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 50
"""A smoothed point is the mean over one part in this many of the rows."""
MOST_MARKS = 12
"""More changes of the learning rate have no room for their labels."""
SAME_RATE = 0.01
"""Relative change of the learning rate that is no change."""


def draw_curves(records: Records) -> list[Chart]:
    """Draw all charts of a run with at least one step."""
    metrics = records.metrics
    speed, wait = metrics["img_s"], metrics["data_wait"] * 100
    found = [
        _draw_learning(records, "Loss", "loss", 1.0, 8.0),
        _draw_learning(records, "Top-1 error", "top1_error", 100.0, 100.0, unit=" %"),
        _draw_timing(records, "Images per second", speed, "whole job"),
        _draw_timing(records, "Waiting for data", wait, "share of a step", " %", least=4.0),
    ]
    return [*found, _draw_updates(records)] if len(records.updates) > 1 else found


def _draw_learning(
    records: Records, title: str, name: str, scale: float, limit: float, unit: str = ""
) -> Chart:
    """Draw training and validation over the images seen, and the changes of the learning rate."""
    metrics, validation = records.metrics, records.validation
    values, validated = metrics[name] * scale, validation[name] * scale
    top = charts.round_up(min(max(_near_max(values), _near_max(validated)), limit))
    axes = _create_axes(records, (0, top), unit)
    _draw_noisy(axes, metrics, values, "training")
    charts.draw_line(axes, validation["position"], validated, charts.CHECK, "validation")
    hints = [
        f"step {step:,.0f}: {value:.3g}{unit}"
        for step, value in zip(validation["step"], validated, strict=True)
    ]
    charts.draw_dots(axes, validation["position"], validated, charts.CHECK, hints)
    for position, label in list_rate_marks(records):
        charts.draw_mark(axes, position, label)
    missing = "" if len(validation) else " No validation rows yet."
    return charts.as_chart(axes, title, _write_caption(metrics) + missing)


def _draw_timing(
    records: Records, title: str, values: Floats, name: str, unit: str = "", least: float = 0.0
) -> Chart:
    top = charts.round_up(max(least, _near_max(values, 98) * 1.1))
    axes = _create_axes(records, (0, top), unit)
    _draw_noisy(axes, records.metrics, values, name)
    return charts.as_chart(axes, title, _write_caption(records.metrics))


def _draw_updates(records: Records) -> Chart:
    """Draw the update of a step over the weights of each layer; powers of ten."""
    layers = {
        name: np.log10(np.where(values > 0, values, math.nan))
        for name, values in records.updates.items()
        if name != "position"
    }
    known = np.concatenate([values[np.isfinite(values)] for values in layers.values()])
    low, high = (math.floor(known.min()), math.ceil(known.max())) if len(known) else (-4, -2)
    axes = _create_axes(records, (low, max(high, low + 1)))
    axes.set_yticks(range(low, max(high, low + 1) + 1))
    axes.yaxis.set_major_formatter(lambda power, _: f"1e{power:.0f}")
    for number, (name, values) in enumerate(layers.items()):
        charts.draw_line(
            axes, records.updates["position"], values, charts.SERIES[number % 8], name, width=1.4
        )
    for position, label in list_rate_marks(records):
        charts.draw_mark(axes, position, label)
    return charts.as_chart(
        axes, "Update against weight",
        "Mean |update| of a step over mean |weight|, of the weights of each layer.",
    )  # fmt: skip


def _create_axes(records: Records, y: tuple[float, float], unit: str = "") -> Axes:
    """Return axes over the images seen; their ticks name the epochs as well."""
    position, validated = (one.last("position") for one in (records.metrics, records.validation))
    last = max((end for end in (position, validated) if end > 0), default=1.0)
    epoch = position / max(records.metrics.last("epoch"), 1e-9)

    def label_images(value: float) -> str:
        epochs = f"\n{short_number(value / epoch)}" if math.isfinite(epoch) else ""
        return short_number(value) + epochs

    axes = charts.new_axes((0, last), y, label_images, lambda value: f"{short_number(value)}{unit}")
    charts.name_axis(axes, "images", "epochs")
    return axes


def _draw_noisy(axes: Axes, metrics: Series, values: Floats, name: str) -> None:
    """Draw the spread of values as a faint line, their moving mean as a strong one."""
    charts.draw_line(axes, *thin(metrics["position"], values), charts.INK, width=1, alpha=0.2)
    charts.draw_line(
        axes, metrics["position"], smooth(values, choose_window(len(metrics))), charts.INK, name
    )


def smooth(values: Floats, window: int) -> Floats:
    """Return the mean over `window` neighbors (fewer at the ends), without NaN."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    place = np.arange(len(values))
    first = np.maximum(0, place - window // 2)
    last = np.minimum(len(values), place + window // 2 + 1)
    count = counts[last] - counts[first]
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)


def thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return the 5th and 95th percentile of `MOST_POINTS` / 2 stretches of noisy values."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= MOST_POINTS:
        return x, y
    starts = np.linspace(0, len(x), MOST_POINTS // 2, endpoint=False).astype(int)
    ends = [np.percentile(stretch, (5, 95)) for stretch in np.split(y, starts[1:])]
    return np.repeat(x[starts], 2), np.concatenate(ends)


def choose_window(rows: int) -> int:
    """Return the odd number of rows that a smoothed point is the mean of."""
    return max(1, rows // SMOOTHING) | 1


def _near_max(values: Floats, percentile: float = 99.5) -> float:
    known = values[np.isfinite(values)]
    return float(np.percentile(known, percentile)) if len(known) else 0.0


def list_rate_marks(records: Records) -> list[tuple[float, str]]:
    """Return (position, label) of every change of the learning rates; none for a slope.

    They are the rows of rates.jsonl; a run without that file shows where `lr` changes.
    """
    if records.rates:
        labeled = [(row["position"], _format_mark(row)) for row in records.rates]
        marks = [(position, label) for position, label in labeled if label]
        return [(position, label if len(marks) <= MOST_MARKS else "") for position, label in marks]
    rates, positions = records.metrics["lr"], records.metrics["position"]
    with np.errstate(invalid="ignore", divide="ignore"):
        has_moved = np.abs(rates[1:] - rates[:-1]) > SAME_RATE * np.abs(rates[:-1])
    places = np.flatnonzero(has_moved) + 1
    if len(places) > MOST_MARKS:
        return []
    return [(float(positions[place]), f"lr {rates[place]:.2g}") for place in places]


def _format_mark(row: dict[str, Any]) -> str:
    """Format a row of rates.jsonl: `lr 0.001`, `conv1 0`, `colour 0`; empty for bias rates."""
    parts = []
    for name, value in row["set"].items():
        kind, _, layer = str(name).partition(".")
        if kind in ("lr", "drop") and not layer:
            parts.append(f"lr {row.get('lr', value):.2g}")
        elif kind == "lr":
            parts.append(f"{layer} {value:.2g}")
        elif kind == "colour":
            parts.append(f"colour {value:.2g}")
    return ", ".join(parts)


def _write_caption(metrics: Series) -> str:
    window = choose_window(len(metrics))
    if window == 1:
        return ""
    is_short = len(metrics) <= MOST_POINTS
    faint = "every step" if is_short else "the middle nine tenths of the steps"
    return f"Line: mean over {window:,} steps; faint: {faint}."
