"""A fingerprint of what a picture shows: near duplicates have near fingerprints.

This is pHash at 256 bits: of the grey picture as 32x32 blocks, the 16x16 lowest frequencies of its
cosine transform, each above the median or not. All of it is done in whole numbers that float64
holds exactly, so that the bits are the same on every machine.
"""

from __future__ import annotations

import numpy as np

from pipeline.dataset.images import SIZE, Pixels

BITS = 256
"""Of a fingerprint."""
NEAR = 20
"""Fingerprints that differ in at most this many bits are of the same picture."""

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
    """Return in how many bits two fingerprints differ: 0..256, about 128 for unlike pictures."""
    return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()
