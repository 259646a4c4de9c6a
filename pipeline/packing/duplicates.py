"""Perceptual hashes of a set's images -> groups of duplicates: `duplicates.jsonl`.

The hash is pHash at 256 bits: of the grey image as 32x32 blocks, the 16x16 lowest frequencies of
its cosine transform, each above the median or not. It is computed in whole numbers that float64
holds exactly, so that the bits are the same on every machine.

Two images are near if their hashes differ in at most `NEAR` bits; groups are the connected
components (chains too: `distance` says how far a group reaches). Images that were packed to the
same bytes are an `exact` group. A flat image (one color, or little but a straight edge) has almost
no frequencies whose signs a hash could tell: such hashes are all alike though the images are not.
They have few ones or few zeros, and are duplicates only if their bytes are the same.

The search compares few pairs and misses none. With t the threshold, the 256 bits are cut into
groups, and group i into r_i + k blocks, where the sum of (r_i + 1) is t + 1. If each group held
r_i + 1 or more of the bits in which a pair differs, there would be t + 1 or more of them; so within
distance t some group holds at most r_i, and at least k of its r_i + k blocks are equal. Sorting by
each choice of k blocks of each group therefore brings every such pair side by side, next to few
others. Identical hashes are one row in the search, and rows that are joined already are not
compared again: a hundred thousand copies of one image are no five billion pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise, product
from math import comb
from threading import Lock
from typing import IO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.dataset.images import SIZE, Pixels
from pipeline.tools.units import cpu_count

BITS = 256
"""Of a fingerprint."""
NEAR = 20
"""Fingerprints that differ in at most this many bits are of the same image."""

_BLOCKS, _LOW = 32, 16
_SIDE = SIZE // _BLOCKS
_GREY = np.tile(np.array([77, 150, 29], np.float32), _SIDE)  # of 256, the luma of JPEG
_COSINES = np.round(
    1024 * np.cos(np.pi / _BLOCKS * np.outer(np.arange(_LOW), np.arange(_BLOCKS) + 0.5))
)


def perceptual_hash(pixels: Pixels) -> bytes:
    """Return the fingerprint of uint8 [256, 256, 3]: 32 bytes, to be compared bit by bit."""
    rows = np.add.reduce(pixels.reshape(_BLOCKS, _SIDE, SIZE * 3), axis=1, dtype=np.uint16)
    # Exact in any order: at most 8 * 8 * 255 * 256 < 2**24 here in float32, and below at most
    # that times (32 * 1024)**2 < 2**53.
    blocks = rows.reshape(_BLOCKS**2, 3 * _SIDE).astype(np.float32) @ _GREY
    low = (_COSINES @ blocks.reshape(_BLOCKS, _BLOCKS).astype(np.float64) @ _COSINES.T).ravel()
    median = np.partition(low, BITS // 2 - 1)[BITS // 2 - 1]
    return np.packbits(low > median).tobytes()


def distance(one: bytes, other: bytes) -> int:
    """Return in how many bits two fingerprints differ: 0..256, about 128 for unlike images."""
    return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()


KEY_BITS = 32
EQUAL = (2, 3, 4)
"""Blocks that a sort looks at."""
SORT, CHECK = 50, 80
"""Nanoseconds to sort a row by a key, and to compare a pair (measured): only their ratio counts."""


class BitBlock(NamedTuple):
    """Some neighbouring bits of a hash; 16 at most."""

    start: int
    width: int


class BlockCut(NamedTuple):
    """Groups of blocks; near pairs have `equal` blocks of a group in common."""

    equal: int
    groups: list[list[BitBlock]]
    tables: int
    """Choices of so many blocks of a group."""
    width: int
    """Least bits of a choice."""

    def cost(self, rows: int) -> float:
        """Return about how long a search takes, in nanoseconds."""
        return self.tables * (rows * SORT + rows * rows / 2 / 2.0**self.width * CHECK)


def choose_cut(threshold: int, rows: int, bits: int = BITS) -> BlockCut:
    """Return the groups of blocks (module docstring) that are cheapest for so many rows."""
    return min(make_cuts(threshold, bits), key=lambda cut: cut.cost(rows))


@lru_cache
def make_cuts(threshold: int, bits: int) -> list[BlockCut]:
    """Return a cut for every possible number of groups and of equal blocks, as even as can be."""
    cuts = []
    for equal, groups in product(EQUAL, range(1, threshold + 2)):
        each, more = divmod(threshold + 1, groups)
        sizes = [each + (place < more) - 1 + equal for place in range(groups)]
        if (count := sum(sizes)) > bits:
            continue
        borders = [bits * place // count for place in range(count + 1)]
        most = KEY_BITS // equal
        blocks = iter(BitBlock(a, min(most, b - a)) for a, b in pairwise(borders))
        members = [[next(blocks) for _ in range(size)] for size in sizes]
        tables = sum(comb(size, equal) for size in sizes)
        cuts.append(BlockCut(equal, members, tables, equal * min(most, bits // count)))
    return cuts


Rows = npt.NDArray[np.intp]
"""Row numbers."""
Roots = npt.NDArray[np.uint32]


class UnionFind:
    """Union-find over rows, many at a time; the root of a tree is its lowest row."""

    def __init__(self, rows: int) -> None:
        self.parent = np.arange(rows, dtype=np.uint32)
        self._lock = Lock()

    def link(self, left: npt.ArrayLike, right: npt.ArrayLike) -> None:
        """Join rows pairwise."""
        a, b = np.broadcast_arrays(np.asarray(left), np.asarray(right))
        with self._lock:
            while len(a):
                a, b = self._roots(a), self._roots(b)
                apart = a != b
                a, b = a[apart], b[apart]
                np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))

    def roots(self, rows: Rows) -> Roots:
        """Return the root of each row: equal for rows that are joined."""
        with self._lock:
            return self._roots(rows)

    def _roots(self, rows: npt.NDArray[np.integer]) -> Roots:
        up: Roots = self.parent[rows]
        while True:
            higher: Roots = self.parent[up]
            if np.array_equal(up, higher):
                return up
            self.parent[rows] = higher  # halves the way for the next who comes by
            up = higher

    def find_groups(self) -> list[Rows]:
        """Return the trees of two or more rows."""
        roots = self._roots(np.arange(len(self.parent)))
        members = np.flatnonzero(np.bincount(roots, minlength=len(roots))[roots] > 1)
        if not len(members):
            return []
        members = members[np.argsort(roots[members], kind="stable")]
        return np.split(members, np.flatnonzero(np.diff(roots[members])) + 1)


WORDS = 4

Hashes = npt.NDArray[np.uint8]
"""[n, 32]"""
Words = npt.NDArray[np.uint64]
"""[n, 4]: hashes as little-endian words."""
Keys = npt.NDArray[np.uint64]
"""[n], sorted: some blocks, then 32 bits for the row."""
Distances = npt.NDArray[np.uint16]

LONG_RUN = 256
"""Rows with equal keys that are compared pair by pair; more are taken around leaders."""
PAIRS = 1 << 20
"""Pairs compared at a time."""
SAMPLE = 4096
"""Rows that tell which bits differ, and rows whose bits are taken apart at a time."""
LEAST_SELECTED = 1024
"""Rows of a run from which a search by the bits in which they differ can be worth it."""
LEAST_SHARE = 1 / 8
"""A bit tells much about rows if no less than this share of them have it, and lack it."""

_ROW = np.uint64(2**32 - 1)


class BlockColumn(NamedTuple):
    """A block of every row."""

    block: BitBlock
    values: npt.NDArray[np.uint16]


def find_clusters(
    hashes: Hashes, threshold: int, rows: Rows | None = None, workers: int | None = None
) -> list[Rows]:
    """Join every pair of hashes that differ in at most `threshold` bits.

    Memory is some ten words of 8 bytes a row, whatever the hashes are; they may be a memmap.

    Args:
        hashes: uint8 [n, 32].
        threshold: 0..254.
        rows: which of them to look at (ascending); all unless given.
        workers: threads; by default one a core.

    Returns:
        the clusters of two or more rows, each ascending, in the order of their first rows.
    """
    words = np.ascontiguousarray(hashes).view("<u8")
    rows = np.arange(len(words)) if rows is None else rows
    if len(rows) < 2:
        return []
    forest = UnionFind(len(words))
    distinct = _join_identical(words, rows, forest)
    if threshold and len(distinct) > 1:
        with ThreadPoolExecutor(workers or cpu_count()) as pool:
            NearPairSearch(words, distinct, threshold, forest).run(pool.map)
    return forest.find_groups()


def count_different_bits(words: Words, left: Rows | int, right: Rows) -> Distances:
    """Return the Hamming distances of rows of uint64 [n, 4], pair by pair or of one to many."""
    counts = np.bitwise_count(words[left] ^ words[right])
    total: Distances = counts.sum(-1, dtype=np.uint16)
    return total


def _join_identical(words: Words, rows: Rows, forest: UnionFind) -> Rows:
    """Join rows with equal hashes; return one row of each, ascending."""
    mixed = np.zeros(len(rows), np.uint64)
    for word in range(WORDS):
        mixed ^= words[rows, word]
        mixed *= np.uint64(0x9E3779B97F4A7C15)  # odd, so that nothing is lost
        mixed ^= mixed >> np.uint64(29)
    order = rows[np.argsort(mixed)]
    del mixed
    # Should two hashes mix to one number, some equal rows stay apart here; the tables join them.
    new = np.ones(len(order), bool)
    for start in range(1, len(order), PAIRS):
        some = order[start - 1 : start + PAIRS]
        new[start : start + PAIRS] = (words[some[1:]] != words[some[:-1]]).any(1)
    starts = np.flatnonzero(new)
    first = np.minimum.reduceat(order, starts)
    forest.parent[order] = np.repeat(first, np.diff(starts, append=len(order)))
    first.sort()
    return first


class NearPairSearch:
    """Finds and joins the near pairs among rows with distinct hashes."""

    def __init__(
        self,
        words: Words,
        rows: Rows,
        threshold: int,
        forest: UnionFind,
        sifted: tuple[Words, int] | None = None,
    ) -> None:
        """Take the hashes, uint64 [n, 4], and which rows of them to compare.

        `sifted`: some bits of just these rows, uint64 [rows, 4], and how many: cut blocks of them.
        """
        self._words, self._rows = words, rows
        self._threshold, self._forest = threshold, forest
        self._whole = sifted is None
        self._cut, self._bits = sifted or (words, BITS)
        self._places = rows if sifted is None else np.arange(len(rows))

    def run(self, spread: Callable[..., Iterable[object]]) -> None:
        """Do it; `spread` is `map`, or that of a pool of threads."""
        cut = choose_cut(self._threshold, len(self._rows), self._bits)
        for group in cut.groups:
            columns = list(spread(self.column, group))
            for _ in spread(self.table, *zip(*combinations(columns, cut.equal), strict=True)):
                pass

    def column(self, block: BitBlock) -> BlockColumn:
        """Return a block of every row."""
        word, shift = divmod(block.start, 64)
        bits = self._cut[self._places, word] >> np.uint64(shift)
        if shift + block.width > 64:
            bits |= self._cut[self._places, word + 1] << np.uint64(64 - shift)
        return BlockColumn(block, (bits & np.uint64((1 << block.width) - 1)).astype(np.uint16))

    def table(self, *columns: BlockColumn) -> None:
        """Join all near pairs that are equal in some blocks."""
        word = _choose_other_word([column.block for column in columns])
        blocks = np.zeros(len(self._rows), np.uint32)
        for column in columns:
            blocks <<= np.uint32(KEY_BITS // len(columns))
            blocks |= column.values
        keys = blocks.astype(np.uint64)
        del blocks
        keys <<= np.uint64(32)
        keys |= np.arange(len(keys), dtype=np.uint64)
        keys.sort()
        keys = self._without_long_runs(keys)
        apart = 1
        left = np.flatnonzero((keys[1:] ^ keys[:-1]) <= _ROW)
        while len(left):
            for some in (left[at : at + PAIRS] for at in range(0, len(left), PAIRS)):
                self._pairs(keys[some], keys[some + apart], word)
            apart += 1
            left = left[left + apart < len(keys)]
            left = left[(keys[left + apart] ^ keys[left]) <= _ROW]

    def _without_long_runs(self, keys: Keys) -> Keys:
        """Join near pairs in the runs of more than `LONG` equal keys; return the other keys."""
        runs = _find_long_runs(keys)
        keep = np.ones(len(keys) if runs else 0, bool)
        for start, end in runs:
            self._long_run(self._rows[(keys[start:end] & _ROW).astype(np.intp)])
            keep[start:end] = False
        return keys[keep] if runs else keys

    def _pairs(self, left: Keys, right: Keys, word: int) -> None:
        a, b = (self._rows[(keys & _ROW).astype(np.intp)] for keys in (left, right))
        # Nearly all pairs are told apart by a word that they need not have in common.
        few = np.bitwise_count(self._words[a, word] ^ self._words[b, word]) <= self._threshold
        a, b = a[few], b[few]
        near = count_different_bits(self._words, a, b) <= self._threshold
        self._forest.link(a[near], b[near])

    def _long_run(self, rows: Rows) -> None:
        """Join near pairs of many rows that are equal in some blocks."""
        if not np.ptp(self._forest.roots(rows)):  # joined already
            return
        large = self._whole and len(rows) >= LEAST_SELECTED
        if large and (sifted := _select_bits(self._words, rows, self._threshold)):
            NearPairSearch(self._words, rows, self._threshold, self._forest, sifted).run(map)
        else:
            self._around_leaders(rows)

    def _around_leaders(self, rows: Rows) -> None:
        """Join all near pairs of many rows, without looking at most pairs of a dense cluster.

        What is near a leader is joined to it, and needs comparing only with rows within twice
        the threshold of the leader (triangle inequality) that are not joined to it yet.
        """
        while len(rows) > 1 and np.ptp(self._forest.roots(rows)):
            distance = count_different_bits(self._words, int(rows[0]), rows)
            inside = distance <= self._threshold
            ball = rows[inside]
            self._forest.link(ball, rows[0])
            around = ~inside & (distance <= 2 * self._threshold)
            self._ball_to_shell(ball, distance[inside], rows[around], distance[around])
            rows = rows[~inside]

    def _ball_to_shell(self, ball: Rows, inner: Distances, shell: Rows, outer: Distances) -> None:
        """Join near pairs of rows at known distances from a leader; the ball is joined to it."""
        for one, own in zip(ball.tolist(), inner.tolist(), strict=True):
            open_ = self._forest.roots(shell) != self._forest.roots(ball[:1])
            shell, outer = shell[open_], outer[open_]
            if not len(shell):
                return
            some = shell[outer <= own + self._threshold]
            near = count_different_bits(self._words, one, some) <= self._threshold
            self._forest.link(some[near], one)


def _choose_other_word(blocks: Iterable[BitBlock]) -> int:
    """Return a word of the hash of which the blocks hold no bit, if there is one."""
    held = {bit // 64 for block in blocks for bit in (block.start, block.start + block.width - 1)}
    return max(set(range(WORDS)) - held, default=0)


def _select_bits(words: Words, rows: Rows, threshold: int) -> tuple[Words, int] | None:
    """Return the bits in which rows really differ, uint64 [rows, 4], and how many they are.

    Any choice of bits keeps near pairs near. None if a search by these would not be much faster
    than comparing all pairs.
    """
    sample = words[rows[:: max(1, len(rows) // SAMPLE)]]
    ones = np.unpackbits(sample.view(np.uint8), axis=1, bitorder="little").mean(0)
    useful = np.flatnonzero((ones > LEAST_SHARE) & (ones < 1 - LEAST_SHARE))
    cost = min((cut.cost(len(rows)) for cut in make_cuts(threshold, len(useful))), default=np.inf)
    if cost > len(rows) ** 2 * CHECK / 10:
        return None
    packed = np.zeros((len(rows), BITS // 8), np.uint8)
    for start in range(0, len(rows), SAMPLE):
        some = words[rows[start : start + SAMPLE]].view(np.uint8)
        bits = np.unpackbits(some, axis=1, bitorder="little")[:, useful]
        few = np.packbits(bits, axis=1, bitorder="little")
        packed[start : start + SAMPLE, : few.shape[1]] = few
    sifted: Words = packed.view("<u8")
    return sifted, len(useful)


def _find_long_runs(keys: Keys) -> Sequence[tuple[int, int]]:
    """Return (start, end) of the runs of more than `LONG` sorted keys with equal blocks."""
    if len(keys) <= LONG_RUN:
        return []
    # A run is long where a key equals the one `LONG` places on.
    inside = np.flatnonzero((keys[LONG_RUN:] ^ keys[:-LONG_RUN]) <= _ROW)
    if not len(inside):
        return []
    breaks = np.flatnonzero(np.diff(inside) > 1) + 1
    runs = []
    for some in np.split(inside, breaks):
        start = int(some[0])
        blocks = keys[start] & ~_ROW
        runs.append((start, int(np.searchsorted(keys, blocks | _ROW, side="right"))))
    return runs


NAME = "duplicates.jsonl"

LEAST_ONES = 48
"""A hash with fewer ones or fewer zeros than this tells little. Photographs have 128 of each; flat
images, edges and bars up to 13 ones; discs, crosses and chequers about 30."""
LISTED = 100
"""Members of a group that are listed; `count` says how many there are."""

BLOCK = 1 << 20


@dataclass(frozen=True)
class DuplicateGroup:
    """Images that are the same (`exact`) or nearly so."""

    kind: Literal["exact", "near"]
    distance: int
    """The largest Hamming distance to the first member."""
    rows: Rows
    """Two or more, ascending."""


class DuplicateMember(NamedTuple):
    """An image of a group, as it is listed."""

    split: str
    sample: int
    """Its id in the split."""
    label: int
    name: str
    """Where it came from."""


class DuplicateCounts(NamedTuple):
    """What was found."""

    groups: int
    pictures: int
    """In all groups."""
    leaks: int
    """Groups with members in more than one split."""
    labels_differ: int
    """Groups with members of more than one class."""


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
    telling = _has_detail(words)
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
        groups: what `find` returned.
        splits: [n] number of the split of each row.
        labels: [n] label of each row.
        member: tells what to list of a row; called for those that are listed.

    Returns:
        how many groups, images and leaks were written.
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


def _has_detail(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Return for each hash whether it tells something of its image."""
    telling = np.empty(len(words), np.bool_)
    for start in range(0, len(words), BLOCK):
        ones = np.bitwise_count(words[start : start + BLOCK]).sum(1, dtype=np.uint16)
        telling[start : start + BLOCK] = (ones >= LEAST_ONES) & (ones <= 256 - LEAST_ONES)
    return telling


def _find_identical(
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


def _make_group(
    rows: Rows,
    words: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.unsignedinteger],
    crcs: npt.NDArray[np.unsignedinteger],
) -> DuplicateGroup:
    blocks = (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
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
