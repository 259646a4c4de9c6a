"""Charts and sample images of the page; every byte of a sample is checked against its CRC-32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.images import Pixels
from pipeline.describe.facts import Facts, SplitFacts
from pipeline.remote.local import Dataset, LocalDataset
from pipeline.stream.augment import compute_color_shift
from pipeline.stream.shard_reader import Damage, ShardReader
from pipeline.tools.charts import (
    COLUMN_A,
    Bar,
    Chart,
    Floats,
    Label,
    as_chart,
    draw_columns,
    encode_image,
    new_axes,
)
from pipeline.tools.text import short_number

BINS = 60
STEPS = 400
"""Classes that get a column of their own in a chart."""
LISTED = 40
"""Classes up to which each is named."""
MOSAIC = 48
MOSAIC_SHARDS = 3
"""Shards that a sample of a remote data set comes from: each is downloaded whole."""
TINTED = 2
"""Images that show the random color shifts."""
DRAWS = (-2, -1, 0, 1, 2)
COLOUR = 0.1
"""Standard deviation of the shifts over that of the component (paper, section 4.1)."""
MEMBERS = 4
"""Images shown of a group of duplicates."""
REMOTE_GROUPS = 2
"""Groups shown of a remote data set, where each member may be in another shard."""

SIDE = 144  # shown at about half of that, sharp on dense screens
QUALITY = 80
FLAT = 40
"""Standard deviation of pixel values below which an image is too flat to show colors."""


def make_class_bars(facts: Facts, split: SplitFacts) -> list[Bar]:
    """Return a bar for each class, in the order of the labels; none for more than `LISTED`."""
    counts = split.per_class
    if len(counts) > LISTED:
        return []
    most = max(1, int(counts.max()))
    return [
        Bar(facts.title(label), f"{count:,}", count / most)
        for label, count in enumerate(counts.tolist())
    ]


def draw_class_chart(facts: SplitFacts, is_alone: bool) -> Chart:
    """Draw images per class, the largest class first; wide where the chart `is_alone`."""
    ranked = np.sort(facts.per_class)[::-1].astype(np.float64)
    classes = len(ranked)
    places = np.linspace(0, classes - 1, min(classes, STEPS)).round().astype(int)
    edges = np.linspace(0, classes, len(places) + 1)
    empty = int(np.count_nonzero(ranked == 0))
    caption = (
        f"{classes:,} classes, {ranked[-1]:,.0f} to {ranked[0]:,.0f} images each, "
        f"median {np.median(ranked):,.0f}" + (f"; {empty:,} without any" if empty else "")
    )
    return _draw_step_chart(facts.name, edges, ranked[places], short_number, caption, is_alone)


def draw_size_chart(facts: SplitFacts, is_alone: bool) -> Chart:
    """Draw the histogram of the stored bytes of an image; wide where the chart `is_alone`."""
    sizes = facts.image_bytes
    if not len(sizes):
        return Chart(facts.name, Markup(), (), "no images")
    most = sizes.percentile(99.8) * 1.05
    counts, edges = np.histogram(sizes.values, BINS, (0, most), weights=sizes.counts)
    beyond = int(sizes.counts[sizes.values > most].sum())
    caption = (
        f"{sizes.values[0] / 1e3:,.1f} to {sizes.values[-1] / 1e3:,.1f} kB, "
        f"mean {sizes.mean / 1e3:,.1f}, median {sizes.percentile(50) / 1e3:,.1f}"
        + (f"; {beyond:,} beyond the right edge" if beyond else "")
    )
    return _draw_step_chart(facts.name, edges, counts.astype(np.float64),
                            lambda size: f"{size / 1e3:g} kB", caption, is_alone)  # fmt: skip


def _draw_step_chart(
    title: str, edges: Floats, heights: Floats, label: Label, caption: str, is_alone: bool
) -> Chart:
    """Draw columns side by side: [n] heights between [n + 1] edges."""
    axes = new_axes(
        (0, edges[-1]), (0, max(1.0, float(heights.max()) * 1.08)), label,
        lambda value: short_number(value) if value == round(value) else "",
        940 if is_alone else 440, 210, margins=(46, 8, 8, 26),
    )  # fmt: skip
    draw_columns(axes, edges, heights, COLUMN_A)
    return as_chart(axes, title, caption)


@dataclass(frozen=True)
class CardImage:
    """An image of the page and its caption."""

    uri: str
    name: str
    note: str = ""


@dataclass(frozen=True)
class ColorStrips:
    """Images under shifts of -2 to +2 along one principal component."""

    images: list[list[str]]
    """Data URIs of each image under each shift."""
    shift: str
    """Change of R, G and B by a shift of +1."""


@dataclass(frozen=True)
class ImageGroup:
    """Images of a group of duplicates."""

    images: list[CardImage]
    headline: str
    leak: bool


class Samples:
    """Reads and decodes samples of all splits of a data set."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._opened: dict[str, ShardReader] = {}
        self.local = isinstance(dataset, LocalDataset)
        self.damaged: list[str] = []
        """A line for each damaged sample."""

    def read(self, split: str, ids: Sequence[int]) -> list[Pixels | None]:
        """Return the pixels of samples; None for those that are damaged.

        Raises:
            DataError, DuetError: a whole shard cannot be read.
        """
        found = self._storage(split).decode(ids)
        self.damaged += [str(one) for one in found if isinstance(one, Damage)]
        return [None if isinstance(one, Damage) else one for one in found]

    def labels(self, split: str, ids: Sequence[int]) -> list[int]:
        """Return the labels of samples."""
        labels: list[int] = self._storage(split).read_labels(np.array(ids, np.int64)).tolist()
        return labels

    def _storage(self, split: str) -> ShardReader:
        if split not in self._opened:
            self._opened[split] = ShardReader(self._dataset, split)
        return self._opened[split]

    def close(self) -> None:
        """Close all files."""
        for storage in self._opened.values():
            storage.close()


def sample_ids(facts: Facts, seed: int, local: bool) -> list[int]:
    """Return random ids of the first split; those of a remote data set are from few shards."""
    first = facts.splits[0]
    rng = np.random.default_rng([seed, 0])
    if local:
        drawn = rng.permutation(first.split.samples)
    else:
        ends = np.cumsum([shard.samples for shard in first.split.shards])
        shards = rng.permutation(len(ends))[:MOSAIC_SHARDS]
        drawn = np.concatenate([np.arange(ends[n - 1] if n else 0, ends[n]) for n in shards])
        drawn = rng.permutation(drawn)
    ids: list[int] = drawn[:MOSAIC].tolist()
    return ids


def load_mosaic(
    facts: Facts, samples: Samples, ids: list[int]
) -> tuple[list[CardImage], list[Pixels]]:
    """Return images as they are stored, and their pixels, without damaged ones."""
    split = facts.splits[0].name
    shown, kept = [], []
    for label, sample, pixels in zip(
        samples.labels(split, ids), ids, samples.read(split, ids), strict=True
    ):
        if pixels is not None:
            name = facts.title(label)
            note = f"{split} sample {sample}, {name}"
            shown.append(CardImage(encode_image(pixels, SIDE, QUALITY), name, note))
            kept.append(pixels)
    return shown, kept


def compute_basis(statistics: Statistics) -> npt.NDArray[np.float64]:
    """Return float64 [3, 3]: R, G, B (rows) of a shift of +1 along each component, 0..255."""
    return COLOUR * statistics.eigenvectors * np.sqrt(statistics.eigenvalues)


def add_shift(pixels: Pixels, shift: npt.NDArray[np.float64]) -> Pixels:
    """Add an RGB shift [3], as training does by subtracting it from the mean."""
    return np.clip(np.rint(pixels + shift), 0, 255).astype(np.uint8)


def make_strips(statistics: Statistics, images: Sequence[Pixels]) -> list[ColorStrips]:
    """Return images under shifts of -2 to +2 along each component."""
    made = []
    for component in np.eye(3):
        shifts = compute_color_shift(np.outer(DRAWS, component), compute_basis(statistics))
        rows = [
            [encode_image(add_shift(one, shift), SIDE, QUALITY) for shift in shifts]
            for one in images
        ]
        words = ", ".join(f"{value:+.1f}" for value in shifts[DRAWS.index(1)])
        made.append(ColorStrips(rows, words))
    return made


def choose_lively(images: Sequence[Pixels]) -> list[Pixels]:
    """Return `TINTED` images, flat ones only if there are no others."""
    return sorted(images, key=lambda pixels: bool(pixels.std() < FLAT))[:TINTED]


def load_groups(facts: Facts, samples: Samples) -> list[ImageGroup]:
    """Return the first groups of duplicates as images."""
    rows = facts.duplicates.groups if facts.duplicates else []
    most = None if samples.local else REMOTE_GROUPS
    return [_load_group(facts, samples, row) for row in rows[:most]]


def _load_group(facts: Facts, samples: Samples, row: dict[str, Any]) -> ImageGroup:
    count = row.get("count", len(row["members"]))
    shown = []
    for member in _choose_members(row["members"]):
        (pixels,) = samples.read(member["split"], [member["sample"]])
        if pixels is not None:
            split, name = member["split"], facts.title(member["label"])
            note = f"{split} sample {member['sample']}, {name}: {member['name']}"
            uri = encode_image(pixels, SIDE, QUALITY)
            shown.append(CardImage(uri, f"{split} · {name}", note))
    words = ["same bytes" if row["kind"] == "exact" else f"{row['distance']} of 256 bits apart"]
    words += ["in several splits"] if row["leak"] else []
    words += ["labels differ"] if row["labels_differ"] else []
    words += [f"{count:,} images"] if count > len(shown) else []
    return ImageGroup(shown, ", ".join(words), bool(row["leak"]))


def _choose_members(members: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `MEMBERS` of a group, from as many splits and classes as there are."""
    seen: Counter[tuple[str, int]] = Counter()
    rank = []
    for place, member in enumerate(members):
        kind = (member["split"], member["label"])
        rank.append((seen[kind], place))
        seen[kind] += 1
    return [members[place] for place in sorted(place for _, place in sorted(rank)[:MEMBERS])]
