"""The charts of runs: loss, errors, rates, speed, waiting for data, memory, updates of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from cluster.report.records import Records, Series
from pipeline.tools import charts
from pipeline.tools.charts import MOST_POINTS, Chart, Floats
from pipeline.tools.text import short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Track: TypeAlias = tuple[Series, Floats, str, str]
"""Rows, their values, color and name of a line."""
SHORT = 190.0
"""Height of the smaller charts in CSS pixels."""
FEW_POINTS = 12
"""Lines of up to so many points have dots: one point alone is no line."""
MANY_POINTS = 24
"""More validations than these have smaller dots."""
WIDE = 3.0
"""Learning rates that differ by more than this factor are drawn on powers of ten."""
SMOOTHING = 50
"""A smoothed point is the mean over one part in this many of the rows."""
MOST_MARKS = 12
"""More changes of the learning rate have no room for their labels."""
SAME_RATE = 0.01
"""Relative change of the learning rate that is no change."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A number that runs record, and how it is drawn."""

    title: str
    field: str
    unit: str = ""
    label: str = ""
    """Name of its line in the chart of a single run."""
    scale: float = 1.0
    """Factor from the rows to the unit."""
    least: float = 0.0
    """The axis ends there or above."""
    most: float = math.inf
    """The axis ends there or below."""
    is_validation: bool = False
    is_noisy: bool = True
    """Its curve is a moving mean where several are compared."""

    def find_series(self, records: Records) -> Series:
        """Return the rows that have it."""
        return records.validation if self.is_validation else records.metrics

    def read(self, records: Records) -> Floats:
        """Return its values in its unit; NaN where a row lacks it."""
        return self.find_series(records)[self.field] * self.scale

    def choose_top(self, tracks: Sequence[Floats]) -> float:
        """Return the end of an axis that shows nearly all of the values."""
        percentile, room = (99.5, 1.0) if math.isfinite(self.most) else (98, 1.1)
        top = max(_near_max(values, percentile) for values in tracks) * room
        return charts.round_up(min(max(self.least, top), self.most))

    def format(self, value: float) -> str:
        """Return a value with its unit."""
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return f"{text} {self.unit}" if self.unit in ("%", "GB") else text


TIMINGS = (
    Quantity(title="Images per second", field="img_s", label="whole job"),
    Quantity(title="Waiting for data", field="data_wait", unit="%", label="share of a step",
             scale=100, least=4),
    Quantity(title="Memory", field="memory", unit="GB", label="in use", scale=1e-9, is_noisy=False),
)  # fmt: skip
VALIDATIONS = (
    Quantity(title="Validation loss", field="loss", most=8, is_validation=True, is_noisy=False),
    Quantity(title="Validation top-1 error", field="top1_error", unit="%", scale=100, most=100,
             is_validation=True, is_noisy=False),
    Quantity(title="Validation top-5 error", field="top5_error", unit="%", scale=100, most=100,
             is_validation=True, is_noisy=False),
)  # fmt: skip
QUANTITIES = (
    Quantity(title="Training loss", field="loss", most=8),
    *VALIDATIONS,
    Quantity(title="Learning rate", field="lr", is_noisy=False),
    *TIMINGS,
)


def draw_curves(records: Records) -> list[Chart]:
    """Draw the curves of a run with at least one step; those that it did not record are left out.

    All share their x axis, the images seen.
    """
    metrics, validation = records.metrics, records.validation
    found = [
        _draw_learning(records, "Loss", 8.0, [
            (metrics, metrics["loss"], charts.INK, "training"),
            (validation, validation["loss"], charts.CHECK, "validation"),
        ]),
        _draw_learning(records, "Error", 100.0, [
            (metrics, metrics["top1_error"] * 100, charts.INK, "training top-1"),
            (validation, validation["top1_error"] * 100, charts.CHECK, "top-1"),
            (validation, validation["top5_error"] * 100, charts.COLUMN_B, "top-5"),
        ], unit="%"),
        _draw_rates(records),
    ]  # fmt: skip
    for quantity in TIMINGS:
        if np.isfinite(values := quantity.read(records)).any():
            axes = _create_axes([records], (0, quantity.choose_top([values])), SHORT)
            name = f"{quantity.label} {quantity.format(float(np.nanmedian(values)))}, median"
            if quantity.field == "memory":
                name = f"{quantity.label} {quantity.format(_last(values))}"
            _draw_noisy(axes, metrics, values, charts.INK, name)
            found.append(charts.as_chart(axes, quantity.title, unit=quantity.unit))
    return found


def list_missing_curves(records: Records) -> list[str]:
    """Return the quantities that a run with steps did not record, or not yet."""
    return [
        quantity.title.lower()
        for quantity in QUANTITIES
        if not np.isfinite(quantity.read(records)).any()
    ]


def draw_comparison(
    runs: Sequence[Records], letters: Sequence[str], quantities: Sequence[Quantity] = QUANTITIES
) -> list[Chart]:
    """Draw each quantity of several runs on common axes.

    Args:
        runs: the runs; a run without steps has no line.
        letters: a letter or name for each run, for the legends.
        quantities: what is drawn, a chart each.
    """
    found = []
    for quantity in quantities:
        tracks = [quantity.read(records) for records in runs]
        if not any(np.isfinite(values).any() for values in tracks):
            continue
        top = quantity.choose_top(tracks)
        axes = _create_axes(runs, (0, top))
        missing = []
        for number, (records, values) in enumerate(zip(runs, tracks, strict=True)):
            if not np.isfinite(values).any():
                missing.append(letters[number])
                continue
            series, (color, dashes) = quantity.find_series(records), charts.pick_series(number)
            shown = values
            if quantity.is_noisy:
                shown = smooth(values, choose_window(len(series)))
            name = f"{letters[number]} {quantity.format(_last(shown))}"
            charts.draw_line(axes, series["position"], shown, color, name, dashes=dashes)
            if len(series) <= FEW_POINTS:
                charts.draw_dots(axes, series["position"], shown, color, size=5)
        caption = f"Not recorded: {', '.join(missing)}." if missing else ""
        found.append(charts.as_chart(axes, quantity.title, caption, quantity.unit))
    return found


def _draw_learning(
    records: Records, title: str, limit: float, tracks: Sequence[Track], unit: str = ""
) -> Chart:
    """Draw training and validation over the images seen, and the changes of the learning rate."""
    top = charts.round_up(min(max(_near_max(values) for _, values, _, _ in tracks), limit))
    axes = _create_axes([records], (0, top))
    for series, values, color, name in tracks:
        if not np.isfinite(values).any():
            continue
        if series is records.metrics:
            mean = _last(smooth(values, choose_window(len(series))))
            _draw_noisy(axes, series, values, color, f"{name} {mean:.3g}")
            continue
        charts.draw_line(axes, series["position"], values, color, f"{name} {_last(values):.3g}")
        hints = [
            f"step {step:,.0f}: {value:.3g}{unit and ' ' + unit}"
            for step, value in zip(series["step"], values, strict=True)
        ]
        size = 6 if len(series) <= MANY_POINTS else 3.5
        charts.draw_dots(axes, series["position"], values, color, hints, size)
    for position, label in list_rate_marks(records):
        charts.draw_mark(axes, position, label)
    missing = "" if len(records.validation) else " No validation rows yet."
    return charts.as_chart(axes, title, f"{_write_caption(records.metrics)}{missing}".strip(), unit)


def _draw_rates(records: Records) -> Chart:
    """Draw the learning rates; on powers of ten where they change by much."""
    metrics = records.metrics
    tracks = [("weights", "lr", charts.INK), ("biases", "lr_bias", charts.SOFT)]
    known = np.concatenate([metrics[field] for _, field, _ in tracks])
    known = known[np.isfinite(known) & (known > 0)]
    is_wide = len(known) > 0 and known.max() > WIDE * known.min()
    if is_wide:
        low, high = math.floor(np.log10(known.min())), math.ceil(np.log10(known.max()))
        axes = _create_axes([records], (low, high), SHORT)
        _label_powers(axes, low, high)
    else:
        axes = _create_axes([records], (0, charts.round_up(_near_max(known, 100))), SHORT)
    for name, field, color in tracks:
        values = metrics[field]
        shown = np.log10(np.where(values > 0, values, math.nan)) if is_wide else values
        label = f"{name} {_last(values):.3g}"
        charts.draw_line(axes, metrics["position"], shown, color, label,
                         dashes="-" if field == "lr" else "--")  # fmt: skip
        if len(metrics) <= FEW_POINTS:
            charts.draw_dots(axes, metrics["position"], shown, color, size=5)
    return charts.as_chart(axes, "Learning rate")


def draw_updates(records: Records) -> Chart | None:
    """Draw the update of a step over the weights of each layer; None without such rows."""
    if len(records.updates) < 2:
        return None
    layers = {
        name: np.log10(np.where(values > 0, values, math.nan))
        for name, values in records.updates.items()
        if name != "position"
    }
    known = np.concatenate([values[np.isfinite(values)] for values in layers.values()])
    low, high = (math.floor(known.min()), math.ceil(known.max())) if len(known) else (-4, -2)
    axes = _create_axes([records], (low, max(high, low + 1)))
    _label_powers(axes, low, max(high, low + 1))
    for number, (name, values) in enumerate(layers.items()):
        color, dashes = charts.pick_series(number)
        charts.draw_line(
            axes, records.updates["position"], values, color, name, width=1.4, dashes=dashes
        )
    for position, label in list_rate_marks(records):
        charts.draw_mark(axes, position, label)
    return charts.as_chart(
        axes, "Update against weight",
        "Mean |update| of a step over mean |weight|, of the weights of each layer.",
    )  # fmt: skip


def _label_powers(axes: Axes, low: int, high: int) -> None:
    axes.set_yticks(range(low, high + 1))
    axes.yaxis.set_major_formatter(lambda power, _: f"1e{power:.0f}")


def _create_axes(runs: Sequence[Records], y: tuple[float, float], height: float = 250) -> Axes:
    """Return axes over the images seen; for a single run their ticks name the epochs as well."""
    ends = [one.last("position") for run in runs for one in (run.metrics, run.validation)]
    last = max((end for end in ends if end > 0), default=1.0)
    metrics = runs[0].metrics
    epoch = metrics.last("position") / max(metrics.last("epoch"), 1e-9)
    has_epochs = len(runs) == 1 and math.isfinite(epoch)

    def label_images(value: float) -> str:
        return short_number(value) + (f"\n{short_number(value / epoch)}" if has_epochs else "")

    axes = charts.new_axes((0, last), y, label_images, height=height)
    charts.name_axis(axes, "images", *(["epochs"] if has_epochs else []))
    return axes


def _draw_noisy(axes: Axes, series: Series, values: Floats, color: str, name: str) -> None:
    """Draw the spread of values as a faint line, their moving mean as a strong one."""
    position, window = series["position"], choose_window(len(series))
    if window > 1:
        charts.draw_line(axes, *thin(position, values), color, width=1, alpha=0.25)
    charts.draw_line(axes, position, smooth(values, window), color, name)
    if len(series) <= FEW_POINTS:
        charts.draw_dots(axes, position, values, color, size=5)


def _last(values: Floats) -> float:
    """Return the last finite value; NaN without one."""
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else math.nan


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
