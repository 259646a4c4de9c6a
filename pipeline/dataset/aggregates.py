"""`aggregates.npz`: pixel sums and perceptual hashes of a version of a data set.

They are kept so that the next version needs no old image. The file lies beside the index of the
version that it belongs to, and names its SHA-256.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pipeline.dataset.image_stats import Sums
from pipeline.dataset.manifest import Manifest

NAME = "aggregates.npz"
HASH_BYTES = 32
"""Bytes of the perceptual hash of an image."""


@dataclass(frozen=True)
class Aggregates:
    """Content of `aggregates.npz`."""

    sums: Sums
    """Sums over the training images as they were before they were encoded."""
    hashes: Mapping[str, npt.NDArray[np.uint8]]
    """uint8 [N, 32] of each split: perceptual hash of each image, in the order of ids."""

    def write(self, file: IO[bytes], indices: Mapping[str, str]) -> None:
        """Write the file; the same numbers give the same bytes.

        Args:
            file: open for writing.
            indices: SHA-256 of the index of each split.
        """
        arrays: dict[str, Any] = {f"hashes-{name}": one for name, one in self.hashes.items()}
        arrays |= {f"index-{name}": np.array(one) for name, one in indices.items()}
        np.savez(
            file,
            images=np.uint64(self.sums.images),
            image_sum=self.sums.image_sum,
            outer=self.sums.outer,
            **arrays,
        )

    @classmethod
    def parse(cls, content: bytes, manifest: Manifest) -> Aggregates | None:
        """Return the aggregates of this version; None if these are damaged, or of another."""
        if (read := _read(content)) is None:
            return None
        found, indices = read
        counts = {name: len(one) for name, one in found.hashes.items()}
        fits = indices == {name: split.index_sha256 for name, split in manifest.splits.items()}
        fits &= counts == {name: split.samples for name, split in manifest.splits.items()}
        fits &= len(found.sums.image_sum) == manifest.mean_side
        return found if fits else None


def is_sound(content: bytes) -> bool:
    """Return whether these are the bytes of a file that was written, of whatever version."""
    return _read(content) is not None


def _read(content: bytes) -> tuple[Aggregates, dict[str, str]] | None:
    """Return what a file holds, and the SHA-256 of each index; None if it is damaged.

    The same numbers give the same bytes: so no bit of it can be another.
    """
    try:
        with np.load(io.BytesIO(content)) as arrays:
            names = [key.removeprefix("index-") for key in arrays if key.startswith("index-")]
            hashes = {name: arrays[f"hashes-{name}"] for name in names}
            indices = {name: str(arrays[f"index-{name}"]) for name in names}
            sums = Sums(len(arrays["image_sum"]))
            sums.images = int(arrays["images"])
            sums.image_sum, sums.outer = arrays["image_sum"], arrays["outer"]
        found, file = Aggregates(sums, hashes), io.BytesIO()
        found.write(file, indices)
    except Exception:  # NumPy's reader raises anything on a damaged file
        return None
    are_hashes = all(one.ndim == 2 and one.shape[1] == HASH_BYTES for one in hashes.values())
    return (found, indices) if are_hashes and file.getvalue() == content else None
