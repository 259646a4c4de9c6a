"""`manifest.json`: names every file of a data set, with its hash.

DATA/manifest.json          `Manifest`, written last: without it there is no data set
DATA/train-000000.tar       shards: WebDataset tars of `KEY.jpg` (raw: `KEY.npy`) and `KEY.cls`
DATA/train-000000.idx       DALI's index of the same shard, for any other tool
DATA/train.index.npy        place of each sample of the split (`index.INDEX_DTYPE`)
DATA/train.names.txt ...    names, keys and other members of the samples (`members`)
DATA/stats.npz              statistics of the training images (`image_stats.Statistics`)
DATA/rejects.jsonl          every image that was not packed, and why
DATA/duplicates.jsonl       images that are the same or nearly so, within and across splits
DATA/versions/000002/       manifest and side files of a later version (`versions`)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pipeline.dataset.images import LEAST_SIZE, MOST_SIZE, SIZE, Encoding, Fit
from pipeline.dataset.members import is_table
from pipeline.tools.errors import DamagedFile, UsageError, summarize_error
from pipeline.tools.files import atomic_write, is_plain_name, sha256
from pipeline.tools.jsonl import hash_json, parse_json

VERSION = 1
"""Version of the format; `Manifest.number` is that of the data."""
NAME = "manifest.json"
REJECTS, DUPLICATES = "rejects.jsonl", "duplicates.jsonl"
"""Lists that a build leaves beside the manifest, which has their hashes."""
README, CROISSANT = "README.md", "croissant.json"
"""Files of the card that `pipeline.describe --card` leaves beside the manifest."""
CARD_MARK = "<!-- written by duet describe --card -->"
"""Line of the README.md of a card: one without it is of another hand."""
LARGEST = 256 * 2**20
"""Size limit of a manifest in bytes (that of a million shards has about 200 MB)."""
SEAL = "manifest_sha256"
"""Key of the SHA-256 over all other keys and values; older manifests have none."""
VERSIONS = "versions"
"""Folder in DATA with a folder for each version, once there are two."""
COUNTED = ("added", "replaced", "withdrawn", "purged", "skipped", "retried")
"""Keys of `Manifest.change` that count samples."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ADDRESS = re.compile(r"(?!file:|local:)[a-z][a-z0-9+.-]+://(?!.*::)\S+")
"""Address of a folder in a store, as a manifest may name it."""
_FIRST_ONLY = ("number", "parent", "tables_in", "change", "withdrawn_sha256", "purged",
               "aggregates_sha256")  # fmt: skip
"""Keys that the manifest of a first version does not have."""


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
    tables: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each further table of the split by its name (`names.txt`, see `members`); older
    manifests have none."""

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
    """Class names; a label is an index into this list. Empty in a set without labels, where each
    is -1."""
    seed: int
    """Seed of the shuffle over the images when they were packed."""
    sources: dict[str, str]
    """Source of each split, as the builder was given it."""
    plan: str
    """SHA-256 over the list of source images and every setting of the build."""
    stats_sha256: str
    """SHA-256 of `stats.npz`."""
    rejected: int = 0
    """Number of images that were skipped; `rejects.jsonl` lists them."""
    image_size: int | None = SIZE
    """Height and width of every stored image in pixels; with `fit` "shorter", the shorter of them;
    with "none", None."""
    fit: Fit = "square"
    """Size of the images: "square", one height and width; "shorter", one shorter side; "none", each
    has its own. Only sets of the last two have the key."""
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
    number: int = 1
    """Number of this version of the data, from 1."""
    parent: str | None = None
    """SHA-256 of the manifest of the version before; None in a first one."""
    tables_in: str = ""
    """Folder in DATA with the files beside the shards (index, tables, statistics, lists); "" is
    DATA itself, where a first version has them."""
    change: dict[str, Any] = field(default_factory=dict)
    """Difference to the version before: counts of samples (`COUNTED`), and how it was made."""
    withdrawn_sha256: str | None = None
    """SHA-256 of `withdrawn.jsonl`, which lists all samples that were ever withdrawn."""
    purged: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each shard that was rewritten without withdrawn samples, by its name; older
    manifests have its former one."""
    aggregates_sha256: str | None = None
    """SHA-256 of `aggregates.npz`, by which the next version is made; None in first versions."""
    shards_at: str | None = None
    """Address of the folder in a store where the shards lie; None: where the manifest is. Only
    sets of the former have the key."""

    @property
    def side(self) -> int | None:
        """Height and width of every stored image in pixels; None where images differ."""
        return self.image_size if self.fit == "square" else None

    @property
    def mean_side(self) -> int:
        """Height and width in pixels of the mean image in `stats.npz`."""
        return self.side or SIZE

    def describe_size(self) -> str:
        """Return the size of the images in a few words."""
        if self.fit == "none":
            return "many sizes"
        size = f"{self.image_size}×{self.image_size}"
        return size if self.fit == "square" else f"shorter side {self.image_size}"

    def text(self) -> bytes:
        """Return the bytes of `manifest.json`."""
        table = asdict(self)
        if self.fit == "square":
            del table["fit"]  # a set of squares can be read by programs that know no other
        if self.shards_at is None:
            del table["shards_at"]
        if self.number == 1:
            for key in _FIRST_ONLY:
                del table[key]
        return (json.dumps(table | {SEAL: hash_json(table)}, indent=1) + "\n").encode()

    def save(self, data: Path) -> None:
        """Write `DATA/manifest.json`, which completes the data set."""
        with atomic_write(data / NAME) as file:
            file.write(self.text())

    @classmethod
    def load(cls, data: Path) -> Manifest:
        """Read `DATA/manifest.json`.

        Raises:
            UsageError: `data` is not a folder with a manifest.
            DamagedFile: the manifest is damaged, of another version, or of no data set.
        """
        path = data / NAME
        if not data.is_dir():
            raise UsageError(f"data set {data} is not a folder; build it with {_HOW}")
        if not path.is_file():
            raise UsageError(f"data set {data} has no {NAME}; build it with {_HOW}")
        with path.open("rb") as file:
            return cls.parse(file.read(LARGEST + 1), str(path))

    @classmethod
    def parse(cls, text: bytes, where: str) -> Manifest:
        """Parse the bytes of a manifest, and check all that it says; `where` names it in messages.

        Raises:
            DamagedFile: it is damaged, of another version, or of no data set.
        """
        try:
            if len(text) > LARGEST:
                raise ValueError(f"it has more than {LARGEST:,} bytes")
            return cls._from_table(parse_json(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFile(where, summarize_error(error)) from error

    @classmethod
    def _from_table(cls, table: Any) -> Manifest:
        if not isinstance(table, dict):
            raise ValueError("it is no table")
        if (version := table.get("version")) != VERSION:
            raise ValueError(f"version {version!r:.40}, this program reads {VERSION}")
        check_seal(table)
        table.pop(SEAL, None)
        _check_keys(table, cls, "it")
        for name, split in _check_type(table["splits"], dict, "splits").items():
            _check_keys(split, Split, f"split {name!r:.60}")
            for shard in _check_type(split["shards"], list, "shards"):
                _check_keys(shard, Shard, f"a shard of split {name!r:.60}")
        splits = {
            name: Split(
                shards=tuple(Shard(**shard) for shard in split["shards"]),
                index_sha256=split["index_sha256"],
                tables=_check_type(split.get("tables", {}), dict, "tables"),
            )
            for name, split in table.pop("splits").items()
        }
        titles = table.pop("titles", None)
        manifest = cls(
            splits=splits,
            classes=tuple(_check_type(table.pop("classes"), list, "classes")),
            titles=None if titles is None else tuple(_check_type(titles, list, "titles")),
            **table,
        )
        if (fault := next(_find_faults(manifest), None)) is not None:
            raise ValueError(fault)
        return manifest

    def split(self, name: str, data: Path) -> Split:
        """Return a split by name.

        Raises:
            UsageError: there is no such split; the message says which there are.
        """
        if name not in self.splits:
            there = ", ".join(self.splits)
            raise UsageError(f"data set {data} has no split {name!r}; it has {there}")
        return self.splits[name]


def check_seal(table: dict[str, Any]) -> None:
    """Compare the object of a manifest with its seal; an older one has none.

    Raises:
        ValueError: it is not what was written.
    """
    content = {key: value for key, value in table.items() if key != SEAL}
    if table.get(SEAL) not in (None, hash_json(content)):
        raise ValueError("its bytes are not those that were written")


def identity(data: Path) -> str:
    """Return the SHA-256 of the manifest file, which identifies the data set and its bytes."""
    return sha256(data / NAME)


def version_folder(number: int) -> str:
    """Return the folder of a version, relative to DATA."""
    return f"{VERSIONS}/{number:06d}"


def find_root(folder: Path) -> Path:
    """Return DATA, given itself or the folder of one of its versions (DATA/versions/000001)."""
    path = folder.absolute()
    is_version = path.parent.name == VERSIONS and re.fullmatch(r"[0-9]{6}", path.name)
    above = path.parent.parent
    return above if is_version and (above / NAME).is_file() else folder


def tables_folder(folder: Path, manifest: Manifest) -> Path:
    """Return the folder with the files beside the shards of a version.

    Args:
        folder: where the manifest was read.
        manifest: of the version.
    """
    return find_root(folder) / manifest.tables_in


def _check_type(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {value!r:.60}, no {'list' if kind is list else 'table'}")
    return value


def _check_keys(table: Any, kind: type, what: str) -> None:
    """Refuse a table that lacks a field of a dataclass, or has others."""
    known, needed = _list_keys(kind)
    there = _check_type(table, dict, what).keys()
    if unknown := there - known:
        raise ValueError(f"{what} has an unknown key {min(unknown)!r:.60}")
    if missing := needed - there:
        raise ValueError(f"{what} has no {min(missing)}")


@cache
def _list_keys(kind: type) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of all fields of a dataclass, and of those without a default."""
    needed = [one for one in fields(kind) if one.default is one.default_factory is MISSING]
    return frozenset(one.name for one in fields(kind)), frozenset(one.name for one in needed)


def _find_faults(manifest: Manifest) -> Iterator[str]:
    """Yield what no data set has: then none of the manifest's names must be opened."""
    if not manifest.splits:
        yield "it names no split"
    yield from _find_class_faults(manifest)
    yield from _find_size_faults(manifest)
    for name, split in manifest.splits.items():
        yield from _find_split_faults(name, split)
    shards = [shard.name for split in manifest.splits.values() for shard in split.shards]
    if len(set(shards)) < len(shards):
        yield "it names a shard twice"
    yield from _find_version_faults(manifest)
    for key, (is_right, words) in _VALUES.items():
        if not is_right(value := getattr(manifest, key)):
            yield f"{key} is {value!r:.80}, not {words}"


def _find_version_faults(manifest: Manifest) -> Iterator[str]:
    number = manifest.number
    if type(number) is not int or not 1 <= number < 10**6:
        yield f"number is {number!r:.40}, not that of a version"
    elif (manifest.parent is None) != (number == 1):
        yield f"version {number} has {'no ' if number > 1 else 'a '}parent"
    elif manifest.tables_in != ("" if number == 1 else version_folder(number)):
        yield f"tables_in is {manifest.tables_in!r:.60}, not the folder of version {number}"
    if not isinstance(manifest.change, dict):
        yield f"change is {manifest.change!r:.60}, no table"
    elif wrong := [key for key in COUNTED if not _is_count(manifest.change.get(key, 0))]:
        yield f"change has {manifest.change[wrong[0]]!r:.40} {wrong[0]}"
    purged = manifest.purged
    if not isinstance(purged, dict) or not all(
        is_plain_name(name) and _is_hash(digest) for name, digest in purged.items()
    ):
        yield f"purged is {purged!r:.60}, no table of shards and their SHA-256"


def _find_split_faults(name: str, split: Split) -> Iterator[str]:
    if not is_plain_name(name):
        yield f"split {name!r:.60} has a name that leaves the folder"
    if not split.shards:
        yield f"split {name!r:.60} has no shards"
    if not _is_hash(split.index_sha256):
        yield f"split {name!r:.60} has no SHA-256 of its index"
    for table, digest in split.tables.items():
        if not is_table(table) or not _is_hash(digest):
            yield f"split {name!r:.60} has a table {table!r:.60} that none can have"
    for shard in split.shards:
        yield from _find_shard_faults(shard)


def _find_class_faults(manifest: Manifest) -> Iterator[str]:
    classes, titles = manifest.classes, manifest.titles
    if len(classes) == 1 or not _are_texts(classes) or "" in classes:
        yield "its classes are not two names or more, or none"
    elif len(set(classes)) < len(classes):
        yield "it has a class twice"
    if titles is not None and not (_are_texts(titles) and len(titles) >= len(classes)):
        yield "its titles are not a text for each class"


def _find_size_faults(manifest: Manifest) -> Iterator[str]:
    size, fit = manifest.image_size, manifest.fit
    if fit not in get_args(Fit):
        yield f"fit is {fit!r:.80}, not {' or '.join(get_args(Fit))}"
    elif fit == "none" and size is not None:
        yield f"image_size is {size!r:.80}, not null, and fit is 'none'"
    elif fit != "none" and not (type(size) is int and LEAST_SIZE <= size <= MOST_SIZE):
        yield f"image_size is {size!r:.80}, not {LEAST_SIZE} to {MOST_SIZE}"
    if fit != "square" and manifest.encoding == "raw":
        yield f"fit is {fit!r:.80}, and raw images are squares"


def _find_shard_faults(shard: Shard) -> Iterator[str]:
    if not is_plain_name(shard.name):
        yield f"shard {shard.name!r:.60} has a name that leaves the folder"
    elif not shard.name.endswith(".tar"):
        yield f"shard {shard.name!r:.60} is no .tar by its name"
    for key, count in (("samples", shard.samples), ("bytes", shard.bytes)):
        if not _is_count(count) or count == 0:
            yield f"shard {shard.name!r:.60} has {count!r:.40} {key}"
    for key, digest in (("sha256", shard.sha256), ("idx_sha256", shard.idx_sha256)):
        if not _is_hash(digest):
            yield f"shard {shard.name!r:.60} has no {key}"


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_address(value: object) -> bool:
    return isinstance(value, str) and _ADDRESS.fullmatch(value) is not None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_table_of_texts(value: object) -> bool:
    return isinstance(value, dict) and _are_texts(value.values())


def _is_quality(value: object) -> bool:
    return value is None or (type(value) is int and 1 <= value <= 100)


_HASH_OR_NONE = (lambda value: value is None or _is_hash(value), "a SHA-256")
_COUNT = (_is_count, "a count")
_TEXTS = (_is_table_of_texts, "a table of texts")
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda value: type(value) is int, "a whole number"),
    "sources": _TEXTS,
    "plan": (lambda value: isinstance(value, str), "a text"),
    "stats_sha256": (_is_hash, "a SHA-256"),
    "rejected": _COUNT,
    "quality": (_is_quality, "a JPEG quality"),
    "encoding": (lambda value: value in get_args(Encoding), " or ".join(get_args(Encoding))),
    "chroma": (lambda value: isinstance(value, str | None), "a text"),
    "duplicates": _COUNT,
    "leaks": _COUNT,
    "rejects_sha256": _HASH_OR_NONE,
    "duplicates_sha256": _HASH_OR_NONE,
    "parent": _HASH_OR_NONE,
    "withdrawn_sha256": _HASH_OR_NONE,
    "aggregates_sha256": _HASH_OR_NONE,
    "shards_at": (
        lambda value: value is None or _is_address(value),
        "the address of a store",
    ),
    "libraries": _TEXTS,
    "foreign": (lambda value: type(value) is bool, "true or false"),
}
"""Rule of each value beside splits and classes: a check, and what the value must be in words."""


_HOW = "duet build-shards"
