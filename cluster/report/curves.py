"""The four charts of a report: loss, error, pictures a second, waiting for data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cluster.report.charts import (
    BUCKETS,
    Axis,
    Chart,
    Dot,
    Line,
    Tick,
    axis_to,
    dots,
    line,
    short,
    smooth,
    window_of,
)
from cluster.report.records import Floats, Records, Series

MOST_MARKS = 12  # a rate that changes more often than this is a slope, not drops
SAME_RATE = 0.01


def curves(records: Records) -> list[Chart]:
    """All charts of a run with at least one step."""
    return [_loss(records), _error(records), _speed(records), _wait(records)]


def _loss(records: Records) -> Chart:
    return _learning(records, "Loss", "loss", 1.0, 8.0)


def _error(records: Records) -> Chart:
    return _learning(records, "Top-1 error", "top1_error", 100.0, 100.0, unit=" %")


def _learning(
    records: Records, title: str, name: str, scale: float, limit: float, unit: str = ""
) -> Chart:
    """Training and validation over the pictures seen, with the drops of the rate."""
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
    drops = _rate_drops(metrics, across)
    return _chart(records, title, axes, lines, points, unit, caption, drops)


def _speed(records: Records) -> Chart:
    metrics = records.metrics
    axes = _across(metrics, records.validation), axis_to(_most(metrics["img_s"], 98) * 1.1)
    lines = [
        line(metrics["position"], metrics["img_s"], axes, "raw", noisy=True),
        _smoothed(metrics, metrics["img_s"], axes, "whole job"),
    ]
    return _chart(records, "Pictures per second", axes, lines, [], "", _caption(metrics))


def _wait(records: Records) -> Chart:
    metrics = records.metrics
    values = metrics["data_wait"] * 100
    axes = _across(metrics, records.validation), axis_to(max(4.0, _most(values, 98) * 1.1))
    lines = [
        line(metrics["position"], values, axes, "raw", noisy=True),
        _smoothed(metrics, values, axes, "share of a step"),
    ]
    return _chart(records, "Waiting for data", axes, lines, [], " %", _caption(metrics))


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
        x=_picture_ticks(records.metrics, axes[0]),
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


def _picture_ticks(metrics: Series, axis: Axis) -> list[Tick]:
    """Round numbers of pictures, each with the epochs that it is."""
    epoch = metrics.last("position") / max(metrics.last("epoch"), 1e-9)
    return [
        Tick(
            axis.place(value),
            short(value) if value else "0",
            short(value / epoch) if math.isfinite(epoch) else "",
        )
        for value in axis.round_values(5)
    ]


def _rate_drops(metrics: Series, axis: Axis) -> list[Tick]:
    rates = metrics["lr"]
    with np.errstate(invalid="ignore", divide="ignore"):
        moved = np.abs(rates[1:] - rates[:-1]) > SAME_RATE * np.abs(rates[:-1])
    places = np.flatnonzero(moved) + 1
    if len(places) > MOST_MARKS:
        return []
    return [Tick(axis.place(metrics["position"][i]), f"lr {rates[i]:.2g}") for i in places]


def _caption(metrics: Series) -> str:
    window = window_of(len(metrics))
    if window == 1:
        return ""
    faint = "every step" if len(metrics) <= BUCKETS else "the middle nine tenths of the steps"
    return f"Line: mean over {window:,} steps; faint: {faint}."
