"""Hashes of a set's pictures -> the pictures that are the same or nearly so: `duplicates.jsonl`.

Two pictures are near if their hashes differ in at most `NEAR` bits, and what is near is one
group (chains too: `distance` says how far a group reaches). Pictures that were packed to the same
bytes are an `exact` group. A flat picture (one colour, or little but a straight edge) has almost no
frequencies whose signs a hash could tell: such hashes are all alike though the pictures are not.
They are known by their few (or many) ones, and are duplicates only if their bytes are the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.packing.forest import Rows
from pipeline.packing.hamming import Hashes, clusters, distances
from pipeline.packing.perceptual import NEAR

NAME = "duplicates.jsonl"

TELLING = 48
"""A hash with fewer ones or fewer zeros than this tells little. Photographs have 128 of each; flat
pictures, edges and bars up to 13 ones; discs, crosses and chequers about 30."""
LISTED = 100
"""Members of a group that are listed; `count` says how many there are."""

BLOCK = 1 << 20


@dataclass(frozen=True)
class Group:
    """Pictures that are the same (`exact`) or nearly so."""

    kind: Literal["exact", "near"]
    distance: int
    """The largest Hamming distance to the first member."""
    rows: Rows
    """Two or more, ascending."""


class Member(NamedTuple):
    """A picture of a group, as it is listed."""

    split: str
    sample: int
    """Its id in the split."""
    label: int
    name: str
    """Where it came from."""


class Counts(NamedTuple):
    """What was found."""

    groups: int
    pictures: int
    """In all groups."""
    leaks: int
    """Groups with members in more than one split."""
    labels_differ: int
    """Groups with members of more than one class."""


def find(
    hashes: Hashes,
    sizes: npt.NDArray[np.unsignedinteger],
    crcs: npt.NDArray[np.unsignedinteger],
    *,
    threshold: int = NEAR,
    workers: int | None = None,
) -> list[Group]:
    """Find all groups of pictures that are the same or nearly so, in the order of their first rows.

    Args:
        hashes: uint8 [n, 32], perhaps a memmap.
        sizes: uint32 [n], bytes of each packed picture.
        crcs: uint32 [n], CRC-32 of those bytes.
        threshold: bits in which near hashes may differ, 0..254.
        workers: threads; by default one a core.
    """
    words = np.ascontiguousarray(hashes).view("<u8")
    telling = _telling(words)
    rows = np.flatnonzero(telling)
    found = clusters(hashes, threshold, rows, workers)
    found += _same(words, sizes, crcs, np.flatnonzero(~telling))
    found.sort(key=lambda rows: int(rows[0]))
    return [_group(rows, words, sizes, crcs) for rows in found]


def write(
    file: IO[bytes],
    groups: Iterable[Group],
    splits: npt.NDArray[np.integer],
    labels: npt.NDArray[np.integer],
    member: Callable[[int], Member],
) -> Counts:
    """Write a JSON line for each group.

    Args:
        file: `duplicates.jsonl`, open for writing.
        groups: what `find` returned.
        splits: [n] number of the split of each row.
        labels: [n] label of each row.
        member: tells what to list of a row; called for those that are listed.

    Returns:
        how many groups, pictures and leaks were written.
    """
    counts = np.zeros(len(Counts._fields), np.int64)
    for group in groups:
        leak = bool(np.ptp(splits[group.rows]))
        labels_differ = bool(np.ptp(labels[group.rows]))
        listed = _listed(group.rows, splits[group.rows])
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
    return Counts(*counts.tolist())


def _telling(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Return for each hash whether it tells something of its picture."""
    telling = np.empty(len(words), np.bool_)
    for start in range(0, len(words), BLOCK):
        ones = np.bitwise_count(words[start : start + BLOCK]).sum(1, dtype=np.uint16)
        telling[start : start + BLOCK] = (ones >= TELLING) & (ones <= 256 - TELLING)
    return telling


def _same(
    words: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.unsignedinteger],
    crcs: npt.NDArray[np.unsignedinteger],
    rows: Rows,
) -> list[Rows]:
    """Return the rows with the same hash, size and CRC-32, of those given (ascending)."""
    if len(rows) < 2:
        return []
    columns = [*words[rows].T, sizes[rows], crcs[rows]]
    order = np.lexsort(columns)  # stable: equal rows stay ascending
    new = np.zeros(len(rows) - 1, np.bool_)
    for column in columns:
        new |= column[order[1:]] != column[order[:-1]]
    return [rows[some] for some in np.split(order, np.flatnonzero(new) + 1) if len(some) > 1]


def _group(
    rows: Rows,
    words: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.unsignedinteger],
    crcs: npt.NDArray[np.unsignedinteger],
) -> Group:
    blocks = (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
    distance = max(int(distances(words, int(rows[0]), block).max()) for block in blocks)
    same = not distance and not np.ptp(sizes[rows]) and not np.ptp(crcs[rows])
    return Group("exact" if same else "near", distance, rows)


def _listed(rows: Rows, splits: npt.NDArray[np.integer]) -> Rows:
    """Return the first rows of a group, as many of one split as of another if it is large."""
    if len(rows) <= LISTED:
        return rows
    rank = np.zeros(len(rows), np.int64)
    for split in np.unique(splits):
        here = splits == split
        rank[here] = np.arange(np.count_nonzero(here))
    return np.sort(rows[np.argsort(rank, kind="stable")[:LISTED]])
