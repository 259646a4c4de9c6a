"""Figure 3 of the paper: the first layer of both columns, what it looks for, and since when.

What conv1 kernels look for, in numbers, and whether the two columns look for different things.

The paper (section 6.1, figure 3): the kernels of one GPU are largely colour-agnostic, those of the
other largely colour-specific; "this kind of specialization occurs during every run and is
independent of any particular random weight initialization (modulo a renumbering of the GPUs)". It
judges by eye; the numbers here are ours.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from cluster.checkpoint.format import Checkpoint
from cluster.report.charts import Axis, Chart, Dot, Line, Tick, dots, line, short
from cluster.report.images import KERNEL_GAP, KERNEL_SCALE, column_kernels, data_uri, tile
from cluster.run.kernels import Kernel, KernelSnapshot
from pipeline.dataset.images import Pixels

Floats = npt.NDArray[np.float64]

GREY_OF_NOISE = 2 / 3
"""Colourfulness of a kernel of independent values: two of three axes of colour are not grey."""
ORIENTATION_OF_NOISE = 0.064
"""Median orientation of kernels of noise, 3 x 11 x 11 (measured)."""
SPLITS = 5000
"""Random splits that a split into columns is compared with."""
CERTAIN = 0.05
NOISE_DRAWS = 1000
NOISE_PERCENTILE = 99.0
TINY = 1e-30


@dataclass(frozen=True)
class Scores:
    """A number 0..1 for each of n kernels."""

    colour: Floats
    """Share of its energy off the grey axis R = G = B: grey 0, noise 2/3, opponent colours 1."""
    orientation: Floats
    """Coherence of its structure tensor: all changes in one direction 1, as many in all 0."""
    concentration: Floats
    """Share of its energy in the strongest place of its spectrum: low for noise."""

    def __len__(self) -> int:
        return len(self.colour)

    @property
    def shaped(self) -> npt.NDArray[np.bool_]:
        """Which are more concentrated than 99 of 100 kernels of noise."""
        return self.concentration > noise_limit()


@dataclass(frozen=True)
class Split:
    """How well a score tells the kernels of two columns apart, beside random splits of them."""

    apart: float
    """Share of pairs (one of each column) in which the one column has the higher score: 0.5 if the
    columns are alike, 1 if they share no value. Of the column that is ahead; ties count half."""
    ahead: str
    """That column, "a" or "b"."""
    chance: float
    """Median of `apart` over random splits of the same kernels."""
    chance_95: float
    """What 95 % of them stay below."""
    p: float
    """Share of random splits at least as far apart: never below 1 / (splits + 1)."""

    @property
    def told(self) -> bool:
        """Whether it is more than a random split would give in 95 of 100 cases."""
        return self.p < CERTAIN


def scores(kernels: Kernel) -> Scores:
    """The scores of kernels, float [n, 3, k, k] in R, G, B."""
    exact = kernels.astype(np.float64)
    energy = (exact**2).sum(axis=(1, 2, 3))
    grey = (exact.sum(axis=1) ** 2).sum(axis=(1, 2)) / 3
    return Scores(
        colour=np.clip(1 - grey / np.maximum(energy, TINY), 0, 1) * (energy > 0),
        orientation=_coherence(exact),
        concentration=_concentration(exact),
    )


def _coherence(kernels: Floats) -> Floats:
    """(l1 - l2) / (l1 + l2) of the eigenvalues of each structure tensor, summed over channels."""
    down, across = np.gradient(kernels, axis=(2, 3))
    yy, xx, xy = (
        (one * two).sum(axis=(1, 2, 3))
        for one, two in ((down, down), (across, across), (down, across))
    )
    coherence: Floats = np.hypot(xx - yy, 2 * xy) / np.maximum(xx + yy, TINY)
    return coherence


def _concentration(kernels: Floats) -> Floats:
    """Largest share of the energy that lies within one frequency of another, of k x k."""
    power = (np.abs(np.fft.fft2(kernels)) ** 2).sum(axis=1)
    near = sum(
        np.roll(power, (down, across), (1, 2)) for down in (-1, 0, 1) for across in (-1, 0, 1)
    )
    most: Floats = np.max(near, axis=(1, 2)) / np.maximum(power.sum(axis=(1, 2)), TINY)
    return most


@cache
def noise_limit() -> float:
    """The concentration that one in a hundred kernels of noise is beyond."""
    noise = np.random.default_rng(0).normal(size=(NOISE_DRAWS, 3, 11, 11))
    return float(np.percentile(_concentration(noise), NOISE_PERCENTILE))


def split(a: Floats, b: Floats, seed: int = 0) -> Split | None:
    """How far the scores of column a [m] and column b [n] are apart; None if one is empty."""
    if not len(a) or not len(b):
        return None
    ranks = _ranks(np.concatenate((a, b)))
    one = _share(ranks[: len(a)].sum(), len(a), len(b))
    rng = np.random.default_rng(seed)
    mixed = rng.permuted(np.tile(ranks, (SPLITS, 1)), axis=1)[:, : len(a)].sum(axis=1)
    others = np.maximum(mixed_shares := _share(mixed, len(a), len(b)), 1 - mixed_shares)
    apart = max(float(one), 1 - float(one))
    return Split(
        apart=apart,
        ahead="a" if one >= 0.5 else "b",
        chance=float(np.median(others)),
        chance_95=float(np.percentile(others, 95)),
        p=float((1 + (others >= apart - 1e-12).sum()) / (1 + SPLITS)),
    )


def _share(rank_sum: Floats, ours: int, theirs: int) -> Floats:
    """Share of pairs in which ours is higher, from the sum of our ranks (Mann and Whitney)."""
    return (rank_sum - ours * (ours + 1) / 2) / (ours * theirs)


def _ranks(values: Floats) -> Floats:
    """Ranks from 1 on; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[place]
    return ranks


MOMENTS = 12
"""Moments shown in a strip."""
FOLLOWED = 8
"""Kernels of a column that are followed through them."""
BAR = 3  # pixels high
COLOUR_BAR, ORIENTATION_BAR, TRACK = (123, 82, 196, 255), (18, 128, 106, 255), (128, 128, 128, 64)
WHOLE = Axis(0, 1)


@dataclass(frozen=True)
class Column:
    """The first layer of a column as one image, and its scores."""

    name: str
    uri: str
    scores: Scores
    colour: float
    """Median over its kernels, as the next."""
    orientation: float
    concentration: float
    shaped: int
    """Kernels that are more than noise."""


@dataclass(frozen=True)
class Strip:
    """Some kernels of a column (rows) through the moments (columns)."""

    name: str
    uri: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class FirstLayer:
    """All that a page shows of conv1."""

    step: int
    columns: tuple[Column, ...]
    colour: Split | None
    """Whether the columns differ in colourfulness; None for a network of one column."""
    orientation: Split | None
    scatter: Chart
    changes: tuple[Column, ...] = ()
    """The kernels less what they began as: what was learned, without the noise that was drawn."""
    change_length: float = 0.0
    """Median of their lengths over those of the kernels: how much of these was learned."""
    change_colour: Split | None = None
    """As `colour`, of these."""
    strips: tuple[Strip, ...] = ()
    charts: tuple[Chart, ...] = ()
    """Over the steps; without kept moments none."""

    @property
    def kernels(self) -> int:
        """Of both columns."""
        return sum(len(column.scores) for column in self.columns)


def first_layer(found: Checkpoint, moments: Sequence[KernelSnapshot] = ()) -> FirstLayer:
    """Look at conv1 of a checkpoint, and at what was kept of it before.

    Raises:
        Unavailable: the checkpoint holds no such tensors.
    """
    kernels = column_kernels(found)
    rated = {name: scores(weights) for name, weights in kernels.items()}
    past = [one for one in moments if one.step < found.mark.step and same_shape(one, kernels)]
    layer = FirstLayer(
        step=found.mark.step,
        columns=tuple(_column(name, kernels[name], rated[name]) for name in kernels),
        colour=_apart([one.colour for one in rated.values()]),
        orientation=_apart([one.orientation for one in rated.values()]),
        scatter=_scatter(rated),
    )
    if not past:
        return layer
    if past[0].step == 1:
        layer = _with_changes(layer, kernels, past[0].columns)
    past.append(KernelSnapshot(found.mark.step, kernels))
    shown = picked(past)
    strips = tuple(
        _strip(name, [one.columns[name] for one in shown], [one.step for one in shown], rated[name])
        for name in kernels
    )
    return replace(layer, strips=strips, charts=tuple(_over_time(past)))


def _with_changes(
    layer: FirstLayer, kernels: dict[str, Kernel], first: dict[str, Kernel]
) -> FirstLayer:
    changes = {name: weights - first[name] for name, weights in kernels.items()}
    rated = {name: scores(change) for name, change in changes.items()}
    return replace(
        layer,
        changes=tuple(_column(name, changes[name], rated[name]) for name in changes),
        change_length=float(
            np.median([_lengths(changes[name]) / _lengths(kernels[name]) for name in kernels])
        ),
        change_colour=_apart([one.colour for one in rated.values()]),
    )


def _lengths(kernels: Kernel) -> npt.NDArray[np.float32]:
    return np.maximum(np.linalg.norm(kernels.reshape(len(kernels), -1), axis=1), 1e-12)


def same_shape(moment: KernelSnapshot, kernels: dict[str, Kernel]) -> bool:
    """Whether a moment is of the network that the checkpoint holds."""
    shapes = {name: weights.shape for name, weights in kernels.items()}
    return {name: weights.shape for name, weights in moment.columns.items()} == shapes


def picked(moments: Sequence[KernelSnapshot]) -> list[KernelSnapshot]:
    """At most `MOMENTS` of them, evenly spread in their order; first and last always."""
    if len(moments) <= MOMENTS:
        return list(moments)
    places = np.linspace(0, len(moments) - 1, MOMENTS).round().astype(int)
    return [moments[place] for place in places]


def _apart(values: Sequence[npt.NDArray[np.float64]]) -> Split | None:
    return split(values[0], values[1]) if len(values) == 2 else None


def _column(name: str, kernels: Kernel, rated: Scores) -> Column:
    return Column(
        name=name,
        uri=_png(scored_sheet(kernels, rated)),
        scores=rated,
        colour=float(np.median(rated.colour)),
        orientation=float(np.median(rated.orientation)),
        concentration=float(np.median(rated.concentration)),
        shaped=int(rated.shaped.sum()),
    )


def scored_sheet(kernels: Kernel, rated: Scores) -> Pixels:
    """`tile` with two bars under each kernel: its colourfulness and its orientation, 0..1.

    Returns:
        RGBA image, uint8 [height, width, 4].
    """
    plain = tile(kernels)
    side = kernels.shape[-1] * KERNEL_SCALE
    pitch = side + KERNEL_GAP * KERNEL_SCALE
    across = (plain.shape[1] + KERNEL_GAP * KERNEL_SCALE) // pitch
    down = -(-len(kernels) // across)
    tall = side + 2 * (BAR + 1) + 2 * KERNEL_GAP * KERNEL_SCALE
    sheet = np.zeros((down * tall, plain.shape[1], 4), np.uint8)
    for number, (colour, orientation) in enumerate(
        zip(rated.colour, rated.orientation, strict=True)
    ):
        row, place = divmod(number, across)
        top, left = row * tall, place * pitch
        old = row * pitch
        sheet[top : top + side, left : left + side] = plain[old : old + side, left : left + side]
        for at, (value, paint) in enumerate(((colour, COLOUR_BAR), (orientation, ORIENTATION_BAR))):
            head = top + side + 1 + at * (BAR + 1)
            sheet[head : head + BAR, left : left + side] = TRACK
            sheet[head : head + BAR, left : left + round(value * side)] = paint
    return sheet


def _strip(name: str, past: list[Kernel], steps: list[int], rated: Scores) -> Strip:
    """Kernels of all shades of colourfulness at the end, the most colourful first."""
    order = np.argsort(-rated.colour, kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(FOLLOWED, len(order))).round().astype(int)]
    rows = np.concatenate([weights[chosen] for weights in past])
    # tile goes along rows: kernel by kernel, each through all moments.
    turned = rows.reshape(len(past), len(chosen), *rows.shape[1:]).swapaxes(0, 1)
    sheet = tile(turned.reshape(rows.shape), across=len(past))
    return Strip(name, _png(sheet), tuple(short(step) for step in steps))


def _scatter(rated: dict[str, Scores]) -> Chart:
    points: list[Dot] = []
    for name, one in rated.items():
        hints = [
            f"column {name}, kernel {number + 1}: colour {colour:.2f}, orientation {along:.2f}"
            + ("" if shaped else ", like noise")
            for number, (colour, along, shaped) in enumerate(
                zip(one.colour, one.orientation, one.shaped, strict=True)
            )
        ]
        points += dots(one.colour, one.orientation, (WHOLE, WHOLE), name, hints)
    return Chart(
        title="Every kernel: orientation over colourfulness",
        x=[Tick(value, f"{value:g}") for value in (0, 0.2, 0.4, 0.6, 0.8, 1)],
        y=[Tick(value, f"{value:.1f}") for value in (0, 0.2, 0.4, 0.6, 0.8, 1)],
        lines=[Line("", name, f"column {name}") for name in rated],
        dots=points,
        marks=[Tick(GREY_OF_NOISE, "noise")],
        caption="A dot is a kernel. Colourfulness: share of its energy off the grey axis; "
        "orientation: coherence of its structure tensor.",
        across=("colour", ""),
    )


def _over_time(past: Sequence[KernelSnapshot]) -> list[Chart]:
    steps = np.array([one.step for one in past], float)
    last = math.log10(max(steps[-1], 2))
    axis, across = Axis(0, last), np.log10(steps)
    rated = [{name: scores(weights) for name, weights in one.columns.items()} for one in past]
    ticks = [Tick(axis.place(power), short(10.0**power)) for power in range(int(last) + 1)]
    tenths = [Tick(value, f"{value:.1f}") for value in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    charts = []
    for title, score, of_noise in (
        ("Colourfulness, median kernel", "colour", GREY_OF_NOISE),
        ("Orientation, median kernel", "orientation", ORIENTATION_OF_NOISE),
    ):
        medians = [
            line(
                across,
                np.array([np.median(getattr(one[name], score)) for one in rated]),
                (axis, WHOLE),
                name,
                f"column {name}",
            )
            for name in rated[-1]
        ]
        noise = line(np.array([0, last]), np.full(2, of_noise), (axis, WHOLE), "chance", "noise")
        charts.append(
            Chart(
                title=title,
                x=ticks,
                y=tenths,
                lines=[*medians, noise],
                caption="Steps on a logarithmic axis.",
                across=("steps", ""),
            )
        )
    if len(rated[-1]) == 2:
        charts.append(_apart_over_time(across, rated, axis, ticks))
    return charts


def _apart_over_time(
    across: npt.NDArray[np.float64], rated: list[dict[str, Scores]], axis: Axis, ticks: list[Tick]
) -> Chart:
    splits = [one for one in (split(row["a"].colour, row["b"].colour) for row in rated) if one]
    half = Axis(0.5, 1)
    return Chart(
        title="Columns apart in colourfulness",
        x=ticks,
        y=[Tick(half.place(v), f"{100 * v:.0f} %") for v in (0.5, 0.6, 0.7, 0.8, 0.9, 1)],
        lines=[
            line(across, np.array([s.apart for s in splits]), (axis, half), "train", "the columns"),
            line(
                across,
                np.array([s.chance_95 for s in splits]),
                (axis, half),
                "chance",
                "95 % of random splits are below",
            ),
        ],
        caption="Share of pairs, a kernel of each column, in which the one column's is more "
        "colourful: 50 % if the columns are alike, 100 % if they share nothing.",
        across=("steps", ""),
    )


def _png(pixels: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return data_uri("image/png", file)
