"""What a worker does with a chunk: pictures in; encoded pictures and what is known of them out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from isal import isal_zlib

from pipeline.dataset.image_stats import Sums
from pipeline.dataset.images import Pixels, as_npy
from pipeline.packing.chunks import PACKED_DTYPE, ChunkDone, ChunkJob, data_name, facts_name
from pipeline.packing.isolated import Crash, isolated
from pipeline.packing.limits import one_line
from pipeline.packing.options import Build
from pipeline.packing.perceptual import perceptual_hash
from pipeline.packing.resize import PictureError, encode, one_thread, square
from pipeline.sources import Unreadable, open_reader
from pipeline.tools.errors import DuetError


def pack(job: ChunkJob) -> ChunkDone:
    """Pack a chunk; see `chunks.pack_chunk`."""
    one_thread()
    packed = np.zeros(len(job.rows), PACKED_DTYPE)
    reasons: dict[int, str] = {}
    sums, offset = Sums(), 0
    with job.target.create(data_name(job.number), durable=False) as file:
        for place, found in enumerate(_pixels(job)):
            if isinstance(found, str):
                reasons[place] = found
                continue
            if job.trains[place]:
                sums.add(found)
            data = _encoded(found, job.options)
            file.write(data)
            packed[place] = (
                True,
                offset,
                len(data),
                isal_zlib.crc32(data),
                np.frombuffer(perceptual_hash(found), np.uint8),
            )
            offset += len(data)
    with job.target.create(facts_name(job.number), durable=False) as file:
        np.savez(
            file,
            packed=packed,
            reasons=np.frombuffer(json.dumps(list(reasons.items())).encode(), np.uint8),
            pictures=np.uint32(sums.pictures),
            picture=sums.picture.astype(np.uint32),  # a chunk has far fewer than 2**24 pictures
            outer=sums.outer,
        )
    return ChunkDone(job.number, len(packed), len(reasons))


def _pixels(job: ChunkJob) -> Iterator[Pixels | str]:
    """Give each picture of a chunk, or the reason why there is none."""
    for data in _bytes(job):
        if isinstance(data, str):
            yield data
        elif job.careful:
            yield _square_apart(data, job)
        else:
            yield _square(data, job.options.min_side)


def _square(data: bytes, min_side: int) -> Pixels | str:
    try:
        return square(data, min_side)
    except PictureError as error:
        return str(error)
    except Exception as error:  # whatever it is, it is this picture's
        return f"cannot be decoded: {one_line(error) or type(error).__name__}"


def _square_apart(data: bytes, job: ChunkJob) -> Pixels | str:
    """Open a picture in a process of its own, which it may take down with it."""
    try:
        return isolated(_square, data, job.options.min_side)
    except Crash as crash:
        if crash.from_outside:
            raise DuetError(
                f"the process that packs chunk {job.number} was killed twice (out of memory?); "
                "run the same command again, with fewer --workers"
            ) from crash
        return f"its decoder crashed ({crash})"


def _bytes(job: ChunkJob) -> Iterator[bytes | str]:
    """Read the encoded pictures, container by container."""
    places: Sequence[int] = range(len(job.rows))
    for number, group in groupby(places, key=lambda place: job.rows[place]["container"]):
        reader = open_reader(job.containers[number])
        try:
            for place in group:
                row = job.rows[place]
                try:
                    yield reader.read(job.names[place], int(row["place"]), int(row["size"]))
                except Unreadable as error:
                    yield str(error)
        finally:
            reader.close()


def _encoded(pixels: Pixels, options: Build) -> bytes:
    if options.encoding == "raw":
        return as_npy(pixels)
    return encode(pixels, options.quality, options.chroma)
