"""Random draws of crop, flip and colour: a pure function of (seed, epoch, sample id).

Each sample of each epoch has its own SplitMix64 generator (Steele, Lea, Flood 2014: "Fast
splittable pseudorandom number generators"), whose state is hashed from seed, epoch and sample id.
So the pixels of a sample do not depend on the batch, the rank or the thread that makes them.
`loader.BatchReader` hands the draws to the DALI graphs of `decode`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Uint64s = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def random_uint64(
    seed: int, epochs: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], count: int, skip: int = 0
) -> list[Uint64s]:
    """Return numbers `skip` .. `skip + count` of each sample's generator: uniform uint64 [b] each.

    Args:
        seed: 0 or more.
        epochs: int64 [b].
        ids: int64 [b].
        count: how many numbers.
        skip: how many numbers to skip, at no cost.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        start = _mix(np.array([seed], np.uint64) + _GOLDEN)
        state = _mix(_mix(start + epochs.astype(np.uint64)) + ids.astype(np.uint64))
        return [_mix(state + np.uint64(skip + k + 1) * _GOLDEN) for k in range(count)]


def scale_to_range(word: Uint64s, limit: int) -> npt.NDArray[np.int64]:
    """Return whole numbers 0..limit-1 (limit at most 2**32), uniform to within limit / 2**32."""
    return ((word >> np.uint64(32)) * np.uint64(limit) >> np.uint64(32)).astype(np.int64)


def _mix(word: Uint64s) -> Uint64s:
    """SplitMix64's finalizer: a bijection of 64-bit words in which every bit matters."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


CROP = 224
"""Height and width of a training crop, in pixels."""
BORDER = 32
"""Largest coordinate of a crop's corner: 256 - 224 pixels."""
DRAW_WORDS = 7
"""Random numbers that the draws of a sample take. `order.choose_substitute` uses the numbers that
follow: a change of this changes which samples replace damaged ones."""

Floats = npt.NDArray[np.float64]


class Draws(NamedTuple):
    """The random choices of a batch of b samples."""

    x: npt.NDArray[np.int64]
    """[b] left edge of the crop, 0..32."""
    y: npt.NDArray[np.int64]
    """[b] upper edge of the crop, 0..32."""
    flip: npt.NDArray[np.bool_]
    """[b] mirror left to right; probability 1/2."""
    color: Floats
    """[b, 3] standard normal, one per principal component (the paper's alpha / 0.1)."""


def draw(seed: int, epochs: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> Draws:
    """Return the draws of samples `ids` in `epochs` (both int64 [b]).

    Paper, section 4.1: random 224x224 patches and their reflections, and three colour draws
    "each alpha is drawn only once for all the pixels of a particular training image until that
    image is used for training again".
    """
    drawn = random_uint64(seed, epochs, ids, DRAW_WORDS)
    return Draws(
        x=scale_to_range(drawn[0], BORDER + 1),
        y=scale_to_range(drawn[1], BORDER + 1),
        flip=(drawn[2] >> np.uint64(63)).astype(bool),
        color=np.stack([_normal(*drawn[3:5])[0], *_normal(*drawn[5:7])], axis=1),
    )


def compute_color_shift(color: Floats, basis: Floats) -> Floats:
    """Return the RGB shift [b, 3] of draws [b, 3].

    Args:
        color: the draws.
        basis: components in columns, [3, 3], or [b, 3, 3] for a basis of each sample.
    """
    # A sum in a fixed order: a matrix product may round otherwise for another batch size.
    shift: Floats = color[:, :1] * basis[..., 0]
    shift += color[:, 1:2] * basis[..., 1]
    shift += color[:, 2:3] * basis[..., 2]
    return shift


def _normal(first: Uint64s, second: Uint64s) -> tuple[Floats, Floats]:
    """Return two standard normals per pair of numbers (Box and Muller 1958)."""
    unit = 2.0**-53
    radius = np.sqrt(-2 * np.log(((first >> np.uint64(11)).astype(np.float64) + 0.5) * unit))
    angle = 2 * np.pi * ((second >> np.uint64(11)).astype(np.float64) * unit)
    # log and cos differ in the last bit between processors: keep only bits that do not.
    coarse = 2.0**20
    return (
        np.round(radius * np.cos(angle) * coarse) / coarse,
        np.round(radius * np.sin(angle) * coarse) / coarse,
    )
