"""Samples of a set as small pictures inside the page, each byte of them checked first."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.images import Pixels
from pipeline.describe.facts import Facts
from pipeline.remote.dataset import DataSet, LocalSet
from pipeline.stored_picture import Undecodable, pixels_of
from pipeline.stream.augment import tint
from pipeline.stream.shard_reader import Damage, Storage

MOSAIC = 48
MOSAIC_SHARDS = 3  # of a set in a store: each is fetched whole
TINTED = 2
"""Pictures on which the colour draws are shown."""
DRAWS = (-2, -1, 0, 1, 2)
COLOUR = 0.1
"""Standard deviation of the draws in training, in those of the components (paper, section 4.1)."""
MEMBERS = 4
"""Pictures of a group of duplicates that are shown."""
REMOTE_GROUPS = 2
"""Groups shown of a set in a store, where each member may lie in another shard."""

SIDE = 144  # shown at about half of that, sharp on dense screens
TINTED_SIDE = 144
FLAT = 40
"""Standard deviation of pixel values below which a picture shows little."""


@dataclass(frozen=True)
class Shown:
    """A picture with what stands below it."""

    uri: str
    name: str
    note: str = ""


@dataclass(frozen=True)
class Strips:
    """What draws of -2 to +2 along one principal component do."""

    pictures: list[list[str]]
    """Each picture under each draw."""
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

    def __init__(self, dataset: DataSet, facts: Facts) -> None:
        self._facts = facts
        self._dataset = dataset
        self._opened: dict[str, Storage] = {}
        self.local = isinstance(dataset, LocalSet)
        self.damaged: list[str] = []
        """What could not be shown, one line each."""

    def read(self, split: str, ids: Sequence[int]) -> list[Pixels | None]:
        """Return the pixels of samples; None for those that are damaged.

        Raises:
            DataError, DuetError: a whole shard cannot be had.
        """
        storage = self._storage(split)
        places = np.array(ids, np.int64)
        views, damages = storage.read(places, np.empty(storage.room(places), np.uint8))
        return [
            self._decoded(storage, int(sample), view.data, damages.get(place))
            for place, (sample, view) in enumerate(zip(ids, views, strict=True))
        ]

    def labels(self, split: str, ids: Sequence[int]) -> list[int]:
        """Return the labels of samples."""
        labels: list[int] = self._storage(split).labels(np.array(ids, np.int64)).tolist()
        return labels

    def _storage(self, split: str) -> Storage:
        if split not in self._opened:
            self._opened[split] = Storage(self._dataset, split)
        return self._opened[split]

    def _decoded(
        self, storage: Storage, sample: int, data: memoryview, damage: Damage | None
    ) -> Pixels | None:
        if damage is None:
            try:
                return pixels_of(data, self._facts.manifest.encoding)
            except Undecodable as error:
                damage = storage.damage(sample, str(error))
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
    """Return random pictures as they are stored, and their pixels; damaged ones left out."""
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
    """Return what colour draws of -2 to +2 along each component do to pictures."""
    made = []
    for component in range(3):
        colour = np.zeros((len(DRAWS), 3))
        colour[:, component] = DRAWS
        shifts = tint(colour, basis(statistics))
        rows = [[jpeg(tinted(one, shift), TINTED_SIDE) for shift in shifts] for one in pictures]
        words = ", ".join(f"{value:+.1f}" for value in shifts[DRAWS.index(1)])
        made.append(Strips(rows, words))
    return made


def lively(pictures: Sequence[Pixels]) -> list[Pixels]:
    """Return pictures on which colours show: not flat ones, unless there are no others."""
    return sorted(pictures, key=lambda pixels: bool(pixels.std() < FLAT))[:TINTED]


def mean_picture(statistics: Statistics) -> str:
    """Return the mean picture of the training set as a data URI."""
    return jpeg(np.rint(statistics.mean_picture).clip(0, 255).astype(np.uint8), 256, quality=92)


def groups(facts: Facts, samples: Samples) -> list[ShownGroup]:
    """Return the most telling groups of duplicates as pictures."""
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
    words += [f"{count:,} pictures"] if count > len(shown) else []
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
    """Return a picture scaled to a width, as a data URI."""
    image = Image.fromarray(pixels)
    if width != image.width:
        size = (width, round(image.height * width / image.width))
        image = image.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
