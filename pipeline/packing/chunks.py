"""Stage one: a run of source images -> 256x256, encoded, checked, hashed and counted.

A chunk is two files in the build's work folder: `NNNNNN.bin`, the encoded images end to end, and
`NNNNNN.npz`, what is known of them. The second is written last: with it the chunk is done.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from pipeline.dataset.image_stats import Sums
from pipeline.dataset.images import Pixels, encode_npy
from pipeline.packing.duplicates import perceptual_hash
from pipeline.packing.jpeg_header import one_line
from pipeline.packing.plan import Build, Part, Plan
from pipeline.packing.resize import ImageError, encode, one_thread, square
from pipeline.remote.filesystem import StoreError
from pipeline.remote.target import WORK, Target
from pipeline.sources import Container, Unreadable, open_reader
from pipeline.tools.errors import DuetError
from pipeline.tools.processes import Crash, call_isolated

FOLDER = f"{WORK}/chunks"

HASH_BYTES = 32

PACKED_DTYPE = np.dtype(
    [
        ("packed", "?"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("crc", "<u4"),
        ("hash", "u1", HASH_BYTES),
    ]
)
"""An image of a chunk: whether it could be packed, and then its byte range in the `.bin`, the
CRC-32 of those bytes, and its perceptual hash."""

Packed = npt.NDArray[np.void]


@dataclass(frozen=True)
class ChunkJob:
    """One chunk to pack; all that a worker needs, wherever it runs."""

    target: Target
    number: int
    options: Build
    containers: tuple[Container, ...]
    rows: npt.NDArray[np.void]
    """`sources.listing.ROW_DTYPE`; their containers count in `containers`."""
    names: tuple[str, ...]
    trains: npt.NDArray[np.bool_]
    """Whose pixels count in the statistics."""
    careful: bool = False
    """A process died on this chunk: open each image in a process of its own."""


@dataclass(frozen=True)
class ChunkDone:
    """What the driver is told of a chunk."""

    number: int
    pictures: int
    rejected: int


@dataclass(frozen=True)
class Chunk:
    """A chunk read back."""

    packed: Packed
    reasons: dict[int, str]
    """Why the images at these places were left out."""
    sums: Sums


class ChunkError(Exception):
    """The files of some chunks are not what was written; they must be packed again."""

    def __init__(self, *numbers: int) -> None:
        super().__init__(*numbers)
        self.numbers = numbers


def data_name(number: int) -> str:
    """Name of the images of a chunk."""
    return f"{FOLDER}/{number:06d}.bin"


def facts_name(number: int) -> str:
    """Name of what is known of a chunk."""
    return f"{FOLDER}/{number:06d}.npz"


def chunk_job(plan: Plan, part: Part, options: Build, target: Target) -> ChunkJob:
    """Take the rows of a chunk out of the plan."""
    listing = plan.listings[part.listing]
    rows = np.array(listing.rows[part.start : part.stop])
    used, rows["container"] = np.unique(rows["container"], return_inverse=True)
    return ChunkJob(
        target=target,
        number=part.number,
        options=options,
        containers=tuple(listing.containers[place] for place in used),
        rows=rows,
        names=tuple(listing.names[place] for place in range(part.start, part.stop)),
        trains=plan.trains(part),
    )


class Fetched(NamedTuple):
    """The files of a chunk, as the target gives them; None where it does not."""

    facts: bytes | None
    size: int | None
    """Of the images, in bytes."""


def fetch_chunk(target: Target, number: int) -> Fetched:
    """Read what is known of a chunk; threads may do this side by side.

    Raises:
        StoreError: the store does not answer.
    """
    try:
        return Fetched(target.read(facts_name(number)), target.size(data_name(number)))
    except StoreError:
        raise
    except OSError:
        return Fetched(None, None)


def parse_chunk(fetched: Fetched, number: int, pictures: int) -> Chunk:
    """Return a chunk of so many images. Only one thread may do this: NumPy parses its headers as
    Python, and of that CPython 3.11 keeps count in one place for all threads.

    Raises:
        ChunkError: it is missing or damaged, or its images are.
    """
    try:
        with np.load(io.BytesIO(fetched.facts or b"")) as arrays:
            sums = Sums()
            sums.images = int(arrays["pictures"])
            sums.image_sum, sums.outer = arrays["picture"], arrays["outer"]
            chunk = Chunk(
                packed=arrays["packed"],
                reasons=dict(json.loads(arrays["reasons"].tobytes())),
                sums=sums,
            )
        whole = chunk.packed.dtype == PACKED_DTYPE and len(chunk.packed) == pictures
        if whole and fetched.size == int(chunk.packed["size"].sum(dtype=np.int64)):
            return chunk
    except Exception as error:  # of a damaged header, NumPy's reader raises what it pleases
        raise ChunkError(number) from error
    raise ChunkError(number)


def pack_chunk(job: ChunkJob) -> ChunkDone:
    """Read, cut, encode and measure the images of a chunk; runs in a worker process.

    Raises:
        OSError: a container went away, or the target cannot be written.
        DuetError: with `careful`, an image's process was killed from outside.
    """
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
            pictures=np.uint32(sums.images),
            picture=sums.image_sum.astype(np.uint32),  # a chunk has far fewer than 2**24 images
            outer=sums.outer,
        )
    return ChunkDone(job.number, len(packed), len(reasons))


def _pixels(job: ChunkJob) -> Iterator[Pixels | str]:
    """Give each image of a chunk, or the reason why there is none."""
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
    except ImageError as error:
        return str(error)
    except Exception as error:  # whatever it is, it is this image's
        return f"cannot be decoded: {one_line(error) or type(error).__name__}"


def _square_apart(data: bytes, job: ChunkJob) -> Pixels | str:
    """Open an image in a process of its own, which it may take down with it."""
    try:
        return call_isolated(_square, data, job.options.min_side)
    except Crash as crash:
        if crash.from_outside:
            raise DuetError(
                f"the process that packs chunk {job.number} was killed twice (out of memory?); "
                "run the same command again, with fewer --workers"
            ) from crash
        return f"its decoder crashed ({crash})"


def _bytes(job: ChunkJob) -> Iterator[bytes | str]:
    """Read the encoded images, container by container."""
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
        return encode_npy(pixels)
    return encode(pixels, options.quality, options.chroma)
