"""A version without some samples, and their bytes purged from the shards.

Rows of the index go, shards stay as they are: what was withdrawn is listed in the newest version,
and whoever reads an older one does not deliver it either. A purge overwrites the members of
withdrawn samples by zeros, so that all other bytes stay where every version has them. The manifest
that names the shards' new hashes is written first; `--purge` alone resumes a purge that was cut
short.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from isal import isal_zlib

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.samples import group_samples
from pipeline.dataset.tar import escape, read_members
from pipeline.dataset.versions import SealedVersion, Withdrawn, WithdrawnSample, find_withdrawn
from pipeline.packing.revision import Ids, Parent, SplitEdit, VersionFacts, seal_version
from pipeline.remote.target import FolderTarget, StoreTarget, Target
from pipeline.tools.errors import DataError, UsageError
from pipeline.tools.files import sha256
from pipeline.tools.processes import Pool
from pipeline.tools.progress import Progress, announce

NAMED = 3
"""Keys that are not there which a message names."""
BLOCK = 1 << 20


def find_samples(parent: Parent, keys: Iterable[str]) -> dict[str, Ids]:
    """Return the ids of the samples of these names, of each split that has some.

    Args:
        parent: the version.
        keys: names of images as `SPLIT.names.txt` has them (in shards of another tool their keys);
            a name that several have means all of them.

    Raises:
        UsageError: no sample has one of these names, or the set knows no names.
    """
    wanted, found = set(keys), dict[str, list[int]]()
    missing = set(wanted)
    for split in parent.manifest.splits:
        table = parent.texts(split, "keys" if parent.manifest.foreign else "names")
        if table is None:
            raise UsageError(
                f"{parent.target.address} does not know the names of its samples, as an older set; "
                "withdraw by --class, or pack it anew"
            )
        for sample, name in enumerate(table):
            if name in wanted:
                found.setdefault(split, []).append(sample)
                missing.discard(name)
    if missing:
        some = ", ".join(map(escape, sorted(missing)[:NAMED]))
        hint = "; to finish a purge, give --purge alone" if parent.withdrawn else ""
        more = f" and {len(missing) - NAMED:,} more" if len(missing) > NAMED else ""
        raise UsageError(
            f"{parent.target.address} has no sample {some}{more}; nothing is withdrawn: give names "
            f"as its names.txt has them (keys.txt in shards of another tool){hint}"
        )
    return {split: np.array(ids) for split, ids in found.items()}


def find_class(parent: Parent, name: str) -> dict[str, Ids]:
    """Return the ids of the samples of a class, by its name or its readable name.

    Raises:
        UsageError: there is no such class, or it has no samples.
    """
    classes, titles = parent.manifest.classes, parent.manifest.titles or ()
    labels = [n for n, one in enumerate(classes) if one == name]
    labels = labels or [n for n, one in enumerate(titles[: len(classes)]) if one == name]
    if len(labels) != 1:
        what = "several classes" if labels else "no class"
        raise UsageError(
            f"{parent.target.address} has {what} {escape(name)!r}; give the name of one of its "
            f"{len(classes):,} classes, as {classes[0]!r}"
            if classes
            else f"{parent.target.address} has no classes; withdraw by --keys"
        )
    found = {
        split: np.flatnonzero(rows["label"] == labels[0]) for split, rows in parent.indices.items()
    }
    found = {split: ids for split, ids in found.items() if len(ids)}
    if not found:
        raise UsageError(
            f"class {escape(name)!r} of {parent.target.address} has no samples left; to finish a "
            "purge, give --purge alone"
        )
    return found


class Withdrawal(NamedTuple):
    """Result of withdrawing or purging."""

    manifest: Manifest
    """Manifest of the newest version."""
    is_new: bool
    """True if this made the version."""
    purged: int = 0
    """Number of withdrawn samples whose bytes are overwritten, now or before; 0 without a purge."""
    shards: int = 0
    """Number of shards that hold these."""
    rewritten: int = 0
    """Number of shards that were rewritten now."""
    names: int = 0
    """Number of distinct names by which samples were withdrawn; 0: by a class, or none were."""


def withdraw(
    parent: Parent, gone: dict[str, Ids], pool: Pool, scratch: Path, *, purge: bool
) -> Withdrawal:
    """Make a version without some samples.

    Args:
        parent: the version before.
        gone: ids of the samples, of each split; empty to purge what was withdrawn before.
        pool: decodes images, to bring the statistics up to date.
        scratch: local folder for intermediate files.
        purge: overwrite the bytes of all samples that were ever withdrawn.

    Raises:
        UsageError: a split would be left without samples.
        DataError: a file of the data set is damaged.
        OSError: the target cannot be read or written.
    """
    if purge and parent.shards is not parent.target:
        raise UsageError(
            f"the shards of {parent.target.address} lie at {parent.shards.address}, which is not "
            "written to; leave --purge out"
        )
    withdrawn = _add_withdrawn(parent, gone)
    purged = _hash_purged(parent, withdrawn) if purge else {}
    manifest = parent.manifest
    if gone or any(manifest.purged.get(name) != digest for name, digest in purged.items()):
        manifest = _seal(parent, gone, withdrawn, purged, pool, scratch)
    return Withdrawal(
        manifest=manifest,
        is_new=manifest is not parent.manifest,
        purged=sum(len(withdrawn[name]) for name in purged),
        shards=len(purged),
        rewritten=_purge(parent.target, withdrawn, purged),
    )


def _add_withdrawn(parent: Parent, gone: dict[str, Ids]) -> Withdrawn:
    """Return all that was withdrawn, with these samples and the images whose place they took."""
    found = {name: set(samples) for name, samples in parent.withdrawn.items()}
    for split, ids in gone.items():
        places = _list_places(parent, parent.newest, split, ids)
        for version, before in pairwise(parent.versions):  # whose place --replace gave them
            if version.manifest.change.get("replaced") and split in before.manifest.splits:
                shards = [shard.name for shard in version.manifest.splits[split].shards]
                same = find_withdrawn(places, shards, parent.load_index(version, split))
                same = same[same < before.manifest.splits[split].samples]
                for name, samples in _list_places(parent, before, split, same).items():
                    places[name] = tuple({*places.get(name, ()), *samples})
        for name, samples in places.items():
            found.setdefault(name, set()).update(samples)
    return {name: tuple(sorted(samples)) for name, samples in found.items()}


def _list_places(
    parent: Parent, version: SealedVersion, split: str, ids: Ids
) -> dict[str, tuple[WithdrawnSample, ...]]:
    shards = version.manifest.splits[split].shards
    found = dict[str, list[WithdrawnSample]]()
    for row in parent.load_index(version, split)[ids].tolist():
        shard, _, offset, size, crc = row[:5]
        found.setdefault(shards[shard].name, []).append(WithdrawnSample(offset, size, crc))
    return {name: tuple(samples) for name, samples in found.items()}


def _seal(
    parent: Parent,
    gone: dict[str, Ids],
    withdrawn: Withdrawn,
    purged: dict[str, str],
    pool: Pool,
    scratch: Path,
) -> Manifest:
    manifest, edits = parent.manifest, dict[str, SplitEdit]()
    for split, ids in gone.items():
        left = np.setdiff1d(np.arange(manifest.splits[split].samples), ids)
        if not len(left):
            raise UsageError(
                f"split {split} of {parent.target.address} would have no samples left; delete the "
                "data set instead, or pack another"
            )
        edits[split] = SplitEdit(left)
    aggregates = parent.read_aggregates(pool, gone)
    counts = {split: len(ids) for split, ids in gone.items()}
    change: dict[str, Any] = {"withdrawn": sum(counts.values()), "withdrawn_from": counts}
    if purged:
        change["purged"] = sum(len(withdrawn[name]) for name in purged)
    rejects = parent.rejects
    if rejects is None:
        (rejects := scratch / "no-rejects.jsonl").write_bytes(b"")
    facts = VersionFacts(
        aggregates=aggregates,
        change=change,
        rejects=rejects,
        rejected=manifest.rejected,
        withdrawn=withdrawn,
        classes=manifest.classes,
        titles=manifest.titles,
        purged=purged,
    )
    with announce("sealing the version"):
        return seal_version(parent, edits, facts, scratch)


def _hash_purged(parent: Parent, withdrawn: Withdrawn) -> dict[str, str]:
    """Return the SHA-256 that each shard with withdrawn samples has without them.

    Raises:
        DataError: a shard is damaged elsewhere, and would count as sound with another hash.
    """
    manifests = [version.manifest for version in parent.versions]
    known = {(name, digest) for one in manifests for name, digest in one.purged.items()}
    for split in (split for one in manifests for split in one.splits.values()):
        known |= {(shard.name, shard.sha256) for shard in split.shards}
    digests = {}
    for name in withdrawn:
        digest = hashlib.sha256()
        with _local_copy(parent.target, name) as path:
            if (name, sha256(path)) not in known and not _holds_damage(path, withdrawn[name]):
                raise DataError(
                    f"shard {name} of {parent.target.address} is damaged (its bytes are not those "
                    "that were written); nothing is withdrawn: restore it from a copy, or leave "
                    "--purge out"
                )
            for block in _read_purged(path, withdrawn[name]):
                digest.update(block)
        digests[name] = digest.hexdigest()
    return digests


def _holds_damage(path: Path, samples: Iterable[WithdrawnSample]) -> bool:
    """Return whether one of a shard's withdrawn images is damaged, and not purged already."""
    with path.open("rb") as file:
        for sample in samples:
            file.seek(sample.offset)
            content = file.read(sample.size)
            if any(content) and isal_zlib.crc32(content) != sample.crc:
                return True
    return False


def _purge(target: Target, withdrawn: Withdrawn, purged: dict[str, str]) -> int:
    """Overwrite withdrawn samples in the shards that still hold them; return their number."""
    rewritten = 0
    with Progress("purging", total=len(purged), unit="shard") as progress:
        for name, digest in purged.items():
            with _local_copy(target, name) as path:
                if sha256(path) != digest:
                    with target.create(name) as file:
                        for block in _read_purged(path, withdrawn[name]):
                            file.write(block)
                    rewritten += 1
            progress.advance(1)
    return rewritten


@contextmanager
def _local_copy(target: Target, name: str) -> Iterator[Path]:
    """Return the local path of a file of a data set."""
    if isinstance(target, FolderTarget):
        yield target.path / name
        return
    assert isinstance(target, StoreTarget)
    with tempfile.TemporaryDirectory(prefix="duet-") as folder:
        target.download(name, Path(folder) / name)
        yield Path(folder) / name


def _read_purged(path: Path, samples: Iterable[WithdrawnSample]) -> Iterator[bytes]:
    """Yield the bytes of a shard, with zeros in place of the members of these samples."""
    with path.open("rb") as file:
        ranges = sorted(_list_members(file, path.name, {one.offset for one in samples}))
        file.seek(0)
        place = 0
        for start, size in ranges:
            yield from _read(file, start - place)
            yield from (bytes(min(BLOCK, size - at)) for at in range(0, size, BLOCK))
            place = start + size
            file.seek(place)
        while block := file.read(BLOCK):
            yield block


def _list_members(file: BinaryIO, name: str, offsets: set[int]) -> Iterator[tuple[int, int]]:
    """Yield offset and size of all members of the samples with an image at one of the offsets."""
    for sample in group_samples(read_members(file, name)):
        inside = (range(part.offset, part.offset + part.size) for part in sample.parts)
        if any(offset in one for one in inside for offset in offsets):
            yield from ((part.offset, part.size) for part in sample.parts)


def _read(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0:
        block = file.read(min(BLOCK, size))
        if not block:
            return
        size -= len(block)
        yield block
