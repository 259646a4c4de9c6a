"""Distances of pairs of one class and of two, their histogram, and the sheet of figure 4."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cluster.experiments.neighbors.features import Features, Ids
from cluster.experiments.neighbors.search import Floats, compute_squared_distances
from pipeline.dataset.images import Pixels
from pipeline.remote.local import Dataset
from pipeline.stream.shard_reader import Damage, ShardReader
from pipeline.tools.charts import (
    CHECK,
    COLUMN_A,
    INK,
    SOFT,
    draw_columns,
    new_axes,
    round_up,
    save_figure,
)
from pipeline.tools.files import atomic_write

CHUNK = 1 << 24
"""Numbers read at a time for distances of pairs."""
BINS = 60


@dataclass(frozen=True)
class Pairs:
    """L2 distances (not squared) of random pairs of a query and an image of the base."""

    same: Floats
    """float64 [n]: pairs of the same class."""
    other: Floats
    """float64 [n]: pairs of different classes."""

    @property
    def auc(self) -> float:
        """Chance that a pair of one class is closer than one of two, ties counted half.

        0.5: the features carry nothing about the classes; 1: they separate them perfectly.
        """
        others = np.sort(self.other)
        below = np.searchsorted(others, self.same, "left")
        up_to = np.searchsorted(others, self.same, "right")
        return float(1 - (below + up_to).mean() / (2 * len(others)))

    @property
    def auc_error(self) -> float:
        """Standard error of `auc` over draws of pairs (Hanley and McNeil 1982, equation 2)."""
        a, n = self.auc, len(self.same)
        q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
        return math.sqrt((a * (1 - a) + (n - 1) * (q1 + q2 - 2 * a * a)) / (n * n))

    @property
    def ratio(self) -> float:
        """Mean distance within classes over that across them; NaN if both are 0."""
        across = float(self.other.mean())
        return float(self.same.mean()) / across if across else math.nan

    def compute_histogram(self) -> tuple[Floats, Floats, Floats]:
        """Edges float64 [bins + 1]; shares of same-class and of other pairs, float64 [bins]."""
        both = np.concatenate((self.same, self.other))
        low, high = float(both.min()), float(np.quantile(both, 0.999))
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
        same, other = (
            np.histogram(values.clip(edges[0], edges[-1]), edges)[0] / len(values)
            for values in (self.same, self.other)
        )
        return edges, same, other


def sample_pairs(queries: Features, base: Features, count: int, seed: int) -> Pairs | None:
    """Draw pairs of each kind; an image is never paired with itself.

    Args:
        queries: one side of the pairs; may be `base`.
        base: the other side.
        count: number of pairs of each kind.
        seed: seed of the draw.

    Returns:
        None if there is only one class, or no two images share a class.
    """
    rng = np.random.default_rng([seed, 8])
    rows = np.flatnonzero(base.sound)
    rows = rows[np.argsort(base.labels[rows], kind="stable")]
    sizes = np.bincount(base.labels[rows], minlength=len(base.about.classes))
    starts = np.concatenate(([0], np.cumsum(sizes)))
    asked = np.flatnonzero(queries.sound)
    itself = queries.about == base.about
    mates = sizes[queries.labels[asked]] - itself
    with_mates, with_others = asked[mates > 0], asked[sizes[queries.labels[asked]] < len(rows)]
    if not len(with_mates) or not len(with_others):
        return None
    one = rng.choice(with_mates, count)
    label = queries.labels[one]
    turn = rng.integers(0, sizes[label] - itself)
    if itself:  # skip the query itself in its class
        rank = np.empty(len(base.labels), np.int64)
        rank[rows] = np.arange(len(rows))
        turn += turn >= rank[one] - starts[label]
    same = _measure_pairs(queries, one, base, rows[starts[label] + turn])
    two = rng.choice(with_others, count)
    label = queries.labels[two]
    turn = rng.integers(0, len(rows) - sizes[label])
    turn += np.where(turn >= starts[label], sizes[label], 0)
    return Pairs(same, _measure_pairs(queries, two, base, rows[turn]))


def _measure_pairs(queries: Features, ids: Ids, base: Features, others: Ids) -> Floats:
    """L2 distances of pairs; rows of the base are read in the order of the file."""
    order = np.argsort(others)
    far = np.empty(len(ids))
    size = max(1, CHUNK // base.about.units)
    for start in range(0, len(ids), size):
        part = order[start : start + size]
        far[part] = compute_squared_distances(queries.values[ids[part]], base.values[others[part]])
    return np.sqrt(far)


def save_histogram(pairs: Pairs, title: str, path: Path) -> None:
    """Draw both distributions of distances into one SVG file."""
    edges, same, other = pairs.compute_histogram()
    top = round_up(float(max(same.max(), other.max())))
    axes = new_axes((edges[0], edges[-1]), (0, top), width=600, height=300,
                    margins=(46, 14, 52, 42))  # fmt: skip
    axes.figure.patch.set(visible=True, facecolor="white")
    for values, heights, name, color, side, away in (
        (pairs.other, other, "different classes", COLUMN_A, "left", 5),
        (pairs.same, same, "same class", CHECK, "right", -5),
    ):
        draw_columns(axes, edges, heights, color, name, alpha=0.45)
        mean = float(values.mean())
        axes.axvline(mean, color=color, linestyle="--", linewidth=1)
        axes.annotate(
            f"mean {mean:.3g}", (mean, 1), (away, -12), ("data", "axes fraction"),
            "offset points", ha=side, color=color,
        )  # fmt: skip
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, reverse=True)
    axes.text(0, 1.15, title, transform=axes.transAxes, fontsize=12, color=INK)
    axes.text(1, 1.04, f"AUC {pairs.auc:.3f}", transform=axes.transAxes, ha="right", color=INK)
    axes.set_xlabel("L2 distance of fc7 features; up: share of the pairs in a bin", color=SOFT)
    with atomic_write(path) as file:
        save_figure(axes.figure, file, "svg")


SIDE = 128
FRAME = 4
PITCH = SIDE + 2 * FRAME + 8
NAME = 20
"""Height of the line with the class name, in pixels."""
GAP = 20
"""Space between a query and its neighbors, in pixels."""
HEAD = 26
EDGE = 10
PAPER = "#fbfaf7"


@dataclass(frozen=True)
class SheetImage:
    """An image on the sheet."""

    pixels: Pixels | None
    """None if the image is damaged."""
    label: int


def read_images(dataset: Dataset, split: str, ids: Sequence[int]) -> list[SheetImage]:
    """Read images of a split.

    Raises:
        DataError, DuetError: a whole shard cannot be had.
    """
    with closing(ShardReader(dataset, split)) as reader:
        labels = reader.read_labels(np.array(ids, np.int64)).tolist()
        return [
            SheetImage(None if isinstance(pixels, Damage) else pixels, label)
            for pixels, label in zip(reader.decode(ids), labels, strict=True)
        ]


def choose_queries(labels: Ids, count: int, seed: int) -> Ids:
    """Choose queries at random, one of each class before the second of any.

    Args:
        labels: int64 [n], classes of the candidates.
        count: number of queries.
        seed: seed of the draw.

    Returns:
        int64 [count], indices into `labels`.
    """
    order = np.random.default_rng([seed, 4]).permutation(len(labels))
    turn = np.zeros(len(labels), np.int64)
    seen: dict[int, int] = {}
    for index in order:
        label = int(labels[index])
        turn[index] = seen[label] = seen.get(label, -1) + 1
    return order[np.argsort(turn[order], kind="stable")][:count]


def draw_sheet(
    queries: Sequence[SheetImage], found: Sequence[Sequence[SheetImage]], names: Sequence[str],
    notes: Sequence[str],
) -> Image.Image:  # fmt: skip
    """Draw the contact sheet.

    Args:
        queries: query of each row.
        found: neighbors of each query, the nearest first.
        names: names of the classes.
        notes: two short texts, above the queries and above the neighbors.
    """
    across = max(len(row) for row in found)
    width = 2 * EDGE + (1 + across) * PITCH + GAP
    height = HEAD + 2 * EDGE + len(queries) * (PITCH + NAME)
    image = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    for note, left in zip(notes, (EDGE, EDGE + PITCH + GAP), strict=True):
        pen.text((left, EDGE), note, SOFT, font)
    for row, (query, others) in enumerate(zip(queries, found, strict=True)):
        top = HEAD + EDGE + row * (PITCH + NAME)
        _put(image, (EDGE, top), query, INK, names[query.label])
        for column, other in enumerate(others):
            right = other.label == query.label
            left = EDGE + GAP + (1 + column) * PITCH
            name = names[other.label] if right else f"x {names[other.label]}"
            _put(image, (left, top), other, CHECK if right else COLUMN_A, name)
    return image


def _put(image: Image.Image, at: tuple[int, int], shown: SheetImage, color: str, name: str) -> None:
    left, top = at
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    side = SIDE + 2 * FRAME
    pen.rectangle((left, top, left + side - 1, top + side - 1), fill=color)
    if shown.pixels is not None:
        small = Image.fromarray(shown.pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.paste(small, (left + FRAME, top + FRAME))
    pen.text((left, top + side + 2), fit_text(name, font, side), color, font)


def fit_text(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """Shorten a text to a width in pixels."""
    shown = text
    while text and font.getlength(shown) > width:
        text = text[:-1]
        shown = f"{text}…"
    return shown
