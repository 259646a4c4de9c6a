"""Every pair of 256-bit hashes within a Hamming distance, joined into clusters: exact, and fast.

`blocks` says which bits to sort by, and why no pair is missed. Identical hashes are one row in all
of this, and rows that are joined already are not compared again: a hundred thousand copies of a
picture, or of nearly the same, are no five billion pairs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.packing.blocks import BITS, CHECK, KEY_BITS, Block, best_cut, possible_cuts
from pipeline.packing.forest import Forest, Rows

WORDS = 4

Hashes = npt.NDArray[np.uint8]
"""[n, 32]"""
Words = npt.NDArray[np.uint64]
"""[n, 4]: hashes as little-endian words."""
Keys = npt.NDArray[np.uint64]
"""[n], sorted: some blocks, then 32 bits for the row."""
Distances = npt.NDArray[np.uint16]

LONG = 256
"""Rows with equal keys that are compared pair by pair; more are taken around leaders."""
PAIRS = 1 << 20
"""Pairs compared at a time."""
SAMPLE = 4096
"""Rows that tell which bits differ, and rows whose bits are taken apart at a time."""
SIFTED = 1024
"""Rows of a run from which a search by the bits in which they differ can be worth it."""
EVEN = 1 / 8
"""A bit tells much about rows if no less than this share of them have it, and lack it."""

_ROW = np.uint64(2**32 - 1)


class Column(NamedTuple):
    """A block of every row."""

    block: Block
    values: npt.NDArray[np.uint16]


def clusters(
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
    forest = Forest(len(words))
    distinct = _join_identical(words, rows, forest)
    if threshold and len(distinct) > 1:
        with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
            _Search(words, distinct, threshold, forest).run(pool.map)
    return forest.clusters()


def distances(words: Words, left: Rows | int, right: Rows) -> Distances:
    """Return the Hamming distances of rows of uint64 [n, 4], pair by pair or of one to many."""
    counts = np.bitwise_count(words[left] ^ words[right])
    total: Distances = counts.sum(-1, dtype=np.uint16)
    return total


def _join_identical(words: Words, rows: Rows, forest: Forest) -> Rows:
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


class _Search:
    """Finds and joins the near pairs among rows with distinct hashes."""

    def __init__(
        self,
        words: Words,
        rows: Rows,
        threshold: int,
        forest: Forest,
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
        cut = best_cut(self._threshold, len(self._rows), self._bits)
        for group in cut.groups:
            columns = list(spread(self.column, group))
            for _ in spread(self.table, *zip(*combinations(columns, cut.equal), strict=True)):
                pass

    def column(self, block: Block) -> Column:
        """Return a block of every row."""
        word, shift = divmod(block.start, 64)
        bits = self._cut[self._places, word] >> np.uint64(shift)
        if shift + block.width > 64:
            bits |= self._cut[self._places, word + 1] << np.uint64(64 - shift)
        return Column(block, (bits & np.uint64((1 << block.width) - 1)).astype(np.uint16))

    def table(self, *columns: Column) -> None:
        """Join all near pairs that are equal in some blocks."""
        word = _other_word([column.block for column in columns])
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
        runs = _long_runs(keys)
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
        near = distances(self._words, a, b) <= self._threshold
        self._forest.link(a[near], b[near])

    def _long_run(self, rows: Rows) -> None:
        """Join near pairs of many rows that are equal in some blocks."""
        if not np.ptp(self._forest.roots(rows)):  # joined already
            return
        large = self._whole and len(rows) >= SIFTED
        if large and (sifted := _sift(self._words, rows, self._threshold)):
            _Search(self._words, rows, self._threshold, self._forest, sifted).run(map)
        else:
            self._around_leaders(rows)

    def _around_leaders(self, rows: Rows) -> None:
        """Join all near pairs of many rows, without looking at most pairs of a dense cluster.

        What is near a leader is joined to it, and needs comparing only with rows within twice
        the threshold of the leader (triangle inequality) that are not joined to it yet.
        """
        while len(rows) > 1 and np.ptp(self._forest.roots(rows)):
            distance = distances(self._words, int(rows[0]), rows)
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
            near = distances(self._words, one, some) <= self._threshold
            self._forest.link(some[near], one)


def _other_word(blocks: Iterable[Block]) -> int:
    """Return a word of the hash of which the blocks hold no bit, if there is one."""
    held = {bit // 64 for block in blocks for bit in (block.start, block.start + block.width - 1)}
    return max(set(range(WORDS)) - held, default=0)


def _sift(words: Words, rows: Rows, threshold: int) -> tuple[Words, int] | None:
    """Return the bits in which rows really differ, uint64 [rows, 4], and how many they are.

    Any choice of bits keeps near pairs near. None if a search by these would not be much faster
    than comparing all pairs.
    """
    sample = words[rows[:: max(1, len(rows) // SAMPLE)]]
    ones = np.unpackbits(sample.view(np.uint8), axis=1, bitorder="little").mean(0)
    useful = np.flatnonzero((ones > EVEN) & (ones < 1 - EVEN))
    cost = min(
        (cut.cost(len(rows)) for cut in possible_cuts(threshold, len(useful))), default=np.inf
    )
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


def _long_runs(keys: Keys) -> Sequence[tuple[int, int]]:
    """Return (start, end) of the runs of more than `LONG` sorted keys with equal blocks."""
    if len(keys) <= LONG:
        return []
    # A run is long where a key equals the one `LONG` places on.
    inside = np.flatnonzero((keys[LONG:] ^ keys[:-LONG]) <= _ROW)
    if not len(inside):
        return []
    breaks = np.flatnonzero(np.diff(inside) > 1) + 1
    runs = []
    for some in np.split(inside, breaks):
        start = int(some[0])
        blocks = keys[start] & ~_ROW
        runs.append((start, int(np.searchsorted(keys, blocks | _ROW, side="right"))))
    return runs
