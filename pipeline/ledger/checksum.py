"""One 32-bit number for the pixels of each sample, to compare deliveries without keeping them.

On the host it is the CRC-32 of the sample's bytes. A GPU computes no CRC in parallel: there it is
a sum of the float16 bit patterns, each times an odd 64-bit number of its own place, folded to 32
bits. Integer sums do not depend on the order in which a GPU makes them, and a change of any one
value changes the sum before folding for certain.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from isal import isal_zlib

_AT_ONCE = 16
"""Samples summed at a time: their 64-bit products (19 MB at 224 px) stay in the cache of a GPU."""


def crc32_each(images: torch.Tensor) -> npt.NDArray[np.uint32]:
    """Return the CRC-32 (zlib's) of the bytes of each sample, uint32 [b].

    Args:
        images: [b, ...] on the host, any dtype that NumPy knows; not copied when contiguous.
    """
    rows = images.detach().contiguous().numpy().reshape(len(images), -1).view(np.uint8)
    return np.fromiter((isal_zlib.crc32(row) for row in rows), np.uint32, len(rows))


def weighted_sums(images: torch.Tensor) -> torch.Tensor:
    """Return a checksum of each sample, int64 [b] (0..2**32-1), on the device of `images`.

    Nothing here waits for the device.

    Args:
        images: float16 [b, ...].

    Raises:
        ValueError: another dtype.
    """
    if images.dtype != torch.float16:
        raise ValueError(f"checksums are of float16 bits, not {images.dtype}")
    bits = images.detach().contiguous().view(torch.int16).flatten(1)
    weights = _weights(bits.shape[1], bits.device)
    parts = [(part * weights).sum(1) for part in torch.split(bits, _AT_ONCE)]
    sums = torch.cat(parts)
    return (sums ^ (sums >> 32)) & 0xFFFFFFFF


@lru_cache(maxsize=4)
def _weights(count: int, device: torch.device) -> torch.Tensor:
    """Return `count` fixed odd numbers, int64; PCG64's raw words are the same in every NumPy."""
    words = np.random.PCG64(0).random_raw(count) | np.uint64(1)
    return torch.from_numpy(words.view(np.int64)).to(device)
