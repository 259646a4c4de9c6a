"""Perceptual hashes of a set's images -> groups of duplicates: `duplicates.jsonl`.

The hash is pHash at 256 bits: of the grey image as 32x32 blocks, the 16x16 lowest frequencies of
its cosine transform, each above the median or not. It is computed in whole numbers that float64
holds exactly, so that the bits are the same on every machine.

Two images are near if their hashes differ in at most `NEAR` bits; groups are the connected
components (chains too: `distance` says how far a group reaches). Images that were packed to the
same bytes are an `exact` group. A flat image (one color, or little but a straight edge) has almost
no frequencies whose signs a hash could tell: such hashes are all alike though the images are not.
They have few ones or few zeros, and are duplicates only if their bytes are the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.dataset.images import SIZE, Pixels
from pipeline.packing.hamming import BITS, Hashes, Rows, count_different_bits, find_clusters

NAME = "duplicates.jsonl"
LEAST_ONES = 48
"""A hash with fewer ones or fewer zeros has no detail to compare. Photographs have 128 of each;
flat images, edges and bars up to 13 ones; discs, crosses and chequers about 30."""
LISTED = 100
"""Most members of a group that are listed; `count` is the number of all."""
BATCH = 1 << 20
"""Hashes whose bits are counted at a time."""
NEAR = 20
"""Hashes that differ in at most this many bits are of the same image."""

_BLOCKS, _LOW = 32, 16
_SIDE = SIZE // _BLOCKS
_GREY = np.tile(np.array([77, 150, 29], np.float32), _SIDE)  # of 256, the luma of JPEG
_COSINES = np.round(
    1024 * np.cos(np.pi / _BLOCKS * np.outer(np.arange(_LOW), np.arange(_BLOCKS) + 0.5))
)


def perceptual_hash(pixels: Pixels) -> bytes:
    """Return the hash of uint8 [256, 256, 3]: 32 bytes; about 128 bits of unlike images differ."""
    rows = np.add.reduce(pixels.reshape(_BLOCKS, _SIDE, SIZE * 3), axis=1, dtype=np.uint16)
    # Exact in any order: at most 8 * 8 * 255 * 256 < 2**24 here in float32, and below at most
    # that times (32 * 1024)**2 < 2**53.
    blocks = rows.reshape(_BLOCKS**2, 3 * _SIDE).astype(np.float32) @ _GREY
    low = (_COSINES @ blocks.reshape(_BLOCKS, _BLOCKS).astype(np.float64) @ _COSINES.T).ravel()
    median = np.partition(low, BITS // 2 - 1)[BITS // 2 - 1]
    return np.packbits(low > median).tobytes()


@dataclass(frozen=True)
class DuplicateGroup:
    """Images with the same bytes (`exact`) or near hashes."""

    kind: Literal["exact", "near"]
    distance: int
    """The largest Hamming distance to the first member."""
    rows: Rows
    """Two or more, ascending."""


class DuplicateMember(NamedTuple):
    """An image of a group, as `duplicates.jsonl` lists it."""

    split: str
    sample: int
    """Sample id in the split."""
    label: int
    name: str
    """Name of the source image, as `SPLIT.names.txt` has it."""


class DuplicateCounts(NamedTuple):
    """Totals of `duplicates.jsonl`."""

    groups: int
    images: int
    """Number of images in all groups."""
    leaks: int
    """Number of groups with members in more than one split."""
    labels_differ: int
    """Number of groups with members of more than one class."""


def find_duplicates(
    hashes: Hashes,
    sizes: npt.NDArray[np.unsignedinteger],
    crcs: npt.NDArray[np.unsignedinteger],
    *,
    threshold: int = NEAR,
    workers: int | None = None,
) -> list[DuplicateGroup]:
    """Find all groups of images that are the same or nearly so, in the order of their first rows.

    Args:
        hashes: uint8 [n, 32], perhaps a memmap.
        sizes: uint32 [n], bytes of each packed image.
        crcs: uint32 [n], CRC-32 of those bytes.
        threshold: bits in which near hashes may differ, 0..254.
        workers: threads; by default one a core.
    """
    words = np.ascontiguousarray(hashes).view("<u8")
    ones = np.bitwise_count(words).sum(1, dtype=np.uint16)
    telling = (ones >= LEAST_ONES) & (ones <= BITS - LEAST_ONES)
    rows = np.flatnonzero(telling)
    found = find_clusters(hashes, threshold, rows, workers)
    found += _find_identical(words, sizes, crcs, np.flatnonzero(~telling))
    found.sort(key=lambda rows: int(rows[0]))
    return [_make_group(rows, words, sizes, crcs) for rows in found]


def write_duplicates(
    file: IO[bytes],
    groups: Iterable[DuplicateGroup],
    splits: npt.NDArray[np.integer],
    labels: npt.NDArray[np.integer],
    member: Callable[[int], DuplicateMember],
) -> DuplicateCounts:
    """Write a JSON line for each group.

    Args:
        file: `duplicates.jsonl`, open for writing.
        groups: result of `find_duplicates`.
        splits: [n] number of the split of each row.
        labels: [n] label of each row.
        member: returns the listed facts of a row; called for listed rows only.

    Returns:
        totals of the groups that were written.
    """
    counts = np.zeros(len(DuplicateCounts._fields), np.int64)
    for group in groups:
        leak = bool(np.ptp(splits[group.rows]))
        labels_differ = bool(np.ptp(labels[group.rows]))
        listed = _choose_listed(group.rows, splits[group.rows])
        row = {
            "kind": group.kind,
            "distance": group.distance,
            "count": len(group.rows),
            "leak": leak,
            "labels_differ": labels_differ,
            "members": [member(one)._asdict() for one in listed.tolist()],
        }
        file.write(json.dumps(row).encode() + b"\n")
        counts += (1, len(group.rows), leak, labels_differ)
    return DuplicateCounts(*counts.tolist())


def _find_identical(
    words: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.unsignedinteger],
    crcs: npt.NDArray[np.unsignedinteger],
    rows: Rows,
) -> list[Rows]:
    """Return the rows with the same hash, size and CRC-32, of those given (ascending)."""
    if len(rows) < 2:
        return []
    columns = (*words[rows].T, sizes[rows], crcs[rows])
    order = np.lexsort(columns)  # stable: equal rows stay ascending
    new = np.zeros(len(rows) - 1, np.bool_)
    for column in columns:
        new |= column[order[1:]] != column[order[:-1]]
    return [rows[some] for some in np.split(order, np.flatnonzero(new) + 1) if len(some) > 1]


def _make_group(
    rows: Rows,
    words: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.unsignedinteger],
    crcs: npt.NDArray[np.unsignedinteger],
) -> DuplicateGroup:
    blocks = (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))
    distance = max(int(count_different_bits(words, int(rows[0]), block).max()) for block in blocks)
    same = not distance and not np.ptp(sizes[rows]) and not np.ptp(crcs[rows])
    return DuplicateGroup("exact" if same else "near", distance, rows)


def _choose_listed(rows: Rows, splits: npt.NDArray[np.integer]) -> Rows:
    """Return the first rows of a group, as many of one split as of another if it is large."""
    if len(rows) <= LISTED:
        return rows
    rank = np.zeros(len(rows), np.int64)
    for split in np.unique(splits):
        here = splits == split
        rank[here] = np.arange(np.count_nonzero(here))
    return np.sort(rows[np.argsort(rank, kind="stable")[:LISTED]])
