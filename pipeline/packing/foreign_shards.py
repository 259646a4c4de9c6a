"""Shards of another tool: whether each sample of one can be trained from, and where it lies."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from pipeline.dataset.image_stats import SquareSums
from pipeline.dataset.images import SIZE, Undecodable, decode_image, measure_jpeg
from pipeline.dataset.index import MOST_IMAGE_BYTES, SIZED_DTYPE, Index
from pipeline.dataset.members import (
    MEMBER_DTYPE,
    Members,
    escape_line,
    locate_member,
    unescape_line,
)
from pipeline.dataset.samples import (
    JPEG_ENDINGS,
    MAX_CLASSES,
    TORN,
    Classes,
    Sample,
    UnfitSample,
    find_label,
    find_torn,
    group_samples,
    is_meant,
)
from pipeline.dataset.shards import find_idx_fault, format_idx
from pipeline.dataset.tar import TarFault, escape, read_members
from pipeline.options import IndexConfig
from pipeline.packing.resize import resample
from pipeline.remote.filesystem import StoreError, is_remote, join_name, temporary_space
from pipeline.sources.names import TAR
from pipeline.sources.paths import open_file
from pipeline.tools.files import HashedFile

BLOCK = 1 << 22
"""Bytes of a remote shard that are copied at a time."""


class BadSample(NamedTuple):
    """A sample that cannot be trained from, or with an empty key a whole shard."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        key = f" key {escape(self.key)}" if self.key else ""
        return f"{escape(self.shard)}{key}: {self.reason}"


class ExamineJob(NamedTuple):
    """One shard to examine."""

    folder: str
    """Folder of the shard, or its address in a store."""
    name: str
    is_training: bool
    """True if the pixels of its images count in the statistics."""
    classes: Classes | None
    """Classes of the data set, where they are known beforehand."""
    config: IndexConfig
    scratch: Path
    """Local folder that gets its `.idx`, and the shard itself while it is examined if it is of a
    store."""
    has_idx: bool = False
    """True if its `.idx` lies beside it already."""


@dataclass
class ExaminedShard:
    """Contents of one shard."""

    name: str
    keys: bytes = b""
    """Keys of the rows, as lines of the table of keys."""
    bytes: int = 0
    sha256: str = ""
    idx_sha256: str = ""
    """SHA-256 of the `.idx` that lies beside it already; "" if there is none."""
    rows: Index = field(default_factory=lambda: np.zeros(0, SIZED_DTYPE))
    """Rows of its samples; a label is a place in `labels`, and the shard is number 0."""
    labels: list[int | str] = field(default_factory=list)
    """Distinct labels, as they are written."""
    members: dict[str, Members] = field(default_factory=dict)
    """Rows of each field, `MEMBER_DTYPE`, one for each of `rows`."""
    sums: SquareSums = field(default_factory=SquareSums)
    bad: list[BadSample] = field(default_factory=list)

    def number_labels(self, known: Classes, scratch: Path) -> list[BadSample]:
        """Turn the labels into numbers; drop and return the samples that have none.

        Args:
            known: classes of the data set.
            scratch: folder of the `.idx`, which loses the lines of these samples, too.
        """
        numbers = [known.find_number(label) for label in self.labels]
        bad, keys = [], self.keys.splitlines(keepends=True)
        for place, code in enumerate(self.rows["label"].tolist()):
            if isinstance(reason := numbers[code], str):
                bad.append(BadSample(self.name, unescape_line(keys[place]), reason))
        table = [-1 if isinstance(number, str) else number for number in numbers]
        if table:
            self.rows["label"] = np.array(table, np.int32)[self.rows["label"]]
        if bad:
            kept = self.rows["label"] >= 0
            self.rows, self.keys = self.rows[kept], b"".join(compress(keys, kept))
            self.members = {name: rows[kept] for name, rows in self.members.items()}
            if (idx := scratch / idx_name(self.name)).is_file():
                _, *lines = idx.read_bytes().splitlines(keepends=True)
                head = f"v1.2 {np.count_nonzero(kept)}\n".encode()
                idx.write_bytes(b"".join([head, *compress(lines, kept)]))
        return bad


def idx_name(shard: str) -> str:
    """Return the name of the `.idx` of a shard."""
    return f"{shard.removesuffix(TAR)}.idx"


def examine_shard(job: ExamineJob) -> ExaminedShard:
    """Check every sample of a shard: decode its image, or read its header, and read its label.

    Raises:
        StoreError: the store does not give the shard.
        SetupError: the disk of `job.scratch` has no room for it.
    """
    found = ExaminedShard(job.name)
    if not found.name.endswith(TAR):
        reason = "by its name no plain tar, which ends in .tar; unpack or rename it"
        found.bad.append(BadSample(found.name, "", reason))
        return found
    try:
        with _local_copy(job) as path, HashedFile(path) as file:
            found.bytes = file.size
            if file.error is not None:
                raise file.error
            found.sha256 = file.sha256 or ""
            good = list(_examine_samples(file, job, found))
        if job.has_idx:
            _compare_idx(job.folder, good, found)
        else:
            (job.scratch / idx_name(found.name)).write_bytes(format_idx(good))
    except StoreError:  # no fault of the shard: another try may find it whole
        raise
    except (TarFault, OSError) as error:
        if isinstance(error, OSError):
            reason = f"cannot be read ({error.strerror})"
        else:
            reason = error.reason
        found.bad.append(BadSample(found.name, "", reason))
    return found


@contextmanager
def _local_copy(job: ExamineJob) -> Iterator[Path]:
    """Yield the path of a shard; one of a store is on this machine's disk during the block."""
    address = join_name(job.folder, job.name)
    if not is_remote(address):
        yield Path(address)
        return
    path = job.scratch / job.name
    try:
        with (
            temporary_space("shards that are examined"),
            open_file(address) as source,
            path.open("wb") as copy,
        ):
            shutil.copyfileobj(source, copy, BLOCK)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _compare_idx(folder: str, good: list[Sample], found: ExaminedShard) -> None:
    name = idx_name(found.name)
    with open_file(join_name(folder, name)) as file:
        content = file.read()
    found.idx_sha256 = hashlib.sha256(content).hexdigest()
    if fault := find_idx_fault(content, found.name, good):
        found.bad.append(BadSample(name, "", f"{fault}; move it away"))


def _examine_samples(file: HashedFile, job: ExamineJob, found: ExaminedShard) -> Iterator[Sample]:
    """Fill in rows and labels, or the bad samples; yield the samples that can be trained from."""
    rows, keys, codes = [], list[bytes](), dict[int | str, int]()
    members = {name: list[tuple[int, int, int]]() for name in job.config.fields}
    unfit: list[tuple[str, UnfitSample]] = []
    samples = filter(is_meant, group_samples(read_members(file.stream(), found.name)))
    for place, sample in enumerate(samples):
        decode = place % job.config.decode_every == 0
        try:
            others = {name: locate_member(sample, name, file.read) for name in job.config.fields}
            row = _examine_sample(file, sample, job, found.sums, decode)
        except (UnfitSample, Undecodable, OSError) as error:
            reason = str(error)
            if isinstance(error, UnfitSample):
                unfit.append((sample.key, error))
            elif isinstance(error, OSError):
                reason = f"it cannot be read ({error.strerror})"
            found.bad.append(BadSample(found.name, sample.key, reason))
            continue
        rows.append((0, codes.setdefault(row[-1], len(codes)), *row[:-1]))
        keys.append(escape_line(sample.key))
        for name, other in others.items():
            members[name].append(other)
        yield sample
    if torn := find_torn(unfit):
        found.bad = [bad._replace(reason=TORN) if bad.key in torn else bad for bad in found.bad]
    found.rows, found.labels = np.array(rows, SIZED_DTYPE), list(codes)
    found.keys = b"".join(keys)
    found.members = {name: np.array(places, MEMBER_DTYPE) for name, places in members.items()}


def _examine_sample(
    file: HashedFile, sample: Sample, job: ExamineJob, sums: SquareSums, decode: bool
) -> tuple[int, int, int, int, int, int | str]:
    """Return offset, size, CRC-32, width and height of an image, and the label as it is written."""
    image = sample.find_image()
    if image.kind not in JPEG_ENDINGS:
        raise UnfitSample(f"its image is a .{escape(image.ending)}, no .jpg or .jpeg")
    if image.size > MOST_IMAGE_BYTES:
        raise UnfitSample(f"its image has {image.size:,} bytes")
    label = find_label(sample, file.read).label
    number = label if job.classes is None else job.classes.find_number(label)
    if isinstance(number, int) and not 0 <= number < MAX_CLASSES:
        raise UnfitSample(f"label {str(label)[:40]} is no class number")
    if job.classes is not None and isinstance(number, str):
        raise UnfitSample(number)
    data = bytes(file.read(image.offset, image.size))
    pixels = decode_image(data, size=None) if decode else None
    height, width = measure_jpeg(data) if pixels is None else pixels.shape[:2]
    sums.add_size(height, width)
    if job.is_training and pixels is not None:
        sums.add(pixels, pixels if (height, width) == (SIZE, SIZE) else resample(pixels))
    return image.offset, image.size, isal_zlib.crc32(data), width, height, label
