"""Stage one: a run of source pictures -> 256x256, encoded, checked, hashed and counted.

A chunk is two files in the build's work folder: `NNNNNN.bin`, the encoded pictures end to end, and
`NNNNNN.npz`, what is known of them. The second is written last: with it the chunk is done.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.dataset.image_stats import Sums
from pipeline.packing.options import Build
from pipeline.packing.plan import Part, Plan
from pipeline.remote.target import WORK, Target
from pipeline.sources import Container
from pipeline.stores.errors import StoreError

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
"""A picture of a chunk: whether it could be packed, and then its byte range in the `.bin`, the
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
    """A process died on this chunk: open each picture in a process of its own."""


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
    """Why the pictures at these places were left out."""
    sums: Sums


class ChunkError(Exception):
    """The files of some chunks are not what was written; they must be packed again."""

    def __init__(self, *numbers: int) -> None:
        super().__init__(*numbers)
        self.numbers = numbers


def data_name(number: int) -> str:
    """Name of the pictures of a chunk."""
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


def pack_chunk(job: ChunkJob) -> ChunkDone:
    """Read, cut, encode and measure the pictures of a chunk; runs in a worker process.

    Raises:
        OSError: a container went away, or the target cannot be written.
        DuetError: with `careful`, a picture's process was killed from outside.
    """
    from pipeline.packing.worker import pack  # it brings torch, which the driver does without

    return pack(job)


class Fetched(NamedTuple):
    """The files of a chunk, as the target gives them; None where it does not."""

    facts: bytes | None
    size: int | None
    """Of the pictures, in bytes."""


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
    """Return a chunk of so many pictures. Only one thread may do this: NumPy parses its headers as
    Python, and of that CPython 3.11 keeps count in one place for all threads.

    Raises:
        ChunkError: it is missing or damaged, or its pictures are.
    """
    try:
        with np.load(io.BytesIO(fetched.facts or b"")) as arrays:
            sums = Sums()
            sums.pictures = int(arrays["pictures"])
            sums.picture, sums.outer = arrays["picture"], arrays["outer"]
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
