"""Versions of a data set: a chain of sealed manifests over shards that they share.

DATA/manifest.json                   the newest version
DATA/versions/000001/manifest.json   each version, byte for byte, once there are two
DATA/versions/000002/                files beside the shards of version 2: index, tables, statistics
DATA/versions/000002/withdrawn.jsonl every sample that was withdrawn by then

Each manifest names its parent by the SHA-256 of that file, which is the parent's identity. A folder
of a version is opened as DATA itself is. What was withdrawn in the newest version is delivered in
none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.dataset.aggregates import NAME as AGGREGATES
from pipeline.dataset.image_stats import NAME as STATS
from pipeline.dataset.index import index_name
from pipeline.dataset.manifest import (
    CARD_MARK,
    CROISSANT,
    DUPLICATES,
    LARGEST,
    NAME,
    README,
    REJECTS,
    VERSIONS,
    Manifest,
    find_root,
    tables_folder,
    version_folder,
)
from pipeline.tools.errors import DamagedFile, UsageError
from pipeline.tools.files import is_plain_name
from pipeline.tools.jsonl import parse_rows

WITHDRAWN = "withdrawn.jsonl"
"""List of a version's folder: a line for each shard with samples that were withdrawn."""
LATEST = "latest"
"""Word for the newest version, where a flag names one."""
LARGEST_CARD = 1 << 20
"""Bytes of a README.md in which the mark of a card is looked for."""
LEAST_DIGITS = 8
"""Digits of an identity by which a version may be named."""

_SHARD_BITS = 40
"""Bits of an offset in a shard, where it is joined with the number of the shard."""

Read = Callable[[str], bytes]
"""Called with a file's name relative to DATA; returns its bytes or raises FileNotFoundError."""
Version = int | str | None
"""A version as a user names it: number, identity (or its first digits), `latest` or None."""


class SealedVersion(NamedTuple):
    """A version that was read."""

    identity: str
    """SHA-256 of its manifest."""
    text: bytes
    """Content of its manifest."""
    manifest: Manifest

    @property
    def number(self) -> int:
        """Number of the version, from 1."""
        return self.manifest.number


class WithdrawnSample(NamedTuple):
    """Offset, size and content of an image that was withdrawn."""

    offset: int
    """First byte of the image in its shard, as in the index."""
    size: int
    crc: int


Withdrawn = Mapping[str, tuple[WithdrawnSample, ...]]
"""Samples that were withdrawn, by the name of their shard, ascending by offset."""


def parse_version(text: str, flag: str) -> Version:
    """Return the version that a flag names.

    Args:
        text: a number, an identity or its first digits, `latest`; "" is None.
        flag: name of the flag, for messages.

    Raises:
        UsageError: it is none of them.
    """
    if text in ("", LATEST):
        return text or None
    if text.isascii() and text.isdigit() and len(text) < LEAST_DIGITS:
        return int(text)
    if re.fullmatch(rf"[0-9a-f]{{{LEAST_DIGITS},64}}", text):
        return text
    raise UsageError(
        f"{flag} {text:.80} is no version; give its number, {LEAST_DIGITS} digits or more of its "
        f"identity, or {LATEST} (duet describe lists them)"
    )


def find_version(read: Read, wanted: Version, where: str) -> SealedVersion:
    """Return one version of a data set.

    Args:
        read: reads a file of DATA.
        wanted: the version; None or `latest`: the newest.
        where: folder or address of DATA, for messages.

    Raises:
        UsageError: there is no such version.
        DamagedFile: a manifest is missing or damaged.
        OSError: as `read`, for the newest manifest.
    """
    newest = read_newest(read, where)
    if wanted is None or wanted in (LATEST, newest.number):
        return newest
    if isinstance(wanted, int):
        if 1 <= wanted < newest.number:
            return read_version(read, wanted, where)
        there = f"versions 1 to {newest.number}" if newest.number > 1 else "version 1 only"
        raise UsageError(f"data set {where} has {there}, not version {wanted}")
    for found in list_versions(read, where):
        if found.identity.startswith(wanted):
            return found
    raise UsageError(
        f"data set {where} has no version {wanted[:16]} (its newest is {newest.identity[:16]}, "
        f"number {newest.number}); name the data set that has it"
    )


def read_newest(read: Read, where: str) -> SealedVersion:
    """Return the newest version; as `find_version`."""
    return _parse(read(NAME), f"{where}/{NAME}")


def read_version(read: Read, number: int, where: str) -> SealedVersion:
    """Return a version that is not the newest by its number; as `find_version`."""
    name = f"{version_folder(number)}/{NAME}"
    try:
        text = read(name)
    except FileNotFoundError as error:
        raise DamagedFile(f"{where}/{name}", "missing") from error
    found = _parse(text, f"{where}/{name}")
    if found.number != number:
        raise DamagedFile(f"{where}/{name}", f"it is that of version {found.number}")
    return found


def list_versions(read: Read, where: str) -> Iterator[SealedVersion]:
    """Yield all versions, the newest first; each is the parent that the one before names.

    Raises:
        As `find_version`; DamagedFile also for one that is not the parent.
    """
    found = read_newest(read, where)
    yield found
    for number in range(found.number - 1, 0, -1):
        parent, found = found.manifest.parent, read_version(read, number, where)
        if found.identity != parent:
            path = f"{where}/{version_folder(number)}/{NAME}"
            raise DamagedFile(path, f"it is not the one that version {number + 1} was made from")
        yield found


def read_local(root: Path) -> Read:
    """Return what reads the files of a local data set."""

    def read(name: str) -> bytes:
        with (root / name).open("rb") as file:
            return file.read(LARGEST + 1)

    return read


def locate_version(folder: Path, wanted: Version) -> Path:
    """Return the folder that is opened for a version of a local data set: its manifest is there.

    It is that of the version, whose manifest stays when a later version is made; DATA itself while
    there is only a first one.

    Args:
        folder: DATA, or the folder of a version in it.
        wanted: the version; None: the one that `folder` has.

    Raises:
        UsageError: `folder` holds no data set, or there is no such version.
        DamagedFile: a manifest is missing or damaged.
    """
    Manifest.load(folder)
    if wanted is None:
        return folder
    root = find_root(folder)
    found = find_version(read_local(root), wanted, str(root))
    own = root / version_folder(found.number)
    return own if (own / NAME).is_file() else root


def find_unknown_files(data: Path, versions: Iterable[SealedVersion]) -> list[str]:
    """Return the names of files and folders that no version has in `data`; they do no harm."""
    known = {NAME, AGGREGATES}
    if _is_card(data / README):
        known |= {README, CROISSANT}
    for version in versions:
        manifest = version.manifest
        known |= {VERSIONS} if manifest.tables_in else {STATS, REJECTS, DUPLICATES}
        for name, split in manifest.splits.items():
            if not manifest.tables_in:
                known |= {index_name(name), *(f"{name}.{table}" for table in split.tables)}
            for shard in split.shards:
                known |= {shard.name, Path(shard.name).with_suffix(".idx").name}
    return sorted(path.name for path in data.iterdir() if path.name not in known)


def _is_card(path: Path) -> bool:
    """Return whether a README.md is that of the set's own card."""
    try:
        with path.open("rb") as file:
            return CARD_MARK.encode() in file.read(LARGEST_CARD)
    except OSError:
        return False


def load_withdrawn(folder: Path, newest: Manifest) -> Withdrawn:
    """Return the samples that were withdrawn from a data set.

    Args:
        folder: of the data set, or of its copy in a cache.
        newest: manifest of its newest version.

    Raises:
        DamagedFile: the list is missing or damaged.
        SetupError: it may not be read.
    """
    if newest.withdrawn_sha256 is None:
        return {}
    path = tables_folder(folder, newest) / WITHDRAWN
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DamagedFile(path, error.strerror or str(error)) from error
    return parse_withdrawn(text, newest.withdrawn_sha256, str(path))


def parse_withdrawn(text: bytes, digest: str, where: str) -> Withdrawn:
    """Return the content of a `withdrawn.jsonl`.

    Args:
        text: its bytes.
        digest: their SHA-256, as the manifest has it.
        where: names it in messages.

    Raises:
        DamagedFile: it is damaged.
    """
    if hashlib.sha256(text).hexdigest() != digest:
        raise DamagedFile(where, "it is not the list that was written")
    found: dict[str, tuple[WithdrawnSample, ...]] = {}
    for number, row in enumerate(parse_rows(text.splitlines()), 1):
        try:
            shard, samples = (row or {})["shard"], (row or {})["samples"]
            if not is_plain_name(shard) or shard in found:
                raise ValueError
            found[shard] = tuple(WithdrawnSample(*map(_check_count, one)) for one in samples)
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedFile(where, f"line {number} is not a row of this list") from error
    return found


def format_withdrawn(withdrawn: Withdrawn) -> bytes:
    """Return the bytes of a `withdrawn.jsonl`, sorted by the names of the shards."""
    return b"".join(
        json.dumps({"shard": name, "samples": sorted(withdrawn[name])}).encode() + b"\n"
        for name in sorted(withdrawn)
    )


def find_withdrawn(
    withdrawn: Withdrawn, shards: Iterable[str], rows: npt.NDArray[np.void]
) -> npt.NDArray[np.int64]:
    """Return the samples of an index that were withdrawn, int64, ascending ids.

    Args:
        withdrawn: all that were withdrawn.
        shards: names of the shards, in the order of the manifest's list.
        rows: index of the split.
    """
    wanted = [
        number << _SHARD_BITS | sample.offset
        for number, name in enumerate(shards)
        for sample in withdrawn.get(name, ())
    ]
    if not wanted:
        return np.zeros(0, np.int64)
    found = rows["shard"].astype(np.uint64) << np.uint64(_SHARD_BITS) | rows["offset"]
    return np.flatnonzero(np.isin(found, np.array(wanted, np.uint64)))


def _check_count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(value)
    return value


def _parse(text: bytes, where: str) -> SealedVersion:
    return SealedVersion(hashlib.sha256(text).hexdigest(), text, Manifest.parse(text, where))
