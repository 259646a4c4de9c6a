"""The next version of a data set: its tables, lists and manifest, of samples old and new.

`Parent` is the version that it is made from, `SplitEdit` says which samples a split has then, and
`seal_version` writes everything below DATA/versions/NNNNNN and replaces DATA/manifest.json last:
until then the old version is whole.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.dataset.aggregates import HASH_BYTES, Aggregates
from pipeline.dataset.aggregates import NAME as AGGREGATES
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.index import Index, index_dtype, index_name, load_index, save_index
from pipeline.dataset.manifest import DUPLICATES, REJECTS, Manifest, Shard, Split, version_folder
from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.dataset.members import (
    LINES,
    MEMBER_DTYPE,
    TEXT_KINDS,
    Members,
    TextKind,
    TextTable,
    escape_line,
    field_table,
    list_fields,
    map_members,
    save_members,
    save_texts,
    text_files,
)
from pipeline.dataset.shards import shard_number
from pipeline.dataset.versions import (
    WITHDRAWN,
    SealedVersion,
    Withdrawn,
    format_withdrawn,
    list_versions,
    load_withdrawn,
)
from pipeline.packing.duplicates import (
    DuplicateCounts,
    DuplicateMember,
    find_duplicates,
    write_duplicates,
)
from pipeline.packing.hamming import Hashes
from pipeline.packing.measure import measure, subtract_images
from pipeline.packing.shards import copy_file
from pipeline.remote.target import FolderTarget, StoreTarget, Target
from pipeline.tools.errors import REBUILD, DataError
from pipeline.tools.files import sha256
from pipeline.tools.processes import Pool, read_ahead
from pipeline.tools.progress import write_line

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NewSamples:
    """Samples of a split that its parent does not have."""

    shards: tuple[Shard, ...]
    rows: Index
    """Index rows; their shards count in `shards`."""
    names: tuple[str, ...]
    members: Mapping[str, Members]
    """Rows of each field."""
    hashes: Hashes


@dataclass(frozen=True)
class SplitEdit:
    """The samples of a split in the next version."""

    origin: Ids
    """int64 [n]: id in the parent of each sample; from the parent's number of samples on, places in
    `new`."""
    new: NewSamples | None = None


class Parent:
    """The newest version of a data set, from which the next one is made."""

    def __init__(self, target: Target, scratch: Path) -> None:
        """Read the manifests of all versions, and fetch the tables of the newest from a store.

        Raises:
            DamagedFile: a manifest or a table is damaged.
            DataError: a shard is missing or truncated.
        """
        self.target = target
        self.versions = list(list_versions(target.read, target.address))
        self.newest: SealedVersion = self.versions[0]
        self.manifest: Manifest = self.newest.manifest
        at = self.manifest.shards_at
        self.shards: Target = target if at is None else StoreTarget(at)
        """Place of the shards, which may be an address that is only read."""
        self.folder = self._fetch_tables(scratch)
        self._check_shards()

    def _fetch_tables(self, scratch: Path) -> Path:
        """Return a local folder in which the tables lie as in DATA."""
        if isinstance(self.target, FolderTarget):
            return self.target.path
        manifest, folder = self.manifest, scratch / "parent"
        names = [REJECTS] if manifest.rejects_sha256 else []
        names += [WITHDRAWN] if manifest.withdrawn_sha256 else []
        for name, split in manifest.splits.items():
            names += [index_name(name), *(f"{name}.{table}" for table in split.tables)]
        for name in names:
            path = folder / manifest.tables_in / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.target.read(f"{manifest.tables_in}/{name}".lstrip("/")))
        return folder

    def _check_shards(self) -> None:
        shards = [shard for split in self.manifest.splits.values() for shard in split.shards]
        sizes = read_ahead(lambda shard: self.shards.size(shard.name), shards)
        for shard, size in zip(shards, sizes, strict=True):
            if size != shard.bytes:
                place = f"{self.shards.address}/{shard.name}"
                raise DataError(f"{place} is missing or not whole; restore it, or {REBUILD}")

    @cached_property
    def indices(self) -> dict[str, Index]:
        """Index of each split, checked."""
        return {name: load_index(self.folder, name, self.manifest) for name in self.manifest.splits}

    def load_index(self, version: SealedVersion, split: str) -> Index:
        """Return the index of a split of any version, checked; it is fetched from a store."""
        if version is self.newest:
            return self.indices[split]
        place = f"{version.manifest.tables_in}/{index_name(split)}".lstrip("/")
        if not (path := self.folder / place).is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.target.read(place))
        return load_index(self.folder, split, version.manifest)

    @cached_property
    def withdrawn(self) -> Withdrawn:
        """All samples that were withdrawn."""
        return load_withdrawn(self.folder, self.manifest)

    @property
    def rejects(self) -> Path | None:
        """The list of rejects; None without one.

        Raises:
            DataError: it is missing, or not the one that was written.
        """
        path, digest = self.folder / self.manifest.tables_in / REJECTS, self.manifest.rejects_sha256
        if not path.is_file():
            if digest is not None:
                raise DataError(f"{path} is missing; restore it, or {REBUILD}")
            return None
        if digest not in (None, sha256(path)):
            raise DataError(f"{path} is damaged; restore it, or {REBUILD}")
        return path

    def texts(self, split: str, kind: TextKind) -> TextTable | None:
        """Return a table of texts; None if the split has none."""
        tables = self.manifest.splits[split].tables
        if text_files(kind)[0] not in tables:
            return None
        folder = self.folder / self.manifest.tables_in
        for name in text_files(kind):
            if sha256(folder / f"{split}.{name}") != tables[name]:
                raise DataError(f"{folder}/{split}.{name} is damaged; restore it, or {REBUILD}")
        return TextTable(folder, split, kind, self.manifest.splits[split].samples)

    def members(self, split: str, name: str) -> Members:
        """Return the table of a field."""
        found, folder = self.manifest.splits[split], self.folder / self.manifest.tables_in
        return map_members(folder, split, name, found.samples, found.tables[field_table(name)])

    def first_number(self, split: str) -> int:
        """Return the number of the next shard of a split: no version has had it."""
        shards = (one.manifest.splits.get(split) for one in self.versions)
        names = [shard.name for found in shards if found for shard in found.shards]
        return 1 + max(map(shard_number, names), default=-1)

    def read_aggregates(self, pool: Pool, gone: Mapping[str, Ids] | None = None) -> Aggregates:
        """Return sums and hashes of this version; a set without them is measured.

        Args:
            pool: decodes images.
            gone: ids of images, of each split, that the sums leave out; their hashes may be 0.

        Raises:
            DataError: an image that is not among `gone` is damaged.
            OSError: the target cannot be read.
        """
        manifest, gone = self.manifest, gone or {}
        try:
            content = self.target.read(f"{manifest.tables_in}/{AGGREGATES}".lstrip("/"))
        except FileNotFoundError:
            content = b""
        if (found := Aggregates.parse(content, manifest)) is not None:
            if "train" not in gone:
                return found
            rows = self.indices["train"]
            removed, left = rows[gone["train"]], np.delete(rows, gone["train"])
            sums = subtract_images(found.sums, self.shards, manifest, removed, left, pool)
            return replace(found, sums=sums)
        write_line(
            f"note: {self.target.address} keeps no sums of its images; all are read once, and no "
            "later version needs that"
        )
        parts, hashes = {}, dict[str, Hashes]()
        for name, rows in self.indices.items():  # a damaged image can be withdrawn
            left = np.delete(np.arange(len(rows)), gone.get(name, ()))
            hashes[name] = np.zeros((len(rows), HASH_BYTES), np.uint8)
            parts[name], hashes[name][left] = measure(
                self.shards, manifest, name, rows[left], pool, f"reading {name}"
            )
        return Aggregates(parts["train"], hashes)


@dataclass(frozen=True)
class VersionFacts:
    """The next version but for its samples."""

    aggregates: Aggregates
    """Sums of the next version, and hashes of the parent's."""
    change: dict[str, Any]
    rejects: Path
    rejected: int
    withdrawn: Withdrawn
    classes: tuple[str, ...]
    titles: tuple[str, ...] | None
    purged: dict[str, str] = field(default_factory=dict)
    libraries: dict[str, str] | None = None
    """Versions of libraries; None: the parent's."""


def seal_version(
    parent: Parent, edits: Mapping[str, SplitEdit], facts: VersionFacts, scratch: Path
) -> Manifest:
    """Write the next version, and make it the newest.

    Args:
        parent: the version before.
        edits: of the splits that change.
        facts: all else.
        scratch: local folder for intermediate files.

    Raises:
        OSError: the target cannot be written.
        DamagedFile: a table of the parent is damaged.
    """
    before, number = parent.manifest, parent.manifest.number + 1
    (folder := scratch / "version").mkdir()
    splits, hashes = {}, {}
    for name in dict.fromkeys([*before.splits, *edits]):
        edit = edits.get(name) or SplitEdit(np.arange(before.splits[name].samples))
        splits[name] = _write_split(parent, name, edit, folder)
        hashes[name] = _join_hashes(facts.aggregates.hashes.get(name), edit)
    manifest = replace(
        before,
        splits=splits,
        classes=facts.classes,
        titles=facts.titles,
        stats_sha256=Statistics.from_sums(facts.aggregates.sums).save(folder),
        rejected=facts.rejected,
        rejects_sha256=sha256(facts.rejects),
        libraries=before.libraries if facts.libraries is None else facts.libraries,
        number=number,
        parent=parent.newest.identity,
        tables_in=version_folder(number),
        change=facts.change,
        purged=before.purged | facts.purged,
    )
    manifest = _write_lists(folder, manifest, Aggregates(facts.aggregates.sums, hashes), facts)
    _publish(parent, manifest, folder, facts.rejects)
    return manifest


def _write_lists(
    folder: Path, manifest: Manifest, aggregates: Aggregates, facts: VersionFacts
) -> Manifest:
    """Write duplicates, aggregates, withdrawn samples; return the manifest with their hashes."""
    if not manifest.foreign:
        with (folder / DUPLICATES).open("wb") as file:
            same = _write_duplicates(file, manifest, aggregates.hashes, folder)
        digest = sha256(folder / DUPLICATES)
        manifest = replace(
            manifest, duplicates=same.groups, leaks=same.leaks, duplicates_sha256=digest
        )
    with (folder / AGGREGATES).open("wb") as file:
        aggregates.write(file, {n: split.index_sha256 for n, split in manifest.splits.items()})
    manifest = replace(manifest, aggregates_sha256=sha256(folder / AGGREGATES))
    if facts.withdrawn:
        (folder / WITHDRAWN).write_bytes(format_withdrawn(facts.withdrawn))
        manifest = replace(manifest, withdrawn_sha256=sha256(folder / WITHDRAWN))
    return manifest


def _publish(parent: Parent, manifest: Manifest, folder: Path, rejects: Path) -> None:
    """Copy the files of the next version into the data set; last, make it the newest."""
    target, place = parent.target, manifest.tables_in
    copy_file(rejects, target, f"{place}/{REJECTS}")
    for path in sorted(folder.iterdir()):
        copy_file(path, target, f"{place}/{path.name}")
    for name, text in (
        (f"{version_folder(parent.manifest.number)}/{MANIFEST}", parent.newest.text),
        (f"{place}/{MANIFEST}", manifest.text()),
        (MANIFEST, manifest.text()),
    ):
        with target.create(name) as file:
            file.write(text)


def _write_split(parent: Parent, name: str, edit: SplitEdit, folder: Path) -> Split:
    """Write index and tables of a split; return its entry in the manifest."""
    before, new, origin = parent.manifest.splits.get(name), edit.new, edit.origin
    shards = [*(before.shards if before else ()), *(new.shards if new else ())]
    parts = [parent.indices[name]] if before else []
    if new:
        rows = np.array(new.rows)
        rows["shard"] += len(before.shards) if before else 0
        parts.append(rows)
    rows = np.concatenate(parts).astype(index_dtype(parent.manifest))[origin]
    counts = np.bincount(rows["shard"], minlength=len(shards))
    rows["shard"] = (np.cumsum(counts > 0) - 1)[rows["shard"]]
    kept = zip(shards, counts.tolist(), strict=True)
    index_sha256 = save_index(folder, name, rows)
    tables: dict[str, str] = {}
    for kind in TEXT_KINDS:
        if (lines := _join_texts(parent, name, kind, edit)) is not None:
            tables |= save_texts(folder, name, kind, len(origin), lines)
    fields = list_fields(before.tables) if before else list(new.members if new else ())
    for one in fields:
        found = [parent.members(name, one)] if before else []
        found += [new.members[one]] if new else []
        tables |= save_members(
            folder, name, one, np.concatenate(found).astype(MEMBER_DTYPE)[origin]
        )
    return Split(
        shards=tuple(replace(shard, samples=count) for shard, count in kept if count),
        index_sha256=index_sha256,
        tables=tables,
    )


def _join_texts(
    parent: Parent, name: str, kind: TextKind, edit: SplitEdit
) -> Iterator[bytes] | None:
    """Return the lines of a table of texts, a block at a time; None if the split has none."""
    if name not in parent.manifest.splits:
        old, count = None, 0
        if kind == "keys":
            return None
    else:
        old, count = parent.texts(name, kind), parent.manifest.splits[name].samples
        if old is None:
            return None

    def lines() -> Iterator[bytes]:
        for start in range(0, len(edit.origin), LINES):
            block = edit.origin[start : start + LINES]
            known = block[block < count]
            texts = iter(old.read(known) if old is not None and len(known) else ())
            for one in block.tolist():
                if one < count:
                    yield escape_line(next(texts))
                elif edit.new is not None:
                    yield escape_line(edit.new.names[one - count])

    return lines()


def _join_hashes(old: Hashes | None, edit: SplitEdit) -> Hashes:
    parts = [np.zeros((0, HASH_BYTES), np.uint8) if old is None else old]
    parts += [edit.new.hashes] if edit.new else []
    joined: Hashes = np.concatenate(parts)[edit.origin]
    return joined


def _write_duplicates(
    file: io.BufferedWriter, manifest: Manifest, hashes: Mapping[str, Hashes], folder: Path
) -> DuplicateCounts:
    """Search all images for duplicates by their hashes, and write the groups."""
    names = list(manifest.splits)
    rows = [np.load(folder / index_name(name), mmap_mode="r") for name in names]
    firsts = np.cumsum([0, *map(len, rows)])
    texts = [
        TextTable(folder, name, "names", len(some))
        if text_files("names")[0] in manifest.splits[name].tables
        else None
        for name, some in zip(names, rows, strict=True)
    ]

    def member(place: int) -> DuplicateMember:
        split = int(np.searchsorted(firsts, place, side="right")) - 1
        sample, table = place - int(firsts[split]), texts[split]
        return DuplicateMember(
            split=names[split],
            sample=sample,
            label=int(rows[split]["label"][sample]),
            name="" if table is None else table.read(np.array([sample]))[0],
        )

    def join(column: str) -> npt.NDArray[Any]:
        return np.concatenate([some[column] for some in rows])

    return write_duplicates(
        file,
        find_duplicates(
            np.concatenate([hashes[name] for name in names]), join("size"), join("crc")
        ),
        np.repeat(np.arange(len(names)), np.diff(firsts)),
        join("label"),
        member,
    )
