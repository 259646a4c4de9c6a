"""One shard that another tool made -> where its samples lie, their labels, and what is wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from pipeline.dataset.image_stats import Sums
from pipeline.dataset.index import INDEX_DTYPE, Index
from pipeline.dataset.samples import Sample, Unfit, has_pictures, label_of, samples_of
from pipeline.dataset.tar import members
from pipeline.indexing.idx import idx_text, places_of, read_idx
from pipeline.indexing.names import MOST, Classes
from pipeline.sources.listing import shown
from pipeline.stored_picture import Undecodable, pixels_of
from pipeline.tools.errors import UsageError
from pipeline.tools.files import sealed
from pipeline.whole_file import WholeFile

PICTURE_LIMIT = 1 << 24
"""Bytes of a stored JPEG; 256x256 pixels never come near."""


class Job(NamedTuple):
    """One shard to look at."""

    path: Path
    measured: bool
    """Whether it is of the training split: its pixels count for the statistics."""
    classes: Classes | None
    """Where they are known beforehand."""


class Bad(NamedTuple):
    """What cannot be trained from: a sample, or with an empty key the whole shard."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        key = f" key {shown(self.key)}" if self.key else ""
        return f"{shown(self.shard)}{key}: {self.reason}"


@dataclass
class Examined:
    """What one shard holds."""

    name: str
    bytes: int = 0
    sha256: str = ""
    idx_sha256: str = ""
    """Of the `.idx` that lies beside it, if there is one."""
    rows: Index = field(default_factory=lambda: np.zeros(0, INDEX_DTYPE))
    """A label in here is a place in `labels`, and the shard is number 0."""
    labels: list[int | str] = field(default_factory=list)
    """Those that there are, as they are written."""
    keys: list[str] = field(default_factory=list)
    """Of the rows; only where a label may yet turn out to be of no class."""
    sums: Sums = field(default_factory=Sums)
    bad: list[Bad] = field(default_factory=list)


def examine(job: Job) -> Examined:
    """Look at every sample of a shard: decode its picture, find its label."""
    found = Examined(job.path.name)
    try:
        with WholeFile(job.path) as file:
            found.bytes = file.size
            if file.error is not None:
                raise file.error
            found.sha256 = file.sha256 or ""
            good = list(_good(file, job, found))
    except UsageError as error:
        found.bad.append(Bad(found.name, "", tar_fault(error)))
        return found
    except OSError as error:
        found.bad.append(Bad(found.name, "", f"cannot be read ({error.strerror})"))
        return found
    _look_at_idx(job.path.with_suffix(".idx"), good, found)
    return found


class Listing(NamedTuple):
    """An `.idx` to write."""

    path: Path
    """The tar."""
    pictures: frozenset[int]
    """Offsets of the pictures that are in it."""


def list_for_dali(job: Listing) -> str:
    """Write the `.idx` of a shard, and return its SHA-256."""
    with job.path.open("rb", buffering=0) as file:
        samples = [
            sample
            for sample in samples_of(members(file, job.path.name))
            if any(part.offset in job.pictures for part in sample.parts)
        ]
    content = idx_text(samples)
    with sealed(job.path.with_suffix(".idx")) as out:
        out.write(content)
    return hashlib.sha256(content).hexdigest()


def tar_fault(error: UsageError) -> str:
    """Return what is wrong with a tar, out of the line that `members` says it in."""
    return str(error).partition(" cannot be read (")[2].rpartition(")")[0] or str(error)


def _good(file: WholeFile, job: Job, found: Examined) -> Iterator[Sample]:
    """Fill in rows and labels, or what is wrong; yield the samples that are fit."""
    rows, codes = [], dict[int | str, int]()
    for sample in filter(has_pictures, samples_of(members(file.stream(), job.path.name))):
        try:
            offset, size, crc, label = _row(file, sample, job, found.sums)
        except (Unfit, Undecodable) as error:
            found.bad.append(Bad(found.name, sample.key, str(error)))
            continue
        except OSError as error:
            found.bad.append(Bad(found.name, sample.key, f"it cannot be read ({error.strerror})"))
            continue
        rows.append((0, codes.setdefault(label, len(codes)), offset, size, crc))
        if not job.measured:
            found.keys.append(sample.key)
        yield sample
    found.rows, found.labels = np.array(rows, INDEX_DTYPE), list(codes)


def _row(file: WholeFile, sample: Sample, job: Job, sums: Sums) -> tuple[int, int, int, int | str]:
    """Return offset, size and CRC-32 of a picture, and the label as it is written."""
    picture = sample.picture()
    if picture.size > PICTURE_LIMIT:
        raise Unfit(f"its picture has {picture.size:,} bytes")
    label = label_of(sample, file.read)
    number = label if job.classes is None else job.classes.number(label)
    if isinstance(number, int) and not 0 <= number < MOST:
        raise Unfit(f"label {str(label)[:40]} is no class number")
    if job.classes is not None and isinstance(number, str):
        raise Unfit(number)
    data = bytes(file.read(picture.offset, picture.size))
    pixels = pixels_of(data)
    if job.measured:
        sums.add(pixels)
    return picture.offset, picture.size, isal_zlib.crc32(data), label


def _look_at_idx(path: Path, good: list[Sample], found: Examined) -> None:
    """Take an `.idx` that is there for what it should be, or say what is wrong with it."""
    if not path.exists():
        return
    content = path.read_bytes()
    try:
        places = read_idx(content)
    except ValueError as error:
        found.bad.append(Bad(path.name, "", f"is no index of DALI's ({error}); move it away"))
        return
    known = {tuple(one) for one in places}
    if missing := [one for one in places_of(good) if tuple(one) not in known]:
        where = f"byte {missing[0][0][1]:,}"
        reason = f"is not of {found.name}, where a sample begins at {where}; move it away"
        found.bad.append(Bad(path.name, "", reason))
    found.idx_sha256 = hashlib.sha256(content).hexdigest()
