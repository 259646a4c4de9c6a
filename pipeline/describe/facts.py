"""What a data set says of itself, and what its index and its lists say: numbers only."""

from __future__ import annotations

import json
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.index import Index, load_index
from pipeline.dataset.manifest import Manifest, Split
from pipeline.remote.dataset import DataSet, is_remote
from pipeline.tools.errors import REBUILD, DataError
from pipeline.tools.files import sha256

REJECTS = "rejects.jsonl"
DUPLICATES = "duplicates.jsonl"
LARGEST_LIST = 2**32
"""More bytes than this are no list of rejects or duplicates."""
KEPT_GROUPS = 12
"""Groups of duplicates that are kept to be shown."""

ORIGINAL_MEAN = (127.3, 119.7, 104.9)
ORIGINAL_DEVIATIONS = (121.78006, 37.09389, 19.72083)
ORIGINAL_VECTORS = (
    (-0.56351, -0.57618, -0.59200),
    (-0.71258, -0.02354, 0.70120),
    (0.41796, -0.81698, 0.39731),
)
"""Of the released source's training set, ImageNet (`make-data/input_meta`): channel means, and the
standard deviation and the RGB direction of each principal component."""


@dataclass(frozen=True)
class SplitFacts:
    """One split in numbers."""

    name: str
    split: Split
    per_class: npt.NDArray[np.int64]
    """Pictures of each class."""
    picture_bytes: npt.NDArray[np.uint32]
    """Stored bytes of each picture."""


@dataclass(frozen=True)
class Component:
    """A principal component of the colours, beside the original's."""

    deviation: float
    vector: tuple[float, float, float]
    """R, G, B."""
    original_deviation: float
    original_vector: tuple[float, float, float]
    """Turned the way of ours: its sign says nothing."""
    angle: float
    """Between the two directions, in degrees."""


@dataclass(frozen=True)
class Reason:
    """Why pictures were rejected."""

    reason: str
    """Numbers in it left out."""
    count: int
    example: str


@dataclass(frozen=True)
class Duplicates:
    """What `duplicates.jsonl` lists."""

    counts: dict[str, int]
    """groups, pictures, exact, near, leaks, labels_differ."""
    groups: list[dict[str, Any]]
    """The most telling rows: leaks first, then differing labels, then the rest as listed."""


@dataclass(frozen=True)
class Facts:
    """All numbers of a data set."""

    data: str
    """As the user named it."""
    manifest: Manifest
    splits: list[SplitFacts]
    statistics: Statistics
    components: list[Component]
    reasons: list[Reason] | None
    """Most frequent first; None where the list is missing."""
    duplicates: Duplicates | None
    """None where they were not looked for."""

    def title(self, label: int) -> str:
        """Return the readable name of a class."""
        manifest = self.manifest
        return (manifest.titles or manifest.classes)[label]


def gather(data: str, dataset: DataSet) -> Facts:
    """Read all that is to be known without opening a shard.

    Raises:
        DataError: the set's small files are not what its manifest says.
    """
    manifest = Manifest.load(dataset.folder)
    statistics = Statistics.load(dataset.folder, manifest.stats_sha256)
    return Facts(
        data=data,
        manifest=manifest,
        splits=[
            _split(name, split, load_index(dataset.folder, name, split), len(manifest.classes))
            for name, split in manifest.splits.items()
        ],
        statistics=statistics,
        components=[_component(statistics, place) for place in range(3)],
        reasons=_reasons(data, dataset, manifest) if manifest.rejected else [],
        duplicates=_duplicates(data, dataset, manifest),
    )


def _split(name: str, split: Split, rows: Index, classes: int) -> SplitFacts:
    labels = rows["label"]
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(f"the index of split {name} has labels of no class; {REBUILD}")
    return SplitFacts(name, split, np.bincount(labels, minlength=classes), rows["size"])


def _component(statistics: Statistics, place: int) -> Component:
    vector = statistics.eigenvectors[:, place]
    original = np.array(ORIGINAL_VECTORS[place])
    along = float(vector @ original)
    ours, theirs = vector.tolist(), (original if along >= 0 else -original).tolist()
    return Component(
        deviation=float(np.sqrt(statistics.eigenvalues[place])),
        vector=(ours[0], ours[1], ours[2]),
        original_deviation=ORIGINAL_DEVIATIONS[place],
        original_vector=(theirs[0], theirs[1], theirs[2]),
        angle=float(np.degrees(np.arccos(min(1.0, abs(along))))),
    )


def _reasons(data: str, dataset: DataSet, manifest: Manifest) -> list[Reason] | None:
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    with _list(data, dataset, REJECTS, manifest.rejects_sha256) as path:
        if path is None:
            return None
        for row in _rows(path):
            reason = re.sub(r"\d[\d,.]*", "…", str(row["reason"]))
            counts[reason] += 1
            examples.setdefault(reason, str(row["name"]))
    return [Reason(reason, count, examples[reason]) for reason, count in counts.most_common()]


def _duplicates(data: str, dataset: DataSet, manifest: Manifest) -> Duplicates | None:
    if is_remote(data) and not manifest.duplicates and manifest.duplicates_sha256 is None:
        return None  # it was never searched, and a store is slow to say so
    counts = dict.fromkeys(("groups", "pictures", "exact", "near", "leaks", "labels_differ"), 0)
    shown: dict[tuple[bool, bool], list[dict[str, Any]]] = {}
    with _list(data, dataset, DUPLICATES, manifest.duplicates_sha256) as path:
        if path is None:
            return None
        for row in _rows(path):
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
def _list(data: str, dataset: DataSet, name: str, expected: str | None) -> Iterator[Path | None]:
    """Give the path of a list beside the manifest, checked if its hash is known; None if missing.

    Raises:
        DataError: it is not the one that was built.
        StoreError: the store does not give it.
    """
    if not is_remote(data):
        path = dataset.folder / name
        if path.is_file() and expected not in (None, sha256(path)):
            raise DataError(f"{path} is not the one that was built; restore it, or {REBUILD}")
        yield path if path.is_file() else None
        return
    from pipeline.remote.download import Store
    from pipeline.stores.errors import Mismatch

    def check(path: Path) -> None:
        if expected not in (None, sha256(path)):
            raise Mismatch("SHA-256 differs from the manifest")

    with tempfile.TemporaryDirectory(prefix="duet-") as folder:
        stop = threading.Event()
        yield Store(data).fetch(name, Path(folder), check, limit=LARGEST_LIST, stop=stop)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); {REBUILD}") from error
