"""What a sealed data set is: a folder whose `manifest.json` names every shard in it.

DATA/manifest.json          this file's `Manifest`, written last: no manifest, no data set
DATA/train-000000.tar       shards: WebDataset tars of `KEY.jpg` (raw: `KEY.npy`) and `KEY.cls`
DATA/train-000000.idx       DALI's index of the same shard, for any other tool
DATA/train.index.npy        where each sample of the split lies (`shards.INDEX_DTYPE`)
DATA/stats.npz              statistics of the training images (`pixel_stats.Statistics`)
DATA/rejects.jsonl          every image that was not packed, and why
DATA/duplicates.jsonl       images that are the same or nearly so, within and across splits
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from pipeline.dataset.images import Encoding
from pipeline.tools.errors import REBUILD, DataError, UsageError
from pipeline.tools.files import atomic_write, sha256

VERSION = 1
NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar: its file name, samples, bytes and SHA-256 (hexadecimal), and that of its .idx."""

    name: str
    samples: int
    bytes: int
    sha256: str
    idx_sha256: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split (`train`, `val`): its shards in stored order, and the hash of its index file."""

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
    """All that a data set claims about itself."""

    splits: dict[str, Split]
    classes: tuple[str, ...]
    """Class names; a label is a place in this list."""
    seed: int
    """Seed of the shuffle over the images when they were packed."""
    sources: dict[str, str]
    """Where each split came from, as the builder was told."""
    plan: str
    """SHA-256 over the list of source images and every setting of the build."""
    stats_sha256: str
    """SHA-256 of `stats.npz`."""
    rejected: int = 0
    """Images that were left out; `rejects.jsonl` lists them."""
    image_size: int = 256
    """Height and width of every stored image, in pixels."""
    quality: int | None = None
    """JPEG quality of the stored images, 1..100; None where they are raw."""
    encoding: Encoding = "jpeg"
    """How the images are stored; sets from before there was a choice hold JPEGs."""
    chroma: str | None = None
    """Colour resolution of stored JPEGs, `4:2:0` or `4:4:4`; None where it is not known."""
    titles: tuple[str, ...] | None = None
    """Readable names of the classes, where the source had them."""
    duplicates: int = 0
    """Groups of images that are the same or nearly so; `duplicates.jsonl` lists them."""
    leaks: int = 0
    """Those of the groups that are in more than one split."""
    rejects_sha256: str | None = None
    """SHA-256 of `rejects.jsonl`; None in sets from before it was kept."""
    duplicates_sha256: str | None = None
    """SHA-256 of `duplicates.jsonl`; None in sets from before there was one."""
    libraries: dict[str, str] = field(default_factory=dict)
    """Releases of the libraries that decided the bytes of the shards."""
    foreign: bool = False
    """Another tool made the shards, and `pipeline.index_shards` indexed them where they lie: names,
    keys and members are of its choosing."""
    version: int = field(default=VERSION)

    def text(self) -> bytes:
        """Return what `manifest.json` holds."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def save(self, data: Path) -> None:
        """Write `DATA/manifest.json`; from this moment the data set exists."""
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
        """Read the text of a manifest; `where` names it in messages.

        Raises:
            DataError: it is damaged or of another version.
        """
        try:
            return cls._parsed(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where} cannot be read ({_reason(error)}); {REBUILD}") from error

    @classmethod
    def _parsed(cls, table: dict[str, Any]) -> Manifest:
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
    """Return the SHA-256 of the manifest file: two data sets with the same one are the same."""
    return sha256(data / NAME)


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]


_HOW = "python -m pipeline.build_shards"
