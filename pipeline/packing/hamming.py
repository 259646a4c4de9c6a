"""Groups of 256-bit hashes within a Hamming distance of each other: exact, and fast.

The search compares few pairs and misses none. With t the threshold, the 256 bits are cut into
groups, and group i into r_i + k blocks, where the sum of (r_i + 1) is t + 1. If each group held
r_i + 1 or more of the bits in which a pair differs, there would be t + 1 or more of them; so within
distance t some group holds at most r_i, and at least k of its r_i + k blocks are equal. Sorting by
each choice of k blocks of each group therefore brings every such pair side by side, next to few
others. For 14 million rows and 16 bits that is 4 groups of 5 and 6 blocks of 12 bits, of which 2
are equal: 45 sorts. `choose_cut` weighs sorts against pairs to compare. Identical hashes are one
row in the search, and rows that are joined already are not compared again: a hundred thousand
copies of one image are no five billion pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import combinations, pairwise, product
from threading import RLock
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.tools.units import cpu_count

BITS = 256
"""Bits of a hash."""
KEY_BITS = 32
EQUAL = (2, 3, 4)
"""Numbers of equal blocks to choose from."""
SORT, COMPARE = 50, 80
"""Nanoseconds to sort a row by a key, and to compare a pair (measured); only the ratio counts."""


class BitBlock(NamedTuple):
    """Some neighbouring bits of a hash; 16 at most."""

    start: int
    width: int


class BlockCut(NamedTuple):
    """Groups of blocks; near pairs have `equal` blocks of a group in common."""

    equal: int
    groups: list[list[BitBlock]]
    tables: int
    """Number of choices of `equal` blocks of a group."""
    width: int
    """Least bits of a choice."""

    def estimate_cost(self, rows: int) -> float:
        """Return about how long a search takes, in nanoseconds."""
        return self.tables * (rows * SORT + rows * rows / 2 / 2.0**self.width * COMPARE)


def choose_cut(threshold: int, rows: int, bits: int = BITS) -> BlockCut:
    """Return the groups of blocks (module docstring) that are cheapest for so many rows."""
    return min(list_cuts(threshold, bits), key=lambda cut: cut.estimate_cost(rows))


@lru_cache
def list_cuts(threshold: int, bits: int) -> list[BlockCut]:
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
        tables = sum(math.comb(size, equal) for size in sizes)
        cuts.append(BlockCut(equal, members, tables, equal * min(most, bits // count)))
    return cuts


Rows = npt.NDArray[np.intp]
"""Row numbers."""
Roots = npt.NDArray[np.uint32]


class UnionFind:
    """Union-find over rows, many pairs at a time; the root of a tree is its lowest row.

    SciPy's `connected_components` would need all pairs at once; a crowd has billions of them, and
    the search asks meanwhile which rows are joined already. This takes 4 bytes a row.
    """

    def __init__(self, rows: int) -> None:
        self.parent = np.arange(rows, dtype=np.uint32)
        self._lock = RLock()

    def link(self, left: npt.ArrayLike, right: npt.ArrayLike) -> None:
        """Join rows pairwise."""
        a, b = np.broadcast_arrays(np.asarray(left), np.asarray(right))
        with self._lock:
            while len(a):
                a, b = self.find_roots(a), self.find_roots(b)
                apart = a != b
                a, b = a[apart], b[apart]
                np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))

    def find_roots(self, rows: npt.NDArray[np.integer]) -> Roots:
        """Return the root of each row: equal for rows that are joined."""
        with self._lock:
            up: Roots = self.parent[rows]
            while not np.array_equal(up, higher := self.parent[up]):
                self.parent[rows] = higher  # path halving
                up = higher
            return up

    def find_groups(self) -> list[Rows]:
        """Return the trees of two or more rows."""
        roots = self.find_roots(np.arange(len(self.parent)))
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
"""Rows that decide which bits differ, and rows that are unpacked at a time."""
LEAST_SELECTED = 1024
"""Rows of a run from which a search by the bits in which they differ can be worth it."""
LEAST_SHARE = 1 / 8
"""A bit is selected if at least this share of the rows have it, and at least this share lack it."""

_ROW = np.uint64(2**32 - 1)


class BlockColumn(NamedTuple):
    """The bits of a block in every row."""

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
        rows: row numbers to search (ascending); by default all.
        workers: threads; by default one a core.

    Returns:
        the clusters of two or more rows, each ascending, in the order of their first rows.
    """
    words = np.ascontiguousarray(hashes).view("<u8")
    rows = np.arange(len(words)) if rows is None else rows
    if len(rows) < 2:
        return []
    joined = UnionFind(len(words))
    distinct = _join_identical(words, rows, joined)
    if threshold and len(distinct) > 1:
        with ThreadPoolExecutor(workers or cpu_count()) as pool:
            NearPairSearch(words, distinct, threshold, joined).run(pool.map)
    return joined.find_groups()


def count_different_bits(words: Words, left: Rows | int, right: Rows) -> Distances:
    """Return the Hamming distances of rows of uint64 [n, 4], pair by pair or of one to many."""
    counts = np.bitwise_count(words[left] ^ words[right])
    total: Distances = counts.sum(-1, dtype=np.uint16)
    return total


def _join_identical(words: Words, rows: Rows, joined: UnionFind) -> Rows:
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
    joined.parent[order] = np.repeat(first, np.diff(starts, append=len(order)))
    first.sort()
    return first


class NearPairSearch:
    """Finds and joins the near pairs among rows with distinct hashes."""

    def __init__(
        self,
        words: Words,
        rows: Rows,
        threshold: int,
        joined: UnionFind,
        sifted: tuple[Words, int] | None = None,
    ) -> None:
        """Take the hashes, uint64 [n, 4], and which rows of them to compare.

        `sifted`: some bits of just these rows, uint64 [rows, 4], and how many: cut blocks of them.
        """
        self._words, self._rows = words, rows
        self._threshold, self._joined = threshold, joined
        self._whole = sifted is None
        self._cut, self._bits = sifted or (words, BITS)
        self._places = rows if sifted is None else np.arange(len(rows))

    def run(self, spread: Callable[..., Iterable[object]]) -> None:
        """Join all near pairs; `spread` is `map`, or the `map` of a thread pool."""
        cut = choose_cut(self._threshold, len(self._rows), self._bits)
        for group in cut.groups:
            columns = list(spread(self.column, group))
            for _ in spread(self.table, *zip(*combinations(columns, cut.equal), strict=True)):
                pass

    def column(self, block: BitBlock) -> BlockColumn:
        """Return the bits of a block in every row."""
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
        """Join near pairs in the runs of more than `LONG_RUN` equal keys; return the other keys."""
        runs = _find_long_runs(keys)
        keep = np.ones(len(keys) if runs else 0, bool)
        for start, end in runs:
            self._long_run(self._rows[(keys[start:end] & _ROW).astype(np.intp)])
            keep[start:end] = False
        return keys[keep] if runs else keys

    def _pairs(self, left: Keys, right: Keys, word: int) -> None:
        a, b = (self._rows[(keys & _ROW).astype(np.intp)] for keys in (left, right))
        # Nearly all pairs differ enough in one word outside the equal blocks.
        few = np.bitwise_count(self._words[a, word] ^ self._words[b, word]) <= self._threshold
        a, b = a[few], b[few]
        near = count_different_bits(self._words, a, b) <= self._threshold
        self._joined.link(a[near], b[near])

    def _long_run(self, rows: Rows) -> None:
        """Join near pairs of many rows that are equal in some blocks."""
        if not np.ptp(self._joined.find_roots(rows)):  # joined already
            return
        large = self._whole and len(rows) >= LEAST_SELECTED
        if large and (sifted := _select_bits(self._words, rows, self._threshold)):
            NearPairSearch(self._words, rows, self._threshold, self._joined, sifted).run(map)
        else:
            self._around_leaders(rows)

    def _around_leaders(self, rows: Rows) -> None:
        """Join all near pairs of many rows, without looking at most pairs of a dense cluster.

        What is near a leader is joined to it, and needs comparing only with rows within twice
        the threshold of the leader (triangle inequality) that are not joined to it yet.
        """
        while len(rows) > 1 and np.ptp(self._joined.find_roots(rows)):
            distance = count_different_bits(self._words, int(rows[0]), rows)
            inside = distance <= self._threshold
            ball = rows[inside]
            self._joined.link(ball, rows[0])
            around = ~inside & (distance <= 2 * self._threshold)
            self._ball_to_shell(ball, distance[inside], rows[around], distance[around])
            rows = rows[~inside]

    def _ball_to_shell(self, ball: Rows, inner: Distances, shell: Rows, outer: Distances) -> None:
        """Join near pairs of rows at known distances from a leader; the ball is joined to it."""
        for one, own in zip(ball.tolist(), inner.tolist(), strict=True):
            open_ = self._joined.find_roots(shell) != self._joined.find_roots(ball[:1])
            shell, outer = shell[open_], outer[open_]
            if not len(shell):
                return
            some = shell[outer <= own + self._threshold]
            near = count_different_bits(self._words, one, some) <= self._threshold
            self._joined.link(some[near], one)


def _choose_other_word(blocks: Iterable[BitBlock]) -> int:
    """Return a word of the hash with no bit of the blocks, or 0 if there is none."""
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
    cuts = list_cuts(threshold, len(useful))
    cost = min((cut.estimate_cost(len(rows)) for cut in cuts), default=math.inf)
    if cost > len(rows) ** 2 * COMPARE / 10:
        return None
    packed = np.zeros((len(rows), BITS // 8), np.uint8)
    for start in range(0, len(rows), SAMPLE):
        some = words[rows[start : start + SAMPLE]].view(np.uint8)
        bits = np.unpackbits(some, axis=1, bitorder="little")[:, useful]
        few = np.packbits(bits, axis=1, bitorder="little")
        packed[start : start + SAMPLE, : few.shape[1]] = few
    sifted: Words = packed.view("<u8")
    return sifted, len(useful)


def _find_long_runs(keys: Keys) -> list[tuple[int, int]]:
    """Return (start, end) of the runs of more than `LONG_RUN` sorted keys with equal blocks."""
    # A run is long where a key equals the one `LONG_RUN` places on.
    inside = np.flatnonzero((keys[LONG_RUN:] ^ keys[:-LONG_RUN]) <= _ROW)
    starts = inside[np.flatnonzero(np.diff(inside, prepend=-2) > 1)]
    ends = np.searchsorted(keys, keys[starts] | _ROW, side="right")
    return list(zip(starts.tolist(), ends.tolist(), strict=True))
