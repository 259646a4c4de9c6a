"""Checks of a data set: the manifest, the files beside the shards, and each shard.

A shard is checked in one pass over its bytes: against the SHA-256 of the manifest, and its samples
against the CRC-32s of the index. These are checked even if the SHA-256 is right, because training
relies on them: an index of another build would otherwise show only when a run finds every sample
damaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal import isal_zlib

from pipeline.dataset.aggregates import NAME as AGGREGATES
from pipeline.dataset.aggregates import is_sound
from pipeline.dataset.image_stats import NAME as STATS
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.images import ENDINGS, Size, Undecodable, decode_image, encode_npy
from pipeline.dataset.index import (
    Index,
    find_row_faults,
    index_name,
    map_index,
    sample_key,
)
from pipeline.dataset.manifest import (
    DUPLICATES,
    REJECTS,
    Manifest,
    Shard,
    tables_folder,
)
from pipeline.dataset.members import (
    TEXT_KINDS,
    Members,
    TextTable,
    field_table,
    list_fields,
    locate_member,
    map_members,
    text_files,
)
from pipeline.dataset.samples import (
    JPEG_ENDINGS,
    Classes,
    Sample,
    SampleFile,
    UnfitSample,
    find_label,
    group_samples,
)
from pipeline.dataset.shards import format_idx, parse_idx, shard_number
from pipeline.dataset.tar import Member, TarFault, escape, read_members
from pipeline.dataset.versions import WITHDRAWN
from pipeline.tools.errors import DamagedFile, refuse_forbidden
from pipeline.tools.files import HashedFile, sha256
from pipeline.tools.jsonl import parse_rows

DamageRow = dict[str, Any]
"""A finding: `file`, `reason`; of a damaged sample also `sample` (id in the split) and `key` (its
WebDataset key)."""

DIFFERS = "SHA-256 differs from the manifest"


def make_damage_row(
    file: str, reason: str, sample: int | None = None, key: str | None = None
) -> DamageRow:
    """Return a finding."""
    found = {"file": file, "sample": sample, "key": key, "reason": reason}
    return {name: value for name, value in found.items() if value is not None}


def _describe(error: OSError) -> str:
    """Describe why a file cannot be read; raises as `refuse_forbidden`."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    refuse_forbidden(error)
    return f"cannot be read ({error.strerror})"


def check_file(path: Path, expected: str) -> list[DamageRow]:
    """Compare a file with its expected SHA-256 (hexadecimal)."""
    try:
        if sha256(path) != expected:
            return [make_damage_row(path.name, DIFFERS)]
    except OSError as error:
        return [make_damage_row(path.name, _describe(error))]
    return []


def check_index(data: Path, name: str, manifest: Manifest) -> list[DamageRow]:
    """Check the index file of a split; `check_shard` checks its rows."""
    path = tables_folder(data, manifest) / index_name(name)
    if found := check_file(path, manifest.splits[name].index_sha256):
        return found
    try:
        map_index(data, name, manifest)
    except DamagedFile as error:
        return [make_damage_row(index_name(name), error.reason)]
    return []


def check_tables(data: Path, name: str, manifest: Manifest, indexed: bool) -> list[DamageRow]:
    """Check the tables beside the index of a split; `check_shard` checks what they say.

    Args:
        data: folder of the data set.
        name: of the split.
        manifest: of the data set.
        indexed: True if the split's index file is sound, so that its samples are counted right.
    """
    split, folder = manifest.splits[name], tables_folder(data, manifest)
    found = []
    for table, digest in split.tables.items():
        found += check_file(folder / f"{name}.{table}", digest)
    if found or not indexed:
        return found
    try:
        for kind in TEXT_KINDS:
            if text_files(kind)[0] in split.tables:
                TextTable(folder, name, kind, split.samples).check()
        for field in list_fields(split.tables):
            map_members(folder, name, field, split.samples, split.tables[field_table(field)])
    except DamagedFile as error:
        return [make_damage_row(Path(error.path).name, error.reason)]
    return []


def check_stats(data: Path, manifest: Manifest) -> list[DamageRow]:
    """Check hash and numbers of the statistics."""
    if found := check_file(tables_folder(data, manifest) / STATS, manifest.stats_sha256):
        return found
    try:
        Statistics.load(data, manifest)
    except DamagedFile as error:
        return [make_damage_row(STATS, error.reason)]
    return []


def check_lists(data: Path, manifest: Manifest) -> list[DamageRow]:
    """Check the lists of rejects and of duplicates, and what a later version has beside them."""
    folder = tables_folder(data, manifest)
    others = {WITHDRAWN: manifest.withdrawn_sha256, AGGREGATES: manifest.aggregates_sha256}
    found = [check_file(folder / name, one) for name, one in others.items() if one is not None]
    return [
        *_check_list(folder / REJECTS, manifest, "rejected", {"name", "reason"}),
        *_check_list(folder / DUPLICATES, manifest, "duplicates", set()),
        *chain.from_iterable(found),
        *_check_aggregates(folder / AGGREGATES, manifest),
    ]


def _check_aggregates(path: Path, manifest: Manifest) -> list[DamageRow]:
    """Check the aggregates of a first version, whose manifest does not have their SHA-256."""
    if manifest.aggregates_sha256 is not None or not path.is_file():
        return []
    try:
        if is_sound(path.read_bytes()):
            return []
    except OSError as error:
        return [make_damage_row(path.name, _describe(error))]
    return [make_damage_row(path.name, "it is not the file that was written")]


def _check_list(path: Path, manifest: Manifest, field: str, columns: set[str]) -> list[DamageRow]:
    expected: int = getattr(manifest, field)
    digest: str | None = getattr(manifest, f"{path.stem}_sha256")
    if not path.exists() and expected == 0 and digest is None:
        return []  # the manifest says that the list is empty
    if digest is not None and (found := check_file(path, digest)):
        return found
    count = 0
    try:
        with path.open("rb") as file:
            for row in parse_rows(file):
                count += 1
                if row is None or not columns <= row.keys():
                    reason = f"line {count} is not a row of this list"
                    return [make_damage_row(path.name, reason)]
    except OSError as error:
        return [make_damage_row(path.name, _describe(error))]
    reason = f"has {count:,} rows, the manifest says {field}: {expected:,}"
    return [make_damage_row(path.name, reason)] if count != expected else []


class CheckJob(NamedTuple):
    """A shard to check, and facts of its data set."""

    data: Path
    """Folder of the shards."""
    split: str
    number: int
    """Number of the shard in its split, from 0."""
    shard: Shard
    ids: Sequence[int]
    """Ids of the shard's samples."""
    indexed: bool
    """True if the split's index file is sound."""
    classes: Classes
    manifest: Manifest
    """Manifest of the data set, which may lack its splits."""
    decode: bool
    """True if each image is decoded."""
    tables: tuple[str, ...] = ()
    """Names of the split's sound tables (`members`)."""
    fields: tuple[str, ...] = ()
    """Other members that each sample has, also where their tables are damaged."""
    withdrawn: frozenset[int] = frozenset()
    """Offsets of images that were withdrawn: their bytes may be gone."""
    unpurged: str | None = None
    """SHA-256 of the shard before these were purged; None if they were not."""


class CheckResult(NamedTuple):
    """Result of checking a shard."""

    damage: list[DamageRow]
    bytes: int
    """Number of bytes of the tar that were read."""
    is_unpurged: bool = False
    """True if the shard holds samples that the manifest says were purged."""


def check_shard(job: CheckJob) -> CheckResult:
    """Check one shard and its `.idx`."""
    path = job.data / job.shard.name
    try:
        with HashedFile(path) as file:
            found = _ShardCheck(job, file).run()
            is_unpurged = job.unpurged is not None and file.sha256 == job.unpurged
            return CheckResult(found, file.size, is_unpurged)
    except OSError as error:
        return CheckResult([make_damage_row(path.name, _describe(error))], 0)


class _ShardCheck:
    """The checks of one shard; each appends its findings."""

    def __init__(self, job: CheckJob, file: HashedFile) -> None:
        self._job, self._file = job, file
        self._found: list[DamageRow] = []
        self._entries: list[Member] = []
        self._keys: list[str] = []
        self._members: dict[str, Members] = {}
        self._fault: str | None = None
        """Reason that the tar cannot be read to its end; None if it can."""
        try:
            self._entries.extend(read_members(file.stream(), job.shard.name))
        except TarFault as error:
            self._fault = error.reason
        except OSError as error:
            self._fault = _describe(error)
        self._samples = list(group_samples(self._entries))

    def run(self) -> list[DamageRow]:
        """Return the findings of all checks: of the tar, then of its `.idx`."""
        rows: Index | None = None
        if self._job.indexed:
            index = np.load(self._tables / index_name(self._job.split), mmap_mode="r")
            rows = np.array(index[np.array(self._job.ids, np.int64)])
            self._open_tables(len(index))
            self._check_rows(rows)
        else:
            self._check_without_index()
        if not self._job.manifest.foreign:
            known = {part.name for sample in self._samples for part in sample.parts}
            for entry in self._entries:
                if entry.name not in known:
                    self._add(f"it holds {entry.name!r}, which is no file of a sample")
        shard = self._job.shard
        idx = Path(shard.name).with_suffix(".idx")
        beside = check_file(self._job.data / idx, shard.idx_sha256)
        expected = (shard.sha256, self._job.unpurged)
        differs = self._file.sha256 not in expected or self._file.size != shard.bytes
        # Damage outside of all samples shows in the size or the hash only.
        if not self._found and (differs or self._fault is not None):
            self._add(self._fault or self._describe_difference())
        if not self._found and not beside:
            beside = self._check_idx(self._job.data / idx, rows)
        return self._found + beside

    def _describe_difference(self) -> str:
        if self._file.error is not None:
            return _describe(self._file.error)
        expected = self._job.shard.bytes
        if self._file.size != expected:
            return f"has {self._file.size:,} bytes, the manifest says {expected:,}"
        return DIFFERS

    def _add(self, reason: str, place: int | None = None, key: str | None = None) -> None:
        sample = None if place is None else self._job.ids[place]
        self._found.append(make_damage_row(self._job.shard.name, reason, sample, key))

    @property
    def _tables(self) -> Path:
        return tables_folder(self._job.data, self._job.manifest)

    def _check_rows(self, rows: Index) -> None:
        """Check each row of the index against the tar, and the bytes in its range."""
        images = ((n, _find_image(one), one) for n, one in enumerate(self._samples))
        there = {self._payload(part)[0]: (n, one) for n, part, one in images if part is not None}
        job, fault = self._job, self._fault
        wrong = dict(find_row_faults(rows, job.number, job.shard.bytes, job.manifest))
        for place, row in enumerate(rows.tolist()):
            in_tar, sample = there.pop(row[2], (place, None))
            if row[2] in job.withdrawn:
                continue
            if self._is_first:
                in_tar = place  # a later version may lack samples of the tar
            reason = wrong.get(place) or self._check_row(place, in_tar, row, sample, fault)
            if reason is not None:
                key = None if sample is None else sample.key
                self._add(reason, place, key if job.manifest.foreign else self._key(in_tar))
            if sample is None:
                fault = None  # it is reported for the first sample only
        if self._fault is None and self._is_first and not job.manifest.foreign:
            for _, sample in there.values():
                self._add("it is in the tar and not in the index", key=sample.key)

    @property
    def _is_first(self) -> bool:
        """True for a first version, whose shards hold the samples of its index and no others."""
        return self._job.manifest.number == 1

    def _key(self, place: int) -> str:
        """Return the key that a sample of a build has, by its place in the tar."""
        return sample_key(shard_number(self._job.shard.name), place)

    def _check_row(
        self,
        place: int,
        in_tar: int,
        row: tuple[int, ...],
        sample: Sample | None,
        fault: str | None,
    ) -> str | None:
        """Return the first fault of a sample, None if it has none."""
        _, label, offset, size, crc, *sides = row
        if sample is None and self._fault is None:
            return f"the index has its image at byte {offset:,}, where none begins"
        try:
            data = self._file.read(offset, size)
        except OSError as error:
            return _describe(error)
        if len(data) < size:
            return "the shard ends before it does"
        if isal_zlib.crc32(data) != crc:
            return "CRC-32 of the image differs"
        if sample is None:  # its bytes are sound, its header is not
            return fault
        shape = (sides[1], sides[0]) if sides else None
        return (
            self._check_sample(in_tar, sample, label, size)
            or self._check_members(place, sample)
            or self._check_image(data, shape)
        )

    def _check_members(self, place: int, sample: Sample) -> str | None:
        """Return the first difference between a sample's members and the tables, None if none."""
        if self._keys and self._keys[place] != sample.key:
            listed = escape(self._keys[place])
            return f"its key is {escape(sample.key)} in the tar and {listed} in the table"
        for field, rows in self._members.items():
            try:
                found = locate_member(sample, field, self._file.read)
            except UnfitSample as error:
                return str(error)
            except OSError as error:
                return _describe(error)
            if found[:2] != rows[place].tolist()[:2]:
                return f"its .{field} is not where the table has it"
            if found != rows[place].tolist():
                return f"CRC-32 of its .{field} differs"
        return None

    def _open_tables(self, samples: int) -> None:
        """Read the keys of the shard's samples, and the rows of each field."""
        job = self._job
        ids = np.array(job.ids, np.int64)
        if text_files("keys")[0] in job.tables:
            self._keys = TextTable(self._tables, job.split, "keys", samples).read(ids)
        for field in list_fields(job.tables):
            self._members[field] = map_members(self._tables, job.split, field, samples, None)[ids]

    def _check_sample(self, place: int, sample: Sample, label: int, size: int) -> str | None:
        """Return the first fault of a sample's members, None if they have none."""
        job, manifest = self._job, self._job.manifest
        if not manifest.foreign:
            if sample.key != self._key(place):
                return f"its key in the tar is {escape(sample.key)}"
            endings = sorted([*self._list_label(), ENDINGS[manifest.encoding], *job.fields])
            if [part.ending for part in sample.parts] != endings:
                names = ", ".join(escape(part.name) for part in sample.parts)
                return f"its members are {names}, not {' and '.join(f'.{one}' for one in endings)}"
        try:
            found = self._find_label(sample)
        except UnfitSample as error:
            return str(error)
        if found != label:
            return f"its label is {found} in the tar and {label} in the index"
        image = _find_image(sample)
        assert image is not None, sample  # whoever calls this has found it
        length = self._payload(image)[1]
        if length != size:
            return f"its image has {length:,} bytes in the tar and {size:,} in the index"
        if self._raw_bytes:
            header = bytes(self._file.read(image.offset, image.size - self._raw_bytes))
            if header != _npy_header(manifest.mean_side):
                return "the header of its .npy is damaged"
        return None

    def _list_label(self) -> list[str]:
        """Return the ending of the label, if samples have one."""
        return ["cls"] if self._job.classes.names else []

    def _find_label(self, sample: Sample) -> int | str:
        """Return the number of a sample's label, or why it has none; -1 without classes."""
        if not self._list_label():
            return -1
        return self._job.classes.find_number(find_label(sample, self._file.read).label)

    def _payload(self, part: SampleFile) -> tuple[int, int]:
        """Return offset and size of the image's bytes; of a `.npy`, those of the pixels."""
        skip = max(0, part.size - self._raw_bytes) if self._raw_bytes else 0
        return part.offset + skip, part.size - skip

    @property
    def _raw_bytes(self) -> int:
        """Bytes of the pixels of an image, 0 for JPEGs."""
        manifest = self._job.manifest
        return 3 * manifest.mean_side**2 if manifest.encoding == "raw" else 0

    def _check_image(self, data: bytes | memoryview, size: Size | None = None) -> str | None:
        """Return the fault of an image; `size` is that of the index, where images differ."""
        if self._job.decode:
            if side := self._job.manifest.side:
                size = side, side
            try:
                decode_image(data, self._job.manifest.encoding, size)
            except Undecodable as error:
                return str(error)
        return None

    def _check_without_index(self) -> None:
        """Check the tar alone, because the index is damaged."""
        for place, sample in enumerate(self._samples if self._is_first else ()):
            if reason := self._check_without_row(place, sample):
                self._add(reason, place if place < len(self._job.ids) else None, sample.key)
        if self._fault is not None:
            self._add(self._fault)

    def _check_without_row(self, place: int, sample: Sample) -> str | None:
        try:
            label = self._find_label(sample)
            if (part := _find_image(sample)) is None:
                return "it has no image"
            offset, size = self._payload(part)
            data = self._file.read(offset, size)
        except UnfitSample as error:
            return None if self._job.manifest.foreign else str(error)
        except OSError as error:
            return _describe(error)
        if isinstance(label, str):
            return label
        return self._check_sample(place, sample, label, size) or self._check_image(data)

    def _check_idx(self, path: Path, rows: Index | None) -> list[DamageRow]:
        """Compare an `.idx` with a sound tar: byte for byte, or place by place if it is foreign."""
        content = path.read_bytes()
        if not self._job.manifest.foreign:
            expected = format_idx(self._samples)
            if content == expected:
                return []
            pairs = zip(content.splitlines(), expected.splitlines(), strict=False)
            same = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
            where = "its number of lines" if same is None else f"line {same + 1}"
            return [make_damage_row(path.name, f"{where} is not what the tar holds")]
        try:
            places = {(offset, size) for one in parse_idx(content) for _, offset, size in one}
        except ValueError as error:
            return [make_damage_row(path.name, str(error))]
        wanted = [] if rows is None else rows[["offset", "size"]].tolist()
        lacking = [one for one in wanted if one not in places]
        reason = "it lacks samples that are in the index"
        return [make_damage_row(path.name, reason)] if lacking else []


def _find_image(sample: Sample) -> SampleFile | None:
    """Return the image of a sample, None if it has none: `KEY.jpg` before `KEY.thumb.jpg`."""
    found = [part for part in sample.parts if part.kind in (*JPEG_ENDINGS, "npy")]
    return min(found, key=lambda part: "." in part.ending, default=None)


@cache
def _npy_header(side: int) -> bytes:
    return encode_npy(np.zeros((side, side, 3), np.uint8))[: -3 * side**2]
