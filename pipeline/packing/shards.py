"""Stage two: encoded pictures out of many chunks, in shuffled order -> one shard."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from pipeline.dataset.images import Encoding
from pipeline.dataset.index import Index
from pipeline.dataset.manifest import Shard
from pipeline.dataset.shards import as_shard, shard_name, write_tar
from pipeline.packing.chunks import ChunkError, data_name
from pipeline.remote.target import WORK, Piece, Target
from pipeline.stores.errors import StoreError

FOLDER = f"{WORK}/shards"

TAKEN_DTYPE = np.dtype(
    [("chunk", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("label", "<i4")]
)
"""A picture to be stored: where it lies among the chunks, and its label."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to write; all that a worker needs, wherever it runs."""

    target: Target
    split: str
    number: int
    encoding: Encoding
    taken: npt.NDArray[np.void]
    """`TAKEN_DTYPE`, in stored order."""


@dataclass(frozen=True)
class ShardDone:
    """A shard that is there."""

    split: str
    number: int
    shard: Shard
    rows: Index


def done_name(split: str, number: int) -> str:
    """Name of what is known of a shard; with it the shard is done."""
    return f"{FOLDER}/{split}-{number:06d}.npz"


def write_shard_of(job: ShardJob) -> int:
    """Write a shard, its `.idx` and what is known of it; runs in a worker process.

    Returns:
        How many samples it has.

    Raises:
        ChunkError: a chunk is not what was written.
        OSError: the target cannot be read or written.
    """
    name = shard_name(job.split, job.number)
    with job.target.create(name) as file:
        written = write_tar(file, job.number, _samples(job), job.encoding)
    with job.target.create(name.removesuffix(".tar") + ".idx") as file:
        file.write(written.listing)
    with job.target.create(done_name(job.split, job.number)) as file:
        shard = as_shard(name, written)
        np.savez(
            file,
            rows=written.rows,
            shard=np.array(json.dumps(asdict(shard))),
            content=np.array(content(job.taken)),
        )
    return len(written.rows)


def content(taken: npt.NDArray[np.void]) -> str:
    """Return a hash of what a shard is to hold: it is another if a picture became a reject."""
    columns = np.stack([taken[name].astype(np.int64) for name in ("crc", "size", "label")])
    return hashlib.sha256(columns.tobytes()).hexdigest()


class Fetched(NamedTuple):
    """What the target holds of a shard; None where it holds nothing."""

    facts: bytes | None
    size: int | None
    idx_size: int | None


def fetch_done(target: Target, split: str, number: int) -> Fetched:
    """Read what is known of a shard; threads may do this side by side.

    Raises:
        StoreError: the store does not answer.
    """
    name = shard_name(split, number)
    try:
        facts = target.read(done_name(split, number))
    except StoreError:
        raise
    except OSError:
        return Fetched(None, None, None)
    return Fetched(facts, target.size(name), target.size(name.removesuffix(".tar") + ".idx"))


def parse_done(
    fetched: Fetched, split: str, number: int, taken: npt.NDArray[np.void] | None = None
) -> ShardDone | None:
    """Return what is known of a shard, or None if it has to be written (again).

    Args:
        fetched: what `fetch_done` gave; only one thread may parse, as in `chunks.parse_chunk`.
        split: of it.
        number: of it.
        taken: what it is to hold; None if that was looked at before.
    """
    try:
        with np.load(io.BytesIO(fetched.facts or b"")) as arrays:
            facts = json.loads(arrays["shard"].item())
            done = ShardDone(split, number, Shard(**facts), arrays["rows"])
            held = arrays["content"].item()
    except Exception:  # of a damaged header, NumPy's reader raises what it pleases
        return None
    if taken is not None and held != content(taken):
        return None
    whole = fetched.size == done.shard.bytes and fetched.idx_size is not None
    return done if whole else None


def _samples(job: ShardJob) -> Iterator[tuple[bytes, int]]:
    names = {chunk: data_name(chunk) for chunk in set(job.taken["chunk"].tolist())}
    pieces = [Piece(names[chunk], offset, size) for chunk, offset, size, _, _ in job.taken.tolist()]
    found = job.target.pieces(pieces)
    for row in job.taken:
        try:
            data = next(found)
        except FileNotFoundError as error:
            raise ChunkError(int(row["chunk"])) from error
        if len(data) != row["size"] or isal_zlib.crc32(data) != row["crc"]:
            raise ChunkError(int(row["chunk"]))
        yield data, int(row["label"])
