"""What stage one found, read back: where each picture lies, and what was left out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.dataset.image_stats import Sums
from pipeline.packing.ahead import ahead
from pipeline.packing.chunks import HASH_BYTES, Chunk, ChunkError, fetch_chunk, parse_chunk
from pipeline.packing.plan import Part, Places, Plan
from pipeline.packing.shards import TAKEN_DTYPE
from pipeline.remote.target import Target
from pipeline.sources import Reject


@dataclass(frozen=True)
class Collected:
    """All chunks of a build. Rows count as in `Plan`."""

    taken: npt.NDArray[np.void]
    """`TAKEN_DTYPE` of each row; of rejected ones all zeros."""
    packed: npt.NDArray[np.bool_]
    """Whether each row could be packed."""
    hashes: npt.NDArray[np.uint8]
    """[n, 32] perceptual hashes of the packed rows, in the order of the rows."""
    sums: Sums
    rejects_file: Path
    rejected: int

    def order(self, plan: Plan, split: str) -> Places:
        """Return the rows of a split that are stored, in stored order."""
        rows = plan.orders[split]
        return rows[self.packed[rows]]


def collect(plan: Plan, target: Target, scratch: Path) -> Collected:
    """Read all chunks back, in their order.

    Raises:
        ChunkError: some are missing or damaged.
    """
    count = plan.pictures
    taken = _allocated(scratch / "taken.bin", count)
    packed = np.zeros(count, np.bool_)
    sums, rejected = Sums(), 0
    with (
        (scratch / "hashes.bin").open("wb") as hashes,
        (scratch / "rejects.jsonl").open("w", encoding="utf-8") as rejects,
    ):
        for reject in plan.rejects():
            rejects.write(_line(reject))
            rejected += 1
        for part, first, chunk in _chunks(plan, target):
            rows = slice(first, first + part.stop - part.start)
            packed[rows] = chunk.packed["packed"]
            for name in ("offset", "size", "crc"):
                taken[name][rows] = chunk.packed[name]
            taken["chunk"][rows] = part.number
            listing = plan.listings[part.listing]
            taken["label"][rows] = listing.rows["label"][part.start : part.stop]
            hashes.write(chunk.packed["hash"][chunk.packed["packed"]].tobytes())
            sums += chunk.sums
            for place, reason in sorted(chunk.reasons.items()):
                rejects.write(_line(Reject(plan.name(first + place), reason)))
                rejected += 1
    return Collected(
        taken=taken,
        packed=packed,
        hashes=_hashes(scratch / "hashes.bin"),
        sums=sums,
        rejects_file=scratch / "rejects.jsonl",
        rejected=rejected,
    )


def _chunks(plan: Plan, target: Target) -> Iterator[tuple[Part, int, Chunk]]:
    firsts = plan.first_rows
    damaged: list[int] = []

    files = ahead(lambda part: fetch_chunk(target, part.number), plan.parts())
    for part, fetched in zip(plan.parts(), files, strict=True):
        try:
            chunk = parse_chunk(fetched, part.number, part.stop - part.start)
        except ChunkError:
            damaged.append(part.number)
        else:
            yield part, firsts[part.listing] + part.start, chunk
    if damaged:
        raise ChunkError(*damaged)


def _allocated(path: Path, count: int) -> npt.NDArray[np.void]:
    """Map a new file whose room on the disk is sure: without it, a write would be a bus error."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, count * TAKEN_DTYPE.itemsize)
    return np.memmap(path, TAKEN_DTYPE, "r+", shape=(count,))


def _hashes(path: Path) -> npt.NDArray[np.uint8]:
    if path.stat().st_size == 0:
        return np.zeros((0, HASH_BYTES), np.uint8)
    return np.memmap(path, np.uint8, "r").reshape(-1, HASH_BYTES)


def _line(reject: Reject) -> str:
    return json.dumps(reject._asdict()) + "\n"
