"""Figure 3 of the paper: the conv1 kernels of both columns, their scores, and both over time.

The paper (section 6.1, figure 3): the kernels of one GPU are largely color-agnostic, those of the
other largely color-specific; "this kind of specialization occurs during every run and is
independent of any particular random weight initialization (modulo a renumbering of the GPUs)". It
judges by eye; the scores here are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cluster.checkpoint.format import Checkpoint
from cluster.report.images import KERNEL_GAP, KERNEL_SCALE, read_column_kernels, tile_kernels
from cluster.run.kernels import Kernel, KernelSnapshot
from pipeline.dataset.images import Pixels
from pipeline.tools import charts
from pipeline.tools.charts import Chart, Floats, Label, encode_image
from pipeline.tools.text import short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY_OF_NOISE = 2 / 3
"""Colorfulness of a kernel of independent values: two of the three color axes are not grey."""
ORIENTATION_OF_NOISE = 0.064
"""Median orientation of kernels of noise, 3 x 11 x 11 (measured)."""
SPLITS = 5000
"""Random splits of the kernels that the split into columns is compared with."""
CERTAIN = 0.05
NOISE_DRAWS = 1000
NOISE_PERCENTILE = 99.0
TINY = 1e-30


@dataclass(frozen=True)
class Scores:
    """Scores 0..1 of n kernels, float64 [n] each."""

    colour: Floats
    """Share of the energy off the grey axis R = G = B: grey 0, noise 2/3, opponent colors 1."""
    orientation: Floats
    """Coherence of the structure tensor: 1 if all gradients are parallel, 0 if isotropic."""
    concentration: Floats
    """Share of the energy at the strongest frequency of the spectrum: low for noise."""

    def __len__(self) -> int:
        return len(self.colour)

    @property
    def shaped(self) -> npt.NDArray[np.bool_]:
        """Bool [n]: more concentrated than 99 of 100 kernels of noise."""
        return self.concentration > compute_noise_limit()


@dataclass(frozen=True)
class ColumnSeparation:
    """Separation of two columns by a score, compared with random splits of their kernels."""

    apart: float
    """Share of pairs, a kernel of each column, in which the column `ahead` has the higher score:
    0.5 if the columns are alike, 1 if their ranges are disjoint. Ties count half."""
    ahead: str
    """The column with the higher scores, "a" or "b"."""
    chance: float
    """Median of `apart` over random splits of the same kernels."""
    chance_95: float
    """Their 95th percentile."""
    p: float
    """Share of random splits that are at least as far apart, at least 1 / (splits + 1)."""

    @property
    def is_significant(self) -> bool:
        """True if `p` is below 0.05."""
        return self.p < CERTAIN


def score_kernels(kernels: Kernel) -> Scores:
    """Compute the scores of kernels, float [n, 3, k, k] in R, G, B."""
    exact = kernels.astype(np.float64)
    energy = (exact**2).sum(axis=(1, 2, 3))
    grey = (exact.sum(axis=1) ** 2).sum(axis=(1, 2)) / 3
    return Scores(
        colour=np.clip(1 - grey / np.maximum(energy, TINY), 0, 1) * (energy > 0),
        orientation=_compute_coherence(exact),
        concentration=_compute_concentration(exact),
    )


def _compute_coherence(kernels: Floats) -> Floats:
    """Return (l1 - l2) / (l1 + l2) of the eigenvalues of each kernel's structure tensor."""
    down, across = np.gradient(kernels, axis=(2, 3))
    yy, xx, xy = (
        (one * two).sum(axis=(1, 2, 3))
        for one, two in ((down, down), (across, across), (down, across))
    )
    return np.hypot(xx - yy, 2 * xy) / np.maximum(xx + yy, TINY)


def _compute_concentration(kernels: Floats) -> Floats:
    """Return the largest share of the energy within one step of a frequency, of k x k."""
    power = (np.abs(np.fft.fft2(kernels)) ** 2).sum(axis=1)
    near = sum(
        np.roll(power, (down, across), (1, 2)) for down in (-1, 0, 1) for across in (-1, 0, 1)
    )
    return np.max(near, axis=(1, 2)) / np.maximum(power.sum(axis=(1, 2)), TINY)


@cache
def compute_noise_limit() -> float:
    """Return the 99th percentile of the concentration of kernels of noise."""
    noise = np.random.default_rng(0).normal(size=(NOISE_DRAWS, 3, 11, 11))
    return float(np.percentile(_compute_concentration(noise), NOISE_PERCENTILE))


def separate_columns(a: Floats, b: Floats, seed: int = 0) -> ColumnSeparation | None:
    """Compare the scores of column a [m] and column b [n]; None if one is empty."""
    if not len(a) or not len(b):
        return None
    ranks = _rank(np.concatenate((a, b)))
    one = _compute_share(ranks[: len(a)].sum(), len(a), len(b))
    rng = np.random.default_rng(seed)
    mixed = rng.permuted(np.tile(ranks, (SPLITS, 1)), axis=1)[:, : len(a)].sum(axis=1)
    others = np.maximum(mixed_shares := _compute_share(mixed, len(a), len(b)), 1 - mixed_shares)
    apart = max(float(one), 1 - float(one))
    return ColumnSeparation(
        apart=apart,
        ahead="a" if one >= 0.5 else "b",
        chance=float(np.median(others)),
        chance_95=float(np.percentile(others, 95)),
        p=float((1 + (others >= apart - 1e-12).sum()) / (1 + SPLITS)),
    )


def _rank(values: Floats) -> Floats:
    """Return the rank of each value, from 1; equal values share the mean of theirs.

    `scipy.stats.rankdata` does the same, after seconds of importing it.
    """
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks


def _compute_share(rank_sum: Floats, ours: int, theirs: int) -> Floats:
    """Return the share of pairs in which ours is higher, from our rank sum (Mann and Whitney)."""
    return (rank_sum - ours * (ours + 1) / 2) / (ours * theirs)


MOMENTS = 12
"""Snapshots shown in a strip."""
FOLLOWED = 8
"""Kernels of a column shown in a strip."""
BAR = 3  # pixels high
COLOUR_BAR, ORIENTATION_BAR, TRACK = (123, 82, 196, 255), (18, 128, 106, 255), (128, 128, 128, 64)
COLUMN_COLORS = {"a": charts.COLUMN_A, "b": charts.COLUMN_B}


@dataclass(frozen=True)
class ColumnKernels:
    """The conv1 kernels of a column as one image, and their scores."""

    name: str
    uri: str
    scores: Scores
    colour: float
    """Median over the kernels, as are the next two."""
    orientation: float
    concentration: float
    shaped: int
    """Number of kernels that are more concentrated than noise."""


@dataclass(frozen=True)
class Strip:
    """Some kernels of a column (rows) at the snapshots (columns)."""

    name: str
    uri: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class FirstLayer:
    """Everything a page shows of conv1."""

    step: int
    columns: tuple[ColumnKernels, ...]
    colour: ColumnSeparation | None
    """Separation of the columns by colorfulness; None for a network of one column."""
    orientation: ColumnSeparation | None
    scatter: Chart
    changes: tuple[ColumnKernels, ...] = ()
    """The kernels minus their initial values: what was learned, without the initial noise."""
    change_length: float = 0.0
    """Median of the norms of the changes over those of the kernels."""
    change_colour: ColumnSeparation | None = None
    """Separation of the columns by colorfulness of the changes."""
    strips: tuple[Strip, ...] = ()
    charts: tuple[Chart, ...] = ()
    """Scores over the steps; empty without snapshots."""


def describe_first_layer(found: Checkpoint, moments: Sequence[KernelSnapshot] = ()) -> FirstLayer:
    """Describe conv1 of a checkpoint and of the snapshots before it.

    Raises:
        MissingFigure: the checkpoint holds no such tensors.
    """
    kernels = read_column_kernels(found)
    rated = {name: score_kernels(weights) for name, weights in kernels.items()}
    shapes = {name: weights.shape for name, weights in kernels.items()}
    past = [
        one
        for one in moments
        if one.step < found.mark.step
        and {name: weights.shape for name, weights in one.columns.items()} == shapes
    ]
    layer = FirstLayer(
        step=found.mark.step,
        columns=tuple(_describe_column(name, kernels[name], rated[name]) for name in kernels),
        colour=_separate_pair([one.colour for one in rated.values()]),
        orientation=_separate_pair([one.orientation for one in rated.values()]),
        scatter=_draw_scatter(rated),
    )
    if not past:
        return layer
    if past[0].step == 1:
        layer = _add_changes(layer, kernels, past[0].columns)
    past.append(KernelSnapshot(found.mark.step, kernels))
    shown = pick_snapshots(past)
    strips = tuple(_draw_strip(name, shown, rated[name]) for name in kernels)
    return replace(layer, strips=strips, charts=tuple(_draw_over_time(past)))


def _add_changes(
    layer: FirstLayer, kernels: dict[str, Kernel], first: dict[str, Kernel]
) -> FirstLayer:
    changes = {name: weights - first[name] for name, weights in kernels.items()}
    rated = {name: score_kernels(change) for name, change in changes.items()}
    shares = [_measure_lengths(changes[name]) / _measure_lengths(kernels[name]) for name in kernels]
    return replace(
        layer,
        changes=tuple(_describe_column(name, changes[name], rated[name]) for name in changes),
        change_length=float(np.median(shares)),
        change_colour=_separate_pair([one.colour for one in rated.values()]),
    )


def _measure_lengths(kernels: Kernel) -> npt.NDArray[np.float32]:
    return np.maximum(np.linalg.norm(kernels.reshape(len(kernels), -1), axis=1), 1e-12)


def pick_snapshots(moments: Sequence[KernelSnapshot]) -> list[KernelSnapshot]:
    """Return at most `MOMENTS` snapshots, evenly spread, with the first and the last."""
    count = min(MOMENTS, len(moments))
    places = np.linspace(0, len(moments) - 1, count).round().astype(int)
    return [moments[place] for place in places]


def _separate_pair(values: Sequence[npt.NDArray[np.float64]]) -> ColumnSeparation | None:
    return separate_columns(values[0], values[1]) if len(values) == 2 else None


def _describe_column(name: str, kernels: Kernel, rated: Scores) -> ColumnKernels:
    return ColumnKernels(
        name=name,
        uri=encode_image(draw_scored_sheet(kernels, rated)),
        scores=rated,
        colour=float(np.median(rated.colour)),
        orientation=float(np.median(rated.orientation)),
        concentration=float(np.median(rated.concentration)),
        shaped=int(rated.shaped.sum()),
    )


def draw_scored_sheet(kernels: Kernel, rated: Scores) -> Pixels:
    """Draw `tile_kernels` with two bars under each kernel: colorfulness and orientation, 0..1.

    Returns:
        RGBA image, uint8 [height, width, 4].
    """
    plain = tile_kernels(kernels)
    side = kernels.shape[-1] * KERNEL_SCALE
    pitch = side + KERNEL_GAP * KERNEL_SCALE
    across = (plain.shape[1] + KERNEL_GAP * KERNEL_SCALE) // pitch
    down = -(-len(kernels) // across)
    tall = side + 2 * (BAR + 1) + 2 * KERNEL_GAP * KERNEL_SCALE
    sheet = np.zeros((down * tall, plain.shape[1], 4), np.uint8)
    for row in range(down):
        sheet[row * tall : row * tall + side] = plain[row * pitch : row * pitch + side]
    bars = (rated.colour, COLOUR_BAR), (rated.orientation, ORIENTATION_BAR)
    for at, (values, paint) in enumerate(bars):
        for number, value in enumerate(values):
            row, place = divmod(number, across)
            head, left = row * tall + side + 1 + at * (BAR + 1), place * pitch
            sheet[head : head + BAR, left : left + side] = TRACK
            sheet[head : head + BAR, left : left + round(value * side)] = paint
    return sheet


def _draw_strip(name: str, past: Sequence[KernelSnapshot], rated: Scores) -> Strip:
    """Draw kernels spread over the final colorfulness, the most colorful first."""
    order = np.argsort(-rated.colour, kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(FOLLOWED, len(order))).round().astype(int)]
    # tile goes along rows: kernel by kernel, each through all moments.
    rows = np.concatenate(np.stack([one.columns[name][chosen] for one in past], axis=1))
    sheet = tile_kernels(rows, across=len(past))
    return Strip(name, encode_image(sheet), tuple(short_number(one.step) for one in past))


def _draw_scatter(rated: dict[str, Scores]) -> Chart:
    axes = charts.new_axes((0, 1), (0, 1))
    for name, one in rated.items():
        charts.draw_line(
            axes, np.zeros(1), np.zeros(1), COLUMN_COLORS[name], f"column {name}", width=0
        )
        scores = zip(one.colour, one.orientation, one.shaped, strict=True)
        hints = [
            f"column {name}, kernel {number}: colour {color:.2f}, orientation {along:.2f}"
            + ("" if is_shaped else ", like noise")
            for number, (color, along, is_shaped) in enumerate(scores, 1)
        ]
        charts.draw_dots(axes, one.colour, one.orientation, COLUMN_COLORS[name], hints)
    charts.draw_mark(axes, GREY_OF_NOISE, "noise")
    charts.name_axis(axes, "colour")
    return charts.as_chart(
        axes, "Every kernel: orientation over colourfulness",
        "A dot is a kernel. Colourfulness: share of its energy off the grey axis; "
        "orientation: coherence of its structure tensor.",
    )  # fmt: skip


def _draw_over_time(past: Sequence[KernelSnapshot]) -> list[Chart]:
    """Draw the scores over the steps, logarithmic, and how far the columns are apart in color."""
    rated = [
        {name: score_kernels(weights) for name, weights in one.columns.items()} for one in past
    ]
    across = np.log10([one.step for one in past])
    last = float(max(across[-1], math.log10(2)))
    found = []
    for title, score, of_noise in (
        ("Colourfulness, median kernel", "colour", GREY_OF_NOISE),
        ("Orientation, median kernel", "orientation", ORIENTATION_OF_NOISE),
    ):
        axes = _create_axes(last, (0, 1))
        for name in rated[-1]:
            medians = np.array([np.median(getattr(one[name], score)) for one in rated])
            charts.draw_line(axes, across, medians, COLUMN_COLORS[name], f"column {name}")
        charts.draw_line(
            axes, np.array([0, last]), np.full(2, of_noise), charts.SOFT, "noise", dashes="--"
        )
        found.append(charts.as_chart(axes, title, "Steps on a logarithmic axis."))
    pairs = (_separate_pair([one.colour for one in row.values()]) for row in rated)
    splits = [pair for pair in pairs if pair]
    if splits:
        axes = _create_axes(last, (0.5, 1), lambda value: f"{100 * value:.0f} %")
        charts.draw_line(
            axes, across, np.array([one.apart for one in splits]), charts.INK, "the columns"
        )
        charts.draw_line(axes, across, np.array([one.chance_95 for one in splits]), charts.SOFT,
                  "95 % of random splits are below", dashes="--")  # fmt: skip
        caption = (
            "Share of pairs, a kernel of each column, in which the one column's is more "
            "colourful: 50 % if the columns are alike, 100 % if they share nothing."
        )
        found.append(charts.as_chart(axes, "Columns apart in colourfulness", caption))
    return found


def _create_axes(last: float, y: tuple[float, float], label: Label = short_number) -> Axes:
    axes = charts.new_axes((0, last), y, lambda power: short_number(10.0**power), label)
    axes.set_xticks(range(int(last) + 1))
    charts.name_axis(axes, "steps")
    return axes
