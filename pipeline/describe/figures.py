"""Samples of a set as small images inside the page, each byte of them checked first.

Stepped charts as SVG paths in a unit square, with ticks to be set as text around it.

The template stretches the square over any width and keeps strokes and letters at their size. A
thousand classes or fourteen million images are some hundred steps.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.images import Pixels, Undecodable, decode_image
from pipeline.describe.facts import Facts, SplitFacts
from pipeline.remote.dataset import Dataset, LocalDataset
from pipeline.stream.augment import compute_color_shift
from pipeline.stream.shard_reader import Damage, ShardReader

CHART_SIDE = 1000  # units of the square; y points down, as in SVG
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
    width = CHART_SIDE / len(heights)
    down = CHART_SIDE * (1 - np.clip(heights / top, 0, 1))
    moves = [f"V{y:.1f}H{width * (place + 1):.1f}" for place, y in enumerate(down.tolist())]
    return f"M0 {CHART_SIDE}{''.join(moves)}V{CHART_SIDE}Z"


def bars(counts: Counts) -> list[Bar]:
    """Return a bar for each class, in the order of the labels; none for more than `LISTED`."""
    if len(counts) > LISTED:
        return []
    most = max(1, int(counts.max()))
    return [Bar(label, count, count / most) for label, count in enumerate(counts.tolist())]


def class_chart(facts: SplitFacts) -> Chart:
    """Images per class, the largest class first."""
    ranked = np.sort(facts.per_class)[::-1].astype(np.float64)
    classes = len(ranked)
    drawn = ranked
    if classes > STEPS:
        places = np.linspace(0, classes - 1, STEPS).round().astype(int)
        drawn = ranked[places]
    top = max(1.0, float(ranked[0]) * 1.08)
    empty = int(np.count_nonzero(ranked == 0))
    caption = (
        f"{classes:,} classes, {ranked[-1]:,.0f} to {ranked[0]:,.0f} images each, "
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
    """Histogram of the stored bytes of an image."""
    sizes = facts.image_bytes
    if not len(sizes):
        return Chart(facts.name, "", [], [], "no images")
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


MOSAIC = 48
MOSAIC_SHARDS = 3  # of a set in a store: each is fetched whole
TINTED = 2
"""Images on which the colour draws are shown."""
DRAWS = (-2, -1, 0, 1, 2)
COLOUR = 0.1
"""Standard deviation of the draws in training, in those of the components (paper, section 4.1)."""
MEMBERS = 4
"""Images of a group of duplicates that are shown."""
REMOTE_GROUPS = 2
"""Groups shown of a set in a store, where each member may lie in another shard."""

SIDE = 144  # shown at about half of that, sharp on dense screens
TINTED_SIDE = 144
FLAT = 40
"""Standard deviation of pixel values below which an image shows little."""


@dataclass(frozen=True)
class Shown:
    """An image with what stands below it."""

    uri: str
    name: str
    note: str = ""


@dataclass(frozen=True)
class Strips:
    """What draws of -2 to +2 along one principal component do."""

    pictures: list[list[str]]
    """Each image under each draw."""
    shift: str
    """What a draw of +1 adds to R, G and B."""


@dataclass(frozen=True)
class ShownGroup:
    """Duplicates side by side."""

    pictures: list[Shown]
    headline: str
    leak: bool


class Samples:
    """Reads and decodes samples of all splits of a set."""

    def __init__(self, dataset: Dataset, facts: Facts) -> None:
        self._facts = facts
        self._dataset = dataset
        self._opened: dict[str, ShardReader] = {}
        self.local = isinstance(dataset, LocalDataset)
        self.damaged: list[str] = []
        """What could not be shown, one line each."""

    def read(self, split: str, ids: Sequence[int]) -> list[Pixels | None]:
        """Return the pixels of samples; None for those that are damaged.

        Raises:
            DataError, DuetError: a whole shard cannot be had.
        """
        storage = self._storage(split)
        places = np.array(ids, np.int64)
        views, damages = storage.read(places)
        return [
            self._decoded(storage, int(sample), view.data, damages.get(place))
            for place, (sample, view) in enumerate(zip(ids, views, strict=True))
        ]

    def labels(self, split: str, ids: Sequence[int]) -> list[int]:
        """Return the labels of samples."""
        labels: list[int] = self._storage(split).read_labels(np.array(ids, np.int64)).tolist()
        return labels

    def _storage(self, split: str) -> ShardReader:
        if split not in self._opened:
            self._opened[split] = ShardReader(self._dataset, split)
        return self._opened[split]

    def _decoded(
        self, storage: ShardReader, sample: int, data: memoryview, damage: Damage | None
    ) -> Pixels | None:
        if damage is None:
            try:
                return decode_image(data, self._facts.manifest.encoding)
            except Undecodable as error:
                damage = storage.make_damage(sample, str(error))
        self.damaged.append(str(damage))
        return None

    def close(self) -> None:
        """Close all files."""
        for storage in self._opened.values():
            storage.close()


def draw(facts: Facts, seed: int, local: bool) -> list[int]:
    """Return random samples of the first split, in a random order; of few shards if fetched."""
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


def mosaic(facts: Facts, samples: Samples, ids: list[int]) -> tuple[list[Shown], list[Pixels]]:
    """Return random images as they are stored, and their pixels; damaged ones left out."""
    first = facts.splits[0]
    found = samples.read(first.name, ids)
    labels = samples.labels(first.name, ids)
    shown, kept = [], []
    for label, sample, pixels in zip(labels, ids, found, strict=True):
        if pixels is not None:
            name = facts.title(label)
            shown.append(Shown(jpeg(pixels, SIDE), name, f"{first.name} sample {sample}, {name}"))
            kept.append(pixels)
    return shown, kept


def basis(statistics: Statistics) -> npt.NDArray[np.float64]:
    """Return the components in columns, as long as a draw of 1 is in training: in grey levels."""
    scaled: npt.NDArray[np.float64] = (
        COLOUR * statistics.eigenvectors * np.sqrt(statistics.eigenvalues)
    )
    return scaled


def tinted(pixels: Pixels, shift: npt.NDArray[np.float64]) -> Pixels:
    """Add an RGB shift [3], as training does (there it is taken off the mean)."""
    return np.clip(np.rint(pixels + shift), 0, 255).astype(np.uint8)


def strips(statistics: Statistics, pictures: Sequence[Pixels]) -> list[Strips]:
    """Return what colour draws of -2 to +2 along each component do to images."""
    made = []
    for component in range(3):
        colour = np.zeros((len(DRAWS), 3))
        colour[:, component] = DRAWS
        shifts = compute_color_shift(colour, basis(statistics))
        rows = [[jpeg(tinted(one, shift), TINTED_SIDE) for shift in shifts] for one in pictures]
        words = ", ".join(f"{value:+.1f}" for value in shifts[DRAWS.index(1)])
        made.append(Strips(rows, words))
    return made


def lively(pictures: Sequence[Pixels]) -> list[Pixels]:
    """Return images on which colours show: not flat ones, unless there are no others."""
    return sorted(pictures, key=lambda pixels: bool(pixels.std() < FLAT))[:TINTED]


def mean_picture(statistics: Statistics) -> str:
    """Return the mean image of the training set as a data URI."""
    return jpeg(np.rint(statistics.mean_picture).clip(0, 255).astype(np.uint8), 256, quality=92)


def groups(facts: Facts, samples: Samples) -> list[ShownGroup]:
    """Return the most telling groups of duplicates as images."""
    rows = facts.duplicates.groups if facts.duplicates else []
    return [
        _group(facts, samples, row) for row in (rows if samples.local else rows[:REMOTE_GROUPS])
    ]


def _group(facts: Facts, samples: Samples, row: dict[str, Any]) -> ShownGroup:
    count = row.get("count", len(row["members"]))
    shown = []
    for member in _spread(row["members"]):
        (pixels,) = samples.read(member["split"], [member["sample"]])
        if pixels is not None:
            name = facts.title(member["label"])
            shown.append(
                Shown(
                    jpeg(pixels, SIDE),
                    f"{member['split']} · {name}",
                    f"{member['split']} sample {member['sample']}, {name}: {member['name']}",
                )
            )
    words = ["same bytes" if row["kind"] == "exact" else f"{row['distance']} of 256 bits apart"]
    words += ["in several splits"] if row["leak"] else []
    words += ["labels differ"] if row["labels_differ"] else []
    words += [f"{count:,} images"] if count > len(shown) else []
    return ShownGroup(shown, ", ".join(words), bool(row["leak"]))


def _spread(members: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `MEMBERS` of a group, of every split and class among them as far as they go."""
    seen: dict[tuple[str, int], int] = {}
    rank = []
    for place, member in enumerate(members):
        kind = (member["split"], member["label"])
        rank.append((seen.setdefault(kind, 0), place))
        seen[kind] += 1
    return [members[place] for place in sorted(place for _, place in sorted(rank)[:MEMBERS])]


def jpeg(pixels: Pixels, width: int, quality: int = 80) -> str:
    """Return an image scaled to a width, as a data URI."""
    image = Image.fromarray(pixels)
    if width != image.width:
        size = (width, round(image.height * width / image.width))
        image = image.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
