"""One shard against the manifest, the index and its `.idx`, from one pass over its bytes.

The SHA-256 says that the file is the one that was sealed. The CRC-32s are checked as well, in a
shard whose hash is right, too: they are what a training run goes by, and they stand in another
file. An index of another build, or a manifest that was written anew over damaged shards, shows
nowhere else before the run that finds each of its samples damaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from pipeline.dataset.images import ENDINGS, SIZE, Encoding, as_npy
from pipeline.dataset.index import Index, index_name, sample_key
from pipeline.dataset.manifest import Shard
from pipeline.dataset.samples import Part, Sample, Unfit, label_of, samples_of
from pipeline.dataset.tar import Member, members
from pipeline.indexing.examine import tar_fault
from pipeline.indexing.idx import idx_text, read_idx
from pipeline.indexing.names import Classes
from pipeline.sources.listing import shown
from pipeline.stored_picture import Undecodable, pixels_of
from pipeline.tools.errors import UsageError
from pipeline.verification.beside import file_damage
from pipeline.verification.findings import DIFFERS, MISSING, Damage, damage
from pipeline.whole_file import WholeFile

RAW_BYTES = SIZE * SIZE * 3


class Job(NamedTuple):
    """One shard to check, and what is known of its set."""

    data: Path
    split: str
    number: int
    """Of the shard in its split."""
    shard: Shard
    start: int
    """Id of its first sample."""
    indexed: bool
    """Whether the split's index is sound as a file."""
    classes: Classes
    encoding: Encoding
    foreign: bool
    """Whether keys and members are of another tool's choosing."""
    decode: bool


class Checked(NamedTuple):
    """What came of it."""

    damage: list[Damage]
    bytes: int
    """Of the tar, read."""


def check_shard(job: Job) -> Checked:
    """Check one shard and its `.idx`."""
    path = job.data / job.shard.name
    try:
        with WholeFile(path) as file:
            return Checked(_Check(job, file).findings(), file.size)
    except FileNotFoundError:
        return Checked([damage(path.name, MISSING)], 0)
    except OSError as error:
        return Checked([damage(path.name, f"cannot be read ({error.strerror})")], 0)


class _Check:
    """The checks of one shard; each adds to what was found."""

    def __init__(self, job: Job, file: WholeFile) -> None:
        self._job, self._file = job, file
        self._found: list[Damage] = []
        self._entries: list[Member] = []
        self._fault: str | None = None
        """Why the tar cannot be read to its end."""
        try:
            self._entries.extend(members(file.stream(), job.shard.name))
        except UsageError as error:
            self._fault = tar_fault(error)
        except OSError as error:
            self._fault = f"cannot be read ({error.strerror})"
        self._samples = list(samples_of(self._entries))

    def findings(self) -> list[Damage]:
        """Check everything; return what is wrong with the tar, then with its `.idx`."""
        rows = self._rows_of_index()
        if rows is None:
            self._check_without_index()
        else:
            self._check_rows(rows)
        if not self._job.foreign:
            self._check_strangers()
        shard = self._job.shard
        idx = Path(shard.name).with_suffix(".idx")
        beside = file_damage(self._job.data / idx, shard.idx_sha256)
        differs = (self._file.sha256, self._file.size) != (shard.sha256, shard.bytes)
        # The samples say it all, unless the damage lies between them.
        if not self._found and (differs or self._fault is not None):
            self._add(self._fault or self._size_or_hash())
        if not self._found and not beside:
            beside = self._check_idx(self._job.data / idx, rows)
        return self._found + beside

    def _size_or_hash(self) -> str:
        if self._file.error is not None:
            return f"cannot be read ({self._file.error.strerror})"
        expected = self._job.shard.bytes
        if self._file.size != expected:
            return f"has {self._file.size:,} bytes, the manifest says {expected:,}"
        return DIFFERS

    def _add(self, reason: str, place: int | None = None, key: str | None = None) -> None:
        sample = None if place is None else self._job.start + place
        self._found.append(damage(self._job.shard.name, reason, sample, key))

    def _rows_of_index(self) -> Index | None:
        if not self._job.indexed:
            return None
        rows = np.load(self._job.data / index_name(self._job.split), mmap_mode="r")
        start = self._job.start
        return np.array(rows[start : start + self._job.shard.samples])

    def _check_rows(self, rows: Index) -> None:
        """Check each row of the index against the tar, and the bytes that it points at."""
        there = {self._payload(part)[0]: sample for part, sample in _pictures(self._samples)}
        fault = self._fault
        for place, row in enumerate(rows.tolist()):
            sample = there.pop(row[2], None)
            reason = self._row_fault(place, row, sample, fault)
            if reason is not None:
                self._add(reason, place, self._key(place, sample))
            if sample is None:
                fault = None  # it is told of the first sample that it hides
        if self._fault is None and not self._job.foreign:
            for sample in there.values():
                self._add("it is in the tar and not in the index", key=sample.key)

    def _key(self, place: int, sample: Sample | None) -> str | None:
        if not self._job.foreign:
            return sample_key(self._job.number, place)
        return None if sample is None else sample.key

    def _row_fault(
        self, place: int, row: tuple[int, ...], sample: Sample | None, fault: str | None
    ) -> str | None:
        """Return what is wrong with a sample, first of all things."""
        number, label, offset, size, crc = row
        if number != self._job.number:
            return f"the index has it in shard {number}"
        if isinstance(self._job.classes.number(label), str):
            return f"its label {label} is outside the classes"
        if sample is None and self._fault is None:
            return f"the index has its picture at byte {offset:,}, where none begins"
        try:
            data = self._file.read(offset, size)
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if len(data) < size:
            return "the shard ends before it does"
        if isal_zlib.crc32(data) != crc:
            return "CRC-32 of the picture differs"
        if sample is None:  # its bytes are there, its header may not be: the first one tells
            return fault
        return self._sample_fault(place, sample, label, size) or self._picture_fault(data)

    def _sample_fault(self, place: int, sample: Sample, label: int, size: int) -> str | None:
        """Return what is wrong with the members of a sample."""
        job = self._job
        if not job.foreign:
            if sample.key != sample_key(job.number, place):
                return f"its key in the tar is {shown(sample.key)}"
            if [part.ending for part in sample.parts] != ["cls", ENDINGS[job.encoding]]:
                names = ", ".join(shown(part.name) for part in sample.parts)
                return f"its members are {names}, not .cls and .{ENDINGS[job.encoding]}"
        try:
            found = job.classes.number(label_of(sample, self._file.read))
        except Unfit as error:
            return str(error)
        if found != label:
            return f"its label is {found} in the tar and {label} in the index"
        picture = next(part for part, _ in _pictures([sample]))
        length = self._payload(picture)[1]
        if length != size:
            return f"its picture has {length:,} bytes in the tar and {size:,} in the index"
        return self._header_fault(picture) if job.encoding == "raw" else None

    def _payload(self, part: Part) -> tuple[int, int]:
        """Return offset and size of what the index points at: of a `.npy`, the pixels."""
        skip = max(0, part.size - RAW_BYTES) if self._job.encoding == "raw" else 0
        return part.offset + skip, part.size - skip

    def _header_fault(self, part: Part) -> str | None:
        header = bytes(self._file.read(part.offset, part.size - RAW_BYTES))
        return None if header == _npy_header() else "the header of its .npy is damaged"

    def _picture_fault(self, data: bytes | memoryview) -> str | None:
        if self._job.decode:
            try:
                pixels_of(data, self._job.encoding)
            except Undecodable as error:
                return str(error)
        return None

    def _check_without_index(self) -> None:
        """Check what the tar shows by itself, where the index is damaged."""
        for place, sample in enumerate(self._samples):
            if reason := self._fault_alone(place, sample):
                self._add(reason, place, sample.key)
        if self._fault is not None:
            self._add(self._fault)

    def _fault_alone(self, place: int, sample: Sample) -> str | None:
        try:
            label = self._job.classes.number(label_of(sample, self._file.read))
            part, _ = next(_pictures([sample]), (None, None))
            if part is None:
                return "it has no picture"
            offset, size = self._payload(part)
            data = self._file.read(offset, size)
        except Unfit as error:
            return None if self._job.foreign else str(error)
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if isinstance(label, str):
            return label
        return self._sample_fault(place, sample, label, size) or self._picture_fault(data)

    def _check_strangers(self) -> None:
        """Find members that belong to no sample."""
        known = {part.name for sample in self._samples for part in sample.parts}
        for entry in self._entries:
            if entry.name not in known:
                self._add(f"it holds {entry.name!r}, which is no file of a sample")

    def _check_idx(self, path: Path, rows: Index | None) -> list[Damage]:
        """Compare an `.idx` with a sound tar: its bytes, or if foreign, its places."""
        content = path.read_bytes()
        if not self._job.foreign:
            expected = idx_text(self._samples)
            if content == expected:
                return []
            pairs = zip(content.splitlines(), expected.splitlines(), strict=False)
            same = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
            where = "its number of lines" if same is None else f"line {same + 1}"
            return [damage(path.name, f"{where} is not what the tar holds")]
        try:
            places = {(offset, size) for one in read_idx(content) for _, offset, size in one}
        except ValueError as error:
            return [damage(path.name, str(error))]
        wanted = [] if rows is None else rows[["offset", "size"]].tolist()
        lacking = [one for one in wanted if one not in places]
        reason = "it lacks samples that are in the index"
        return [damage(path.name, reason)] if lacking else []


def _pictures(samples: Sequence[Sample]) -> Iterator[tuple[Part, Sample]]:
    """Return the picture of each sample that has one."""
    for sample in samples:
        for part in sample.parts:
            if part.kind in ("jpg", "jpeg", "npy"):
                yield part, sample
                break


@cache
def _npy_header() -> bytes:
    return as_npy(np.zeros((SIZE, SIZE, 3), np.uint8))[:-RAW_BYTES]
