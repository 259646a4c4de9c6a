"""Random words that are a pure function of numbers, for whole batches at once.

Each sample of each epoch has its own SplitMix64 generator (Steele, Lea, Flood 2014: "Fast
splittable pseudorandom number generators"), whose state is hashed from seed, epoch and sample id.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def words(
    seed: int,
    epochs: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int64],
    count: int,
    skip: int = 0,
) -> list[Words]:
    """Return words `skip` .. `skip + count` of each sample's generator: uniform uint64 [b] each.

    Args:
        seed: 0 or more.
        epochs: int64 [b].
        ids: int64 [b].
        count: how many words.
        skip: words left out, at no cost.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        start = _mix(np.array([seed], np.uint64) + _GOLDEN)
        state = _mix(_mix(start + epochs.astype(np.uint64)) + ids.astype(np.uint64))
        return [_mix(state + np.uint64(skip + k + 1) * _GOLDEN) for k in range(count)]


def below(word: Words, limit: int) -> npt.NDArray[np.int64]:
    """Return whole numbers 0..limit-1 (limit at most 2**32), uniform to within limit / 2**32."""
    return ((word >> np.uint64(32)) * np.uint64(limit) >> np.uint64(32)).astype(np.int64)


def _mix(word: Words) -> Words:
    """SplitMix64's finalizer: a bijection of 64-bit words in which every bit matters."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
