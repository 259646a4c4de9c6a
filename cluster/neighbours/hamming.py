"""Search among binary codes: packed bits, exclusive or, population count."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from cluster.experiments.neighbors.features import Flags, Ids

Codes = npt.NDArray[np.uint8]
WORD = 8
"""Bytes that are compared at a time."""


def pack(bits: Flags) -> Codes:
    """Bits [n, b] as bytes, uint8 [n, b / 8], the first bit highest."""
    return np.packbits(bits, axis=1)


class Hamming:
    """The codes of a base, ready to be searched; each keeps its bytes, up to a multiple of 8."""

    def __init__(self, codes: Codes) -> None:
        """Take codes, uint8 [N, bytes]."""
        self._words = _words(codes).T.copy()  # [words, N]: a word of all codes lies together

    def nearest(self, queries: Codes, k: int) -> tuple[Ids, Ids]:
        """Find the k nearest codes for every query, the nearest first; ties go to the earlier one.

        Args:
            queries: uint8 [Q, bytes].
            k: 1..N.

        Returns:
            int64 [Q, k] places in the base, and int64 [Q, k] distances in bits.
        """
        words = _words(queries)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            found = list(threads.map(lambda query: self._one(query, k), words))
        return np.stack([ids for ids, _ in found]), np.stack([far for _, far in found])

    def _one(self, query: npt.NDArray[np.uint64], k: int) -> tuple[Ids, Ids]:
        far = np.bitwise_count(self._words[0] ^ query[0]).astype(np.uint16)
        for word, own in zip(self._words[1:], query[1:], strict=True):
            far += np.bitwise_count(word ^ own)
        limit = np.searchsorted(np.cumsum(np.bincount(far)), k)
        near = np.flatnonzero(far <= limit)
        ids = near[np.argsort(far[near], kind="stable")][:k]
        return ids, far[ids].astype(np.int64)


def _words(codes: Codes) -> npt.NDArray[np.uint64]:
    """Codes as words of 64 bits, filled up with zeros: uint64 [n, words]."""
    count, size = codes.shape
    filled = np.zeros((count, -(-size // WORD) * WORD), np.uint8)
    filled[:, :size] = codes
    return filled.view(np.uint64)
