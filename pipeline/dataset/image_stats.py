"""Mean and color covariance of the training images (paper, sections 2 and 4.1).

All sums are exact sums of integers, so the result does not depend on the order in which images or
shards are added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.dataset.images import LEAST_SIZE, MOST_SIZE, SIZE, Pixels
from pipeline.dataset.manifest import Manifest, tables_folder
from pipeline.tools.errors import DamagedFile, refuse_forbidden, summarize_error
from pipeline.tools.files import atomic_write, sha256

NAME = "stats.npz"
LARGEST = 2**20
"""Size limit of the file in bytes, also unpacked, without the mean image."""

Floats = npt.NDArray[np.float64]

_SHAPES: dict[str, tuple[int, ...]] = {
    "channel_mean": (3,),
    "covariance": (3, 3),
    "eigenvalues": (3,),
    "eigenvectors": (3, 3),
}
_RECENT = 257
"""Number of images whose sum fits 16 bits, which add up twice as fast."""
_WIDE, _RUN, _RUNS = 12, 256, 32


class Sums:
    """Sums over images; `images` is their number. Two can be added, exactly and in any order."""

    def __init__(self, side: int = SIZE) -> None:
        """Start at 0 for square images of `side` pixels."""
        self.images = 0
        self.outer: npt.NDArray[np.int64] = np.zeros((3, 3), np.int64)
        """int64 [3, 3]: sum over images and pixels of the products of two channels."""
        self._image_sum: npt.NDArray[np.uint64] = np.zeros((side, side, 3), np.uint64)
        self._recent: npt.NDArray[np.uint16] = np.zeros((side, side, 3), np.uint16)
        self._recent_images = 0
        self._floats: npt.NDArray[np.float32] = np.empty((_RUNS, _RUN, _WIDE), np.float32)

    @property
    def image_sum(self) -> npt.NDArray[np.uint64]:
        """uint64 [side, side, 3]: sum over images."""
        self._image_sum += self._recent
        self._recent[...] = self._recent_images = 0
        return self._image_sum

    @image_sum.setter
    def image_sum(self, value: npt.NDArray[np.unsignedinteger]) -> None:
        self._recent, self._recent_images = np.zeros(value.shape, np.uint16), 0
        self._image_sum = value.astype(np.uint64)

    def add(self, pixels: Pixels) -> None:
        """Add one image, uint8 [side, side, 3]."""
        if self._recent_images == _RECENT:
            self.image_sum  # noqa: B018 - flushes the recent sum
        self._recent += pixels
        self._recent_images += 1
        self.images += 1
        # Four neighboring pixels make a row of 12 values: matrix products of that width are several
        # times faster than those of width 3, though three quarters of their entries are unused. The
        # sum of 256 rows is below 2**24, so float32 is exact. A part, half of 256x256 pixels, fits
        # the CPU cache; zeros fill the last one, and add nothing.
        total = np.zeros((_WIDE, _WIDE))
        values, part = pixels.reshape(-1), self._floats.size
        for start in range(0, len(values), part):
            some = values[start : start + part]
            if len(some) < part:
                some = np.concatenate([some, np.zeros(part - len(some), np.uint8)])
            np.copyto(self._floats, some.reshape(self._floats.shape))
            products = np.matmul(self._floats.transpose(0, 2, 1), self._floats)
            total += np.add.reduce(products, axis=0, dtype=np.float64)
        blocks = total.reshape(_WIDE // 3, 3, _WIDE // 3, 3)
        self.outer += np.einsum("iaib->ab", blocks).astype(np.int64)

    def __iadd__(self, other: Sums) -> Sums:
        self.images += other.images
        self.image_sum = self.image_sum + other.image_sum
        self.outer = self.outer + other.outer
        return self


class SquareSums:
    """Sums over the central squares of images, and over whole images while all are squares."""

    def __init__(self) -> None:
        self.side: int | None = None
        """Height and width of all images so far; 0 where they differ, or no set of squares is of
        this size; None before the first."""
        self.central = Sums()
        """Sums over the central square of each image, resampled to 256x256."""
        self.whole: Sums | None = None
        """Sums over squares of another size as they are; None without any, or if sizes differ."""

    def add_size(self, height: int, width: int) -> None:
        """Take note of the size of an image; before its pixels are added, if they are."""
        side = height if height == width and LEAST_SIZE <= height <= MOST_SIZE else 0
        self._meet(side)

    def add(self, pixels: Pixels, central: Pixels) -> None:
        """Add an image whose size is known, uint8 [height, width, 3], and its central square."""
        self.central.add(central)
        if self.side not in (0, SIZE):
            self.whole = self.whole or Sums(len(pixels))
            self.whole.add(pixels)

    def merge(self, other: SquareSums) -> None:
        """Add the images of another shard."""
        if other.side is not None:
            self._meet(other.side)
        self.central += other.central
        if self.side and other.whole is not None:
            self.whole = self.whole or Sums(self.side)
            self.whole += other.whole

    def _meet(self, side: int) -> None:
        self.side = side if self.side in (None, side) else 0
        if not self.side:
            self.whole = None

    @property
    def sums(self) -> Sums:
        """Sums from which the statistics of the set are made."""
        return self.whole or self.central


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Content of `stats.npz`; pixel values are 0..255, channels are R, G, B."""

    mean_picture: npt.NDArray[np.float32]
    """float32 [side, side, 3]: mean over images; where they differ in size, over the central square
    of each, resampled to 256x256."""
    channel_mean: Floats
    """float64 [3]: mean over images and pixels."""
    covariance: Floats
    """float64 [3, 3]: covariance of the RGB values over images and pixels."""
    eigenvalues: Floats
    """float64 [3]: variances of the principal components, largest first."""
    eigenvectors: Floats
    """float64 [3, 3]: column i belongs to eigenvalue i; its largest component is positive."""

    @classmethod
    def from_sums(cls, sums: Sums) -> Statistics:
        """Return the statistics of at least one image."""
        side = len(sums.image_sum)
        pixels = sums.images * side * side
        mean = sums.image_sum.sum((0, 1)) / pixels
        image = (sums.image_sum / sums.images).astype(np.float32)
        return cls._from_moments(image, mean, sums.outer / pixels - np.outer(mean, mean))

    @classmethod
    def _from_moments(
        cls, image: npt.NDArray[np.float32], mean: Floats, covariance: Floats
    ) -> Statistics:
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = values[::-1], vectors[:, ::-1]
        signs = np.sign(vectors[np.abs(vectors).argmax(0), range(3)])
        return cls(
            mean_picture=image,
            channel_mean=mean,
            covariance=covariance,
            eigenvalues=values.clip(0),  # of images of one color it may be -1e-12
            eigenvectors=vectors * signs,
        )

    def save(self, data: Path) -> str:
        """Write `DATA/stats.npz` (the same bytes for the same numbers) and return its SHA-256."""
        with atomic_write(data / NAME) as file:
            np.savez(file, allow_pickle=False, **vars(self))
        return sha256(data / NAME)

    @classmethod
    def load(cls, data: Path, manifest: Manifest | None = None) -> Statistics:
        """Read `DATA/stats.npz`.

        Args:
            data: folder of the data set.
            manifest: of the data set, whose hash and size the file must have; None: any of 256x256.

        Raises:
            DamagedFile: it is missing, damaged, that of another data set, or its numbers cannot be.
            SetupError: it may not be read.
        """
        path = (data if manifest is None else tables_folder(data, manifest)) / NAME
        expected = None if manifest is None else manifest.stats_sha256
        side = SIZE if manifest is None else manifest.mean_side
        try:
            most = LARGEST + 12 * side**2
            if path.stat().st_size > most:
                raise ValueError(f"it has more than {most:,} bytes")
            if expected is not None and sha256(path) != expected:
                raise ValueError("it is not the one that was built")
            with np.load(path) as arrays:
                if sum(member.file_size for member in arrays.zip.infolist()) > most:
                    raise ValueError(f"unpacked, it has more than {most:,} bytes")
                statistics = cls(**_check_arrays(dict(arrays), side))
        except Exception as error:  # NumPy raises many kinds for a damaged header
            refuse_forbidden(error)
            raise DamagedFile(path, summarize_error(error)) from error
        for fault in statistics.find_faults():
            raise DamagedFile(path, fault)
        return statistics

    def find_faults(self) -> Iterator[str]:
        """Yield what the statistics of no images are: they do not fit each other."""
        mean = self.mean_picture
        if mean.min() < 0 or mean.max() > 255:
            yield "mean_picture leaves 0..255"
        if not np.allclose(mean.mean((0, 1), np.float64), self.channel_mean, atol=1e-2):
            yield "channel_mean is not that of mean_picture"
        values, vectors = self.eigenvalues, self.eigenvectors
        if (values < 0).any() or (np.diff(values) > 0).any():
            yield "eigenvalues are negative or out of order"
        close = 1e-6 * max(1.0, float(values.max()))
        if not np.allclose(vectors @ np.diag(values) @ vectors.T, self.covariance, atol=close):
            yield "eigenvalues and eigenvectors are not those of covariance"


def pool_statistics(parts: Sequence[Statistics], shares: Sequence[float]) -> Statistics:
    """Return the statistics of a mixture of training sets, which have these shares in it."""
    weights = np.array(shares) / sum(shares)
    mean = np.tensordot(weights, [one.channel_mean for one in parts], 1)
    moments = [one.covariance + np.outer(one.channel_mean, one.channel_mean) for one in parts]
    covariance = np.tensordot(weights, moments, 1) - np.outer(mean, mean)
    image = np.tensordot(weights, [one.mean_picture for one in parts], 1)
    return Statistics._from_moments(image.astype(np.float32), mean, covariance)


def _check_arrays(arrays: dict[str, Any], side: int) -> dict[str, Any]:
    """Return the arrays of the file, if they are the ones it should hold, of finite numbers."""
    shapes = {"mean_picture": (side, side, 3)} | _SHAPES
    if arrays.keys() != shapes.keys():
        raise ValueError("it holds no statistics")
    for name, shape in shapes.items():
        array = arrays[name]
        if array.shape != shape or array.dtype.kind != "f":
            found = f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"{name} is {found}, not floats {list(shape)}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds numbers that are not finite")
    return arrays
