"""Measures stored images: pixel sums and perceptual hashes, as when they were packed.

That is needed where a version does not keep them (`pipeline.dataset.aggregates`), and for images
that a version loses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from pipeline.dataset.aggregates import HASH_BYTES
from pipeline.dataset.image_stats import Sums
from pipeline.dataset.images import SIZE, Undecodable, decode_image
from pipeline.dataset.index import Index
from pipeline.dataset.manifest import Manifest
from pipeline.packing.duplicates import perceptual_hash
from pipeline.packing.hamming import Hashes
from pipeline.packing.resize import resample
from pipeline.remote.target import ByteRange, Target
from pipeline.tools.errors import DataError
from pipeline.tools.processes import Pool
from pipeline.tools.progress import Progress, write_line

BATCH = 256
"""Stored images that are measured in one job."""


def subtract(sums: Sums, removed: Sums) -> Sums:
    """Return sums without some images, which were decoded from their stored form.

    That form differs by what its encoding lost; no sum falls below 0.
    """
    left = Sums(len(sums.image_sum))
    left.images = sums.images - removed.images
    left.image_sum = sums.image_sum - np.minimum(sums.image_sum, removed.image_sum)
    left.outer = np.maximum(sums.outer - removed.outer, 0)
    return left


def subtract_images(
    sums: Sums, target: Target, manifest: Manifest, removed: Index, left: Index, pool: Pool
) -> Sums:
    """Return sums of the training set without some of its images; the fewer images are decoded.

    Where one that is removed is damaged, those that are left are decoded instead: so a damaged
    image can be withdrawn or replaced.

    Args:
        sums: with all images.
        target: the data set.
        manifest: of the version that has them.
        removed: index rows of the images that are removed.
        left: index rows of all others.
        pool: runs the jobs.

    Raises:
        DataError: an image that is left is damaged.
        OSError: the target cannot be read.
    """
    if len(removed) <= len(left):
        try:
            return subtract(sums, measure(target, manifest, "train", removed, pool)[0])
        except DataError as error:
            write_line(f"note: {error}; the images that stay are read instead")
    return measure(target, manifest, "train", left, pool)[0]


@dataclass(frozen=True)
class MeasureJob:
    """Stored images to decode, with everything that a worker on any node needs."""

    target: Target
    number: int
    """Place of the first among the images of this measurement."""
    ranges: tuple[ByteRange, ...]
    crcs: tuple[int, ...]
    """CRC-32 of each, as the index has it."""
    manifest: Manifest
    """Manifest of the data set, without its splits."""


class MeasuredImages(NamedTuple):
    """Sums and hashes of some stored images."""

    number: int
    sums: Sums
    hashes: Hashes


def measure_images(job: MeasureJob) -> MeasuredImages:
    """Decode stored images, and measure them as when they were packed; runs in a worker process.

    Raises:
        DataError: one is damaged.
        OSError: the target cannot be read.
    """
    manifest, sums = job.manifest, Sums(job.manifest.mean_side)
    hashes = np.zeros((len(job.ranges), HASH_BYTES), np.uint8)
    size = (manifest.side, manifest.side) if manifest.side else None
    found = job.target.read_ranges(job.ranges)
    for place, (one, crc, data) in enumerate(zip(job.ranges, job.crcs, found, strict=True)):
        where = f"the image at byte {one.offset:,} of {job.target.address}/{one.name}"
        if isal_zlib.crc32(data) != crc:
            raise DataError(f"{where} is damaged (CRC-32 differs); duet verify lists all damage")
        try:
            pixels = decode_image(data, manifest.encoding, size)
        except Undecodable as error:
            raise DataError(f"{where} cannot be decoded ({error}); withdraw it first") from error
        square = pixels if pixels.shape[:2] == (SIZE, SIZE) else resample(pixels)
        sums.add(pixels if manifest.fit == "square" else square)
        hashes[place] = np.frombuffer(perceptual_hash(square), np.uint8)
    return MeasuredImages(job.number, sums, hashes)


def measure(
    target: Target,
    manifest: Manifest,
    split: str,
    rows: Index,
    pool: Pool,
    what: str = "reading stored images",
) -> tuple[Sums, Hashes]:
    """Return the sums and hashes of stored images.

    Args:
        target: the data set.
        manifest: of the version that has them.
        split: name of their split.
        rows: of its index.
        pool: runs the jobs.
        what: words for the progress line.

    Raises:
        As `measure_images`.
    """
    sums, hashes = Sums(manifest.mean_side), np.zeros((len(rows), HASH_BYTES), np.uint8)
    jobs = _list_jobs(target, manifest, split, rows)
    with Progress(what, total=len(rows), unit="img") as progress:
        for done in pool.run(measure_images, jobs):
            sums += done.sums
            hashes[done.number : done.number + len(done.hashes)] = done.hashes
            progress.advance(len(done.hashes))
    return sums, hashes


def _list_jobs(target: Target, manifest: Manifest, split: str, rows: Index) -> Iterator[MeasureJob]:
    shards, facts = manifest.splits[split].shards, replace(manifest, splits={})
    for start in range(0, len(rows), BATCH):
        block = rows[start : start + BATCH]
        places = zip(
            block["shard"].tolist(), block["offset"].tolist(), block["size"].tolist(), strict=True
        )
        ranges = tuple(ByteRange(shards[shard].name, at, size) for shard, at, size in places)
        yield MeasureJob(target, start, ranges, tuple(block["crc"].tolist()), facts)
