"""What conv1 kernels look for, in numbers, and whether the two columns look for different things.

The paper (section 6.1, figure 3): the kernels of one GPU are largely colour-agnostic, those of the
other largely colour-specific; "this kind of specialization occurs during every run and is
independent of any particular random weight initialization (modulo a renumbering of the GPUs)". It
judges by eye; the numbers here are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from cluster.run.kernels import Kernel

Floats = npt.NDArray[np.float64]

GREY_OF_NOISE = 2 / 3
"""Colourfulness of a kernel of independent values: two of three axes of colour are not grey."""
ORIENTATION_OF_NOISE = 0.064
"""Median orientation of kernels of noise, 3 x 11 x 11 (measured)."""
SPLITS = 5000
"""Random splits that a split into columns is compared with."""
CERTAIN = 0.05
NOISE_DRAWS = 1000
NOISE_PERCENTILE = 99.0
TINY = 1e-30


@dataclass(frozen=True)
class Scores:
    """A number 0..1 for each of n kernels."""

    colour: Floats
    """Share of its energy off the grey axis R = G = B: grey 0, noise 2/3, opponent colours 1."""
    orientation: Floats
    """Coherence of its structure tensor: all changes in one direction 1, as many in all 0."""
    concentration: Floats
    """Share of its energy in the strongest place of its spectrum: low for noise."""

    def __len__(self) -> int:
        return len(self.colour)

    @property
    def shaped(self) -> npt.NDArray[np.bool_]:
        """Which are more concentrated than 99 of 100 kernels of noise."""
        return self.concentration > noise_limit()


@dataclass(frozen=True)
class Split:
    """How well a score tells the kernels of two columns apart, beside random splits of them."""

    apart: float
    """Share of pairs (one of each column) in which the one column has the higher score: 0.5 if the
    columns are alike, 1 if they share no value. Of the column that is ahead; ties count half."""
    ahead: str
    """That column, "a" or "b"."""
    chance: float
    """Median of `apart` over random splits of the same kernels."""
    chance_95: float
    """What 95 % of them stay below."""
    p: float
    """Share of random splits at least as far apart: never below 1 / (splits + 1)."""

    @property
    def told(self) -> bool:
        """Whether it is more than a random split would give in 95 of 100 cases."""
        return self.p < CERTAIN


def scores(kernels: Kernel) -> Scores:
    """The scores of kernels, float [n, 3, k, k] in R, G, B."""
    exact = kernels.astype(np.float64)
    energy = (exact**2).sum(axis=(1, 2, 3))
    grey = (exact.sum(axis=1) ** 2).sum(axis=(1, 2)) / 3
    return Scores(
        colour=np.clip(1 - grey / np.maximum(energy, TINY), 0, 1) * (energy > 0),
        orientation=_coherence(exact),
        concentration=_concentration(exact),
    )


def _coherence(kernels: Floats) -> Floats:
    """(l1 - l2) / (l1 + l2) of the eigenvalues of each structure tensor, summed over channels."""
    down, across = np.gradient(kernels, axis=(2, 3))
    yy, xx, xy = (
        (one * two).sum(axis=(1, 2, 3))
        for one, two in ((down, down), (across, across), (down, across))
    )
    coherence: Floats = np.hypot(xx - yy, 2 * xy) / np.maximum(xx + yy, TINY)
    return coherence


def _concentration(kernels: Floats) -> Floats:
    """Largest share of the energy that lies within one frequency of another, of k x k."""
    power = (np.abs(np.fft.fft2(kernels)) ** 2).sum(axis=1)
    near = sum(
        np.roll(power, (down, across), (1, 2)) for down in (-1, 0, 1) for across in (-1, 0, 1)
    )
    most: Floats = np.max(near, axis=(1, 2)) / np.maximum(power.sum(axis=(1, 2)), TINY)
    return most


@cache
def noise_limit() -> float:
    """The concentration that one in a hundred kernels of noise is beyond."""
    noise = np.random.default_rng(0).normal(size=(NOISE_DRAWS, 3, 11, 11))
    return float(np.percentile(_concentration(noise), NOISE_PERCENTILE))


def split(a: Floats, b: Floats, seed: int = 0) -> Split | None:
    """How far the scores of column a [m] and column b [n] are apart; None if one is empty."""
    if not len(a) or not len(b):
        return None
    ranks = _ranks(np.concatenate((a, b)))
    one = _share(ranks[: len(a)].sum(), len(a), len(b))
    rng = np.random.default_rng(seed)
    mixed = rng.permuted(np.tile(ranks, (SPLITS, 1)), axis=1)[:, : len(a)].sum(axis=1)
    others = np.maximum(mixed_shares := _share(mixed, len(a), len(b)), 1 - mixed_shares)
    apart = max(float(one), 1 - float(one))
    return Split(
        apart=apart,
        ahead="a" if one >= 0.5 else "b",
        chance=float(np.median(others)),
        chance_95=float(np.percentile(others, 95)),
        p=float((1 + (others >= apart - 1e-12).sum()) / (1 + SPLITS)),
    )


def _share(rank_sum: Floats, ours: int, theirs: int) -> Floats:
    """Share of pairs in which ours is higher, from the sum of our ranks (Mann and Whitney)."""
    return (rank_sum - ours * (ours + 1) / 2) / (ours * theirs)


def _ranks(values: Floats) -> Floats:
    """Ranks from 1 on; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[place]
    return ranks
