"""Facts of a data set from its manifest, index, statistics and lists; as a table and as JSON."""

from __future__ import annotations

import math
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rich.console
from rich.table import Table
from rich.text import Text

from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.index import BLOCK, load_index
from pipeline.dataset.manifest import COUNTED, DUPLICATES, REJECTS, Manifest, Split, tables_folder
from pipeline.dataset.tar import escape
from pipeline.dataset.versions import SealedVersion
from pipeline.remote.answers import Mismatch
from pipeline.remote.download import Store
from pipeline.remote.filesystem import (
    is_remote,
    local_path,
)
from pipeline.remote.local import Dataset
from pipeline.tools.errors import REBUILD, DataError
from pipeline.tools.files import sha256
from pipeline.tools.jsonl import Row, read_all_rows
from pipeline.tools.text import human_bytes

LARGEST_LIST = 2**32
"""Most bytes of a list of rejects or duplicates."""
MOST_SIZES = 1 << 20
"""Different sizes of images that are told apart."""
KEPT_GROUPS = 12
"""Groups of duplicates to show."""

ORIGINAL_MEAN = (127.3, 119.7, 104.9)
ORIGINAL_DEVIATIONS = (121.78006, 37.09389, 19.72083)
ORIGINAL_VECTORS = (
    (-0.56351, -0.57618, -0.59200),
    (-0.71258, -0.02354, 0.70120),
    (0.41796, -0.81698, 0.39731),
)
"""Statistics of ImageNet in the released source (`make-data/input_meta`): channel means, and
standard deviation and RGB direction of each principal component."""


@dataclass(frozen=True)
class Sizes:
    """Distinct sizes in bytes, ascending, and how many images have each: both int64 [s].

    It takes the memory of an index of two million images at most, however many there are: sizes
    beyond so many different ones are rounded down to a whole number of 2, 4, 8, ... bytes.
    """

    values: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    @classmethod
    def count(cls, blocks: Iterable[npt.NDArray[np.uint32]]) -> Sizes:
        """Count the sizes of blocks of images."""
        values, counts, unit = np.zeros(0, np.int64), np.zeros(0, np.int64), 1
        for block in blocks:
            new, times = np.unique(block, return_counts=True)
            both = np.concatenate([values, new.astype(np.int64) // unit * unit])
            values, places = np.unique(both, return_inverse=True)
            counts = np.bincount(places, np.concatenate([counts, times])).astype(np.int64)
            while len(values) > MOST_SIZES:
                unit *= 2
                values, places = np.unique(values // unit * unit, return_inverse=True)
                counts = np.bincount(places, counts).astype(np.int64)
        return cls(values, counts)

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Mean size in bytes."""
        return float(self.values @ self.counts) / len(self)

    def percentile(self, share: float) -> float:
        """Return the size that `share` percent of the images have at most, as `np.percentile`."""
        place = (len(self) - 1) * share / 100
        ends = np.cumsum(self.counts)
        low, high = (
            float(self.values[np.searchsorted(ends, at, side="right")])
            for at in (math.floor(place), math.ceil(place))
        )
        return low + (high - low) * (place - math.floor(place))


@dataclass(frozen=True)
class SplitFacts:
    """One split in numbers."""

    name: str
    split: Split
    per_class: npt.NDArray[np.int64]
    """Images of each class; without classes, of all."""
    image_bytes: Sizes
    """Stored bytes of the images."""


@dataclass(frozen=True)
class Component:
    """A principal component of the colors, beside the original's."""

    deviation: float
    vector: tuple[float, ...]
    """R, G, B."""
    original_deviation: float
    original_vector: tuple[float, ...]
    """Its sign is chosen to match ours: the sign of a component is arbitrary."""
    degrees_apart: float
    """Angle between the two directions, in degrees."""


@dataclass(frozen=True)
class Reason:
    """A reason for which images were rejected."""

    reason: str
    """Text of the reason without its numbers."""
    count: int
    example: str


@dataclass(frozen=True)
class Duplicates:
    """Content of `duplicates.jsonl`."""

    counts: dict[str, int]
    """Counts of groups, pictures, exact, near, leaks, labels_differ."""
    groups: list[dict[str, Any]]
    """First rows by weight: leaks, then differing labels, then the rest as listed."""


@dataclass(frozen=True)
class Facts:
    """All numbers of a data set."""

    data: str
    """Folder or address as the user gave it."""
    manifest: Manifest
    splits: list[SplitFacts]
    statistics: Statistics
    components: list[Component]
    reasons: list[Reason] | None
    """Most frequent first; None if the list is missing."""
    duplicates: Duplicates | None
    """None if no search was made."""
    history: tuple[SealedVersion, ...]
    """All versions of the data set up to this one, the newest first."""

    def title(self, label: int) -> str:
        """Return the readable name of a class."""
        manifest = self.manifest
        return (manifest.titles or manifest.classes)[label] if manifest.classes else "no label"


def gather_facts(data: str, dataset: Dataset) -> Facts:
    """Read all facts that need no shard.

    Raises:
        DataError: index, statistics or a list differ from the manifest.
    """
    manifest = Manifest.load(dataset.folder)
    statistics = Statistics.load(dataset.folder, manifest)
    return Facts(
        data=data,
        manifest=manifest,
        splits=[_count_split(name, dataset, manifest) for name in manifest.splits],
        statistics=statistics,
        components=[_compare_component(statistics, place) for place in range(3)],
        reasons=_count_reasons(data, dataset, manifest) if manifest.rejected else [],
        duplicates=_count_duplicates(data, dataset, manifest),
        history=tuple(dataset.list_versions()),
    )  # fmt: skip


def _count_split(name: str, dataset: Dataset, manifest: Manifest) -> SplitFacts:
    rows = load_index(dataset.folder, name, manifest)
    counts = np.zeros(max(1, len(manifest.classes)), np.int64)
    blocks = [slice(start, start + BLOCK) for start in range(0, len(rows), BLOCK)]
    for block in blocks:  # without classes, all are of one
        counts += np.bincount(np.maximum(rows["label"][block], 0), minlength=len(counts))
    sizes = Sizes.count(rows["size"][block] for block in blocks)
    return SplitFacts(name, manifest.splits[name], counts, sizes)


def _compare_component(statistics: Statistics, place: int) -> Component:
    vector = statistics.eigenvectors[:, place]
    original = np.array(ORIGINAL_VECTORS[place])
    along = float(vector @ original)
    return Component(
        deviation=float(np.sqrt(statistics.eigenvalues[place])),
        vector=tuple(vector.tolist()),
        original_deviation=ORIGINAL_DEVIATIONS[place],
        original_vector=tuple((original if along >= 0 else -original).tolist()),
        degrees_apart=float(np.degrees(np.arccos(min(1.0, abs(along))))),
    )


def _count_reasons(data: str, dataset: Dataset, manifest: Manifest) -> list[Reason] | None:
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    with _open_list(data, dataset, manifest, REJECTS) as path:
        if path is None:
            return None
        for row in _read_rows(path):
            reason = re.sub(r"\d[\d,.]*", "…", str(row["reason"]))
            counts[reason] += 1
            examples.setdefault(reason, str(row["name"]))
    return [Reason(reason, count, examples[reason]) for reason, count in counts.most_common()]


def _count_duplicates(data: str, dataset: Dataset, manifest: Manifest) -> Duplicates | None:
    if is_remote(data) and not manifest.duplicates and manifest.duplicates_sha256 is None:
        return None  # no search was made, and a store is slow to answer
    counts = dict.fromkeys(("groups", "pictures", "exact", "near", "leaks", "labels_differ"), 0)
    shown: dict[tuple[bool, bool], list[dict[str, Any]]] = {}
    with _open_list(data, dataset, manifest, DUPLICATES) as path:
        if path is None:
            return None
        for row in _read_rows(path):
            leak, differ = bool(row["leak"]), bool(row["labels_differ"])
            counts["groups"] += 1
            counts["pictures"] += row.get("count", len(row["members"]))
            counts["exact" if row["kind"] == "exact" else "near"] += 1
            counts["leaks"] += leak
            counts["labels_differ"] += differ
            alike = shown.setdefault((not leak, not differ), [])
            if len(alike) < KEPT_GROUPS:
                alike.append(row)
    telling = [row for rank in sorted(shown) for row in shown[rank]]
    return Duplicates(counts, telling[:KEPT_GROUPS])


@contextmanager
def _open_list(data: str, dataset: Dataset, manifest: Manifest, name: str) -> Iterator[Path | None]:
    """Yield the path of a list beside the manifest, checked if its hash is known; None if missing.

    Raises:
        DataError: the list is not the one that was built.
        StoreError: the store does not answer.
    """
    expected = getattr(manifest, f"{Path(name).stem}_sha256")
    if not is_remote(data):
        path = tables_folder(local_path(data), manifest) / name
        if path.is_file() and expected not in (None, sha256(path)):
            raise DataError(f"{path} is not the one that was built; restore it, or {REBUILD}")
        yield path if path.is_file() else None
        return

    def check(path: Path) -> None:
        if expected not in (None, sha256(path)):
            raise Mismatch("SHA-256 differs from the manifest")

    with tempfile.TemporaryDirectory(prefix="duet-") as folder:
        address = f"{data.rstrip('/')}/{manifest.tables_in}"
        yield Store(address).fetch(
            name, Path(folder), check, limit=LARGEST_LIST, stop=threading.Event()
        )


def _read_rows(path: Path) -> Iterator[Row]:
    try:
        yield from read_all_rows(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); {REBUILD}") from error


def describe_encoding(facts: Facts) -> str:
    """Return the encoding of the images in a few words."""
    manifest = facts.manifest
    if manifest.encoding == "raw":
        return f"raw {manifest.describe_size()} pixels"
    size = manifest.describe_size()
    parts = [f"{size} JPEG" if manifest.side else f"JPEG of {size}"]
    parts += [f"quality {manifest.quality}"] if manifest.quality is not None else []
    parts += [manifest.chroma] if manifest.chroma else []
    return ", ".join(parts)


def describe_duplicates(facts: Facts) -> str:
    """Return the counts of duplicates in a line."""
    if facts.duplicates is None:
        return "not looked for" if not facts.manifest.duplicates else "list missing"
    counts = facts.duplicates.counts
    if not counts["groups"]:
        return "none"
    return (
        f"{counts['pictures']:,} images in {counts['groups']:,} groups "
        f"({counts['exact']:,} exact, {counts['near']:,} near), "
        f"{counts['leaks']:,} in more than one split, "
        f"{counts['labels_differ']:,} with differing labels"
    )


def to_json(facts: Facts, page: str) -> dict[str, Any]:
    """Return all numbers as one object; pixel values are 0..255, channels R, G, B."""
    manifest, statistics, reasons = facts.manifest, facts.statistics, facts.reasons
    return {
        "data": facts.data,
        "page": page,
        "encoding": manifest.encoding,
        "image_size": manifest.image_size,
        "fit": manifest.fit,
        "quality": manifest.quality,
        "chroma": manifest.chroma,
        "seed": manifest.seed,
        "sources": manifest.sources,
        "libraries": manifest.libraries,
        "classes": len(manifest.classes),
        "splits": {one.name: _summarize_split(one) for one in facts.splits},
        "channel_mean": statistics.channel_mean.tolist(),
        "channel_deviation": np.sqrt(np.diag(statistics.covariance)).tolist(),
        "eigenvalues": statistics.eigenvalues.tolist(),
        "components": [asdict(one) for one in facts.components],
        "original_channel_mean": ORIGINAL_MEAN,
        "rejected": manifest.rejected,
        "rejects": None if reasons is None else {one.reason: one.count for one in reasons},
        "duplicates": None if facts.duplicates is None else facts.duplicates.counts,
        "versions": [
            {
                "number": one.number,
                "sha256": one.identity,
                "samples": {name: split.samples for name, split in one.manifest.splits.items()},
                "change": one.manifest.change,
            }
            for one in facts.history
        ],
    }


def _summarize_split(facts: SplitFacts) -> dict[str, Any]:
    counts, sizes = facts.per_class, facts.image_bytes
    measures: dict[str, Callable[[Sizes], float]] = {
        "least": lambda one: int(one.values[0]),
        "median": lambda one: one.percentile(50),
        "mean": lambda one: one.mean,
        "most": lambda one: int(one.values[-1]),
    }
    return {
        "samples": facts.split.samples,
        "shards": len(facts.split.shards),
        "bytes": facts.split.bytes,
        "pictures_per_class": {
            "least": int(counts.min()),
            "median": float(np.median(counts)),
            "most": int(counts.max()),
            "empty": int(np.count_nonzero(counts == 0)),
        },
        "bytes_per_picture": {
            name: measure(sizes) if len(sizes) else None for name, measure in measures.items()
        },
    }


def print_tables(facts: Facts, console: rich.console.Console) -> None:
    """Print all numbers for a person."""
    console.print(Text(f"{facts.data}: {describe_encoding(facts)}"), soft_wrap=True)
    console.print(_split_table(facts))
    console.print(_color_table(facts))
    mean = "  ".join(f"{value:.2f}" for value in facts.statistics.channel_mean)
    original = "  ".join(f"{value:.1f}" for value in ORIGINAL_MEAN)
    for line in (
        f"channel means  {mean}   (original {original})",
        f"duplicates     {describe_duplicates(facts)}",
        f"rejected       {facts.manifest.rejected:,}",
        *(f"  {reason.count:>8,}  {reason.reason}" for reason in facts.reasons or []),
        *(
            f"version {one.number:<6} {one.identity[:16]}  {describe_change(one)}"
            for one in facts.history
        ),
    ):
        console.print(Text(line), soft_wrap=True)


def describe_change(version: SealedVersion) -> str:
    """Return what a version changed, in a few words."""
    change = version.manifest.change
    if version.number == 1:
        return "packed" if not version.manifest.foreign else "indexed in place"
    words = [f"{change[key]:,} {key}" for key in COUNTED if change.get(key)]
    sources = (f"from {escape(source)}" for source in change.get("sources", {}).values())
    return " ".join([", ".join(words) or "no samples changed", *sources])


def _new_table(first: str, *others: str) -> Table:
    table = Table(first, box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in others:
        table.add_column(name, justify="right")
    return table


def _split_table(facts: Facts) -> Table:
    table = _new_table("split", "images", "shards", "size", "an image", "classes", "images a class")
    for one in facts.splits:
        counts, sizes = one.per_class, one.image_bytes
        table.add_row(
            one.name,
            f"{one.split.samples:,}",
            f"{len(one.split.shards):,}",
            human_bytes(one.split.bytes),
            human_bytes(sizes.mean) if len(sizes) else "–",
            f"{np.count_nonzero(counts):,}" if facts.manifest.classes else "none",
            f"{counts.min():,}–{counts.max():,}"
            if counts.min() < counts.max()
            else f"{counts.max():,} each",
        )
    return table


def _color_table(facts: Facts) -> Table:
    table = _new_table("colour component", "variance", "deviation", "R, G, B", "original",
                       "its R, G, B", "degrees apart")  # fmt: skip
    for place, one in enumerate(facts.components):
        table.add_row(
            f"{place + 1}",
            f"{facts.statistics.eigenvalues[place]:,.1f}",
            f"{one.deviation:.2f}",
            " ".join(f"{value:+.3f}" for value in one.vector),
            f"{one.original_deviation:.2f}",
            " ".join(f"{value:+.3f}" for value in one.original_vector),
            f"{one.degrees_apart:.1f}",
        )
    return table
