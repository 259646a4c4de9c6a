"""Images that a data set has already, or had: what is added to it does not pack them again.

An image is known by size and CRC-32 of its stored bytes, and by a perceptual hash near its own: the
first two alone would meet by chance where millions are compared with millions.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from pipeline.dataset.images import npy_header_size
from pipeline.packing.duplicates import NEAR
from pipeline.packing.hamming import Hashes
from pipeline.remote.target import WORK, FolderTarget, Target

PRESENT = "it is in the data set already"
"""Reason for which an image is skipped, and not counted as a reject."""
WITHDRAWN = "it was withdrawn from the data set"
_KEYS, _HASHES, _WITHDRAWN = (f"{WORK}/known-{n}.npy" for n in ("keys", "hashes", "withdrawn"))

Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class KnownImages:
    """The known images of a target, in files of its work folder that `save_known` wrote."""

    mark: str
    """Identity of the version that knows them, by which a process knows its copies."""
    is_raw: bool
    """True if images are stored as pixels, whose CRC-32 is that without the header."""

    def find(self, target: Target, data: bytes, image_hash: npt.NDArray[np.uint8]) -> str | None:
        """Return why an image is not packed, `PRESENT` or `WITHDRAWN`; None for a new one.

        Args:
            target: where the files lie.
            data: the image as it would be stored.
            image_hash: uint8 [32], its perceptual hash.
        """
        body = memoryview(data)[npy_header_size(data) if self.is_raw else 0 :]
        key = content_keys(len(body), isal_zlib.crc32(body))
        keys, hashes, withdrawn = _open(target, self.mark)
        place = int(np.searchsorted(withdrawn, key))
        if place < len(withdrawn) and withdrawn[place] == key:
            return WITHDRAWN
        place = int(np.searchsorted(keys, key))
        while place < len(keys) and keys[place] == key:
            if int(np.bitwise_count(hashes[place] ^ image_hash).sum()) <= NEAR:
                return PRESENT
            place += 1
        return None


def content_keys(sizes: npt.ArrayLike, crcs: npt.ArrayLike) -> Keys:
    """Return size and CRC-32 of stored images as one number each."""
    joined: Keys = np.asarray(sizes, np.uint64) << np.uint64(32) | np.asarray(crcs, np.uint64)
    return joined


def save_known(target: Target, keys: Keys, hashes: Hashes, withdrawn: Keys) -> None:
    """Write the files of `KnownImages`.

    Args:
        target: the data set.
        keys: `content_keys` of the images that it has.
        hashes: their perceptual hashes, in the same order.
        withdrawn: `content_keys` of those that were withdrawn.
    """
    order = np.argsort(keys, kind="stable")
    gone = np.sort(withdrawn)
    for name, array in ((_KEYS, keys[order]), (_HASHES, hashes[order]), (_WITHDRAWN, gone)):
        with target.create(name) as file:
            np.save(file, array)


_opened: dict[tuple[str, str], tuple[Keys, Hashes, Keys]] = {}
"""The files of one target, which a worker process opens once."""


def _open(target: Target, mark: str) -> tuple[Keys, Hashes, Keys]:
    def load(name: str) -> npt.NDArray[Any]:
        if isinstance(target, FolderTarget):
            found: npt.NDArray[Any] = np.load(target.path / name, mmap_mode="r")
            return found
        array: npt.NDArray[Any] = np.load(io.BytesIO(target.read(name)))
        return array

    if (target.address, mark) not in _opened:
        _opened.clear()
        _opened[target.address, mark] = load(_KEYS), load(_HASHES), load(_WITHDRAWN)
    return _opened[target.address, mark]
