"""The training pictures' mean and colour covariance (paper, sections 2 and 4.1).

All sums are of whole numbers below 2**53 and so exact in float64: the result does not depend on
the order in which pictures or shards are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from pipeline.errors import REBUILD, DataError
from pipeline.files import sealed, sha256
from pipeline.picture import SIZE, Pixels

NAME = "stats.npz"

Floats = npt.NDArray[np.float64]


class Sums:
    """Running sums over pictures; addition of two is exact and order-free."""

    def __init__(self) -> None:
        self.pictures = 0
        self.picture: npt.NDArray[np.unsignedinteger] = np.zeros((SIZE, SIZE, 3), np.uint32)
        self.outer: Floats = np.zeros((3, 3))

    def add(self, pixels: Pixels) -> None:
        """Add one picture, uint8 [256, 256, 3]; at most 2**24 by this way into one `Sums`."""
        # Whole planes first: the product is then twice as fast, and exact in any order.
        planes = np.ascontiguousarray(pixels.reshape(-1, 3).T).astype(np.float64)
        self.pictures += 1
        self.picture += pixels
        self.outer += planes @ planes.T

    def __iadd__(self, other: Sums) -> Sums:
        self.pictures += other.pictures
        self.picture = self.picture.astype(np.uint64) + other.picture
        self.outer += other.outer
        return self


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What `stats.npz` holds; pixel values are 0..255, channels are R, G, B."""

    mean_picture: npt.NDArray[np.float32]
    """[256, 256, 3]: the mean activity of each pixel."""
    channel_mean: Floats
    """[3]: mean over pictures and pixels."""
    covariance: Floats
    """[3, 3]: of the RGB pixel values of the whole training set, about `channel_mean`."""
    eigenvalues: Floats
    """[3]: variances along the principal components, largest first, in 0..255 squared."""
    eigenvectors: Floats
    """[3, 3]: column i belongs to eigenvalue i; its largest component is positive."""

    @classmethod
    def of(cls, sums: Sums) -> Statistics:
        """Turn sums over at least one picture into statistics."""
        pixels = sums.pictures * SIZE * SIZE
        mean = sums.picture.sum((0, 1)) / pixels
        covariance = sums.outer / pixels - np.outer(mean, mean)
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = values[::-1], vectors[:, ::-1]
        signs = np.sign(vectors[np.abs(vectors).argmax(0), range(3)])
        return cls(
            mean_picture=(sums.picture / sums.pictures).astype(np.float32),
            channel_mean=mean,
            covariance=covariance,
            eigenvalues=values.clip(0),  # a set of one colour may come out at -1e-12
            eigenvectors=vectors * signs,
        )

    def save(self, data: Path) -> str:
        """Write `DATA/stats.npz` (the same bytes for the same numbers) and return its SHA-256."""
        with sealed(data / NAME) as file:
            np.savez(file, allow_pickle=False, **vars(self))
        return sha256(data / NAME)

    @classmethod
    def load(cls, data: Path, expected: str | None = None) -> Statistics:
        """Read `DATA/stats.npz`; `expected` is the SHA-256 that it should have.

        Raises:
            DataError: it is missing, damaged, or of another set.
        """
        try:
            if expected is not None and sha256(data / NAME) != expected:
                raise ValueError("it is not the one that was built")
            with np.load(data / NAME) as arrays:
                return cls(**arrays)
        except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile) as error:
            raise DataError(f"{data / NAME} cannot be read ({error}); {REBUILD}") from error
