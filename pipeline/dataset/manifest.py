"""`manifest.json`: names every file of a data set, with its hash.

DATA/manifest.json          `Manifest`, written last: without it there is no data set
DATA/train-000000.tar       shards: WebDataset tars of `KEY.jpg` (raw: `KEY.npy`) and `KEY.cls`
DATA/train-000000.idx       DALI's index of the same shard, for any other tool
DATA/train.index.npy        place of each sample of the split (`index.INDEX_DTYPE`)
DATA/stats.npz              statistics of the training images (`image_stats.Statistics`)
DATA/rejects.jsonl          every image that was not packed, and why
DATA/duplicates.jsonl       images that are the same or nearly so, within and across splits
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from pipeline.dataset.images import Encoding
from pipeline.tools.errors import REBUILD, DataError, UsageError, summarize_error
from pipeline.tools.files import atomic_write, sha256

VERSION = 1
NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A tar: file name, number of samples, size in bytes, SHA-256 (hex) of it and of its .idx."""

    name: str
    samples: int
    bytes: int
    sha256: str
    idx_sha256: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split (`train`, `val`): its shards in stored order, and the SHA-256 of its index file."""

    shards: tuple[Shard, ...]
    index_sha256: str

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of `manifest.json`."""

    splits: dict[str, Split]
    classes: tuple[str, ...]
    """Class names; a label is an index into this list."""
    seed: int
    """Seed of the shuffle over the images when they were packed."""
    sources: dict[str, str]
    """Source of each split, as the builder was given it."""
    plan: str
    """SHA-256 over the list of source images and every setting of the build."""
    stats_sha256: str
    """SHA-256 of `stats.npz`."""
    rejected: int = 0
    """Number of images that were left out; `rejects.jsonl` lists them."""
    image_size: int = 256
    """Height and width of every stored image, in pixels."""
    quality: int | None = None
    """JPEG quality of the stored images, 1..100; None where they are raw."""
    encoding: Encoding = "jpeg"
    """Encoding of the stored images; older manifests have no such key, and JPEGs."""
    chroma: str | None = None
    """Chroma subsampling of the JPEGs, `4:2:0` or `4:4:4`; None if it is not known."""
    titles: tuple[str, ...] | None = None
    """Readable names of the classes, if the source had them."""
    duplicates: int = 0
    """Number of groups of (nearly) equal images; `duplicates.jsonl` lists them."""
    leaks: int = 0
    """Number of these groups that are in more than one split."""
    rejects_sha256: str | None = None
    """SHA-256 of `rejects.jsonl`; None in older manifests."""
    duplicates_sha256: str | None = None
    """SHA-256 of `duplicates.jsonl`; None in older manifests."""
    libraries: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that determine the bytes of the shards."""
    foreign: bool = False
    """True if another tool made the shards, and chose names, keys and members;
    `pipeline.index_shards` indexed them in place."""
    version: int = field(default=VERSION)

    def text(self) -> bytes:
        """Return the bytes of `manifest.json`."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def save(self, data: Path) -> None:
        """Write `DATA/manifest.json`, which completes the data set."""
        with atomic_write(data / NAME) as file:
            file.write(self.text())

    @classmethod
    def load(cls, data: Path) -> Manifest:
        """Read `DATA/manifest.json`.

        Raises:
            UsageError: `data` is not a folder with a manifest.
            DataError: the manifest is damaged or of another version.
        """
        path = data / NAME
        if not data.is_dir():
            raise UsageError(f"data set {data} is not a folder; build it with {_HOW}")
        if not path.is_file():
            raise UsageError(f"data set {data} has no {NAME}; build it with {_HOW}")
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, text: bytes, where: str) -> Manifest:
        """Parse the bytes of a manifest; `where` names it in messages.

        Raises:
            DataError: it is damaged or of another version.
        """
        try:
            return cls._from_table(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{where} cannot be read ({summarize_error(error)}); {REBUILD}"
            ) from error

    @classmethod
    def _from_table(cls, table: dict[str, Any]) -> Manifest:
        if table["version"] != VERSION:
            raise ValueError(f"version {table['version']}, this program reads {VERSION}")
        if (encoding := table.get("encoding", "jpeg")) not in (known := get_args(Encoding)):
            raise ValueError(f"encoding {encoding!r}, this program reads {', '.join(known)}")
        splits = {
            name: Split(
                shards=tuple(Shard(**shard) for shard in split["shards"]),
                index_sha256=split["index_sha256"],
            )
            for name, split in table.pop("splits").items()
        }
        titles = table.pop("titles", None)
        return cls(
            splits=splits,
            classes=tuple(table.pop("classes")),
            titles=None if titles is None else tuple(titles),
            **table,
        )

    def split(self, name: str, data: Path) -> Split:
        """Return a split by name.

        Raises:
            UsageError: there is no such split; the message says which there are.
        """
        if name not in self.splits:
            there = ", ".join(self.splits)
            raise UsageError(f"data set {data} has no split {name!r}; it has {there}")
        return self.splits[name]


def identity(data: Path) -> str:
    """Return the SHA-256 of the manifest file, which identifies the data set and its bytes."""
    return sha256(data / NAME)


_HOW = "python -m pipeline.build_shards"
