"""`SPLIT.index.npy`: shard, label, byte range and CRC-32 of each sample of a split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.dataset.manifest import Split
from pipeline.tools.errors import REBUILD, DataError
from pipeline.tools.files import atomic_write, sha256

INDEX_DTYPE = np.dtype(
    [("shard", "<u4"), ("label", "<i4"), ("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")]
)
"""A row of `SPLIT.index.npy`, 24 bytes: shard number, label, byte range in the tar, and zlib's
CRC-32 of those bytes. They are a whole JPEG, or the pixels of a raw image (uint8 [256, 256, 3])
without the header of their `.npy`. Row i describes sample i of the split."""

Index = npt.NDArray[np.void]


def index_name(split: str) -> str:
    """Return the name of the index file of a split."""
    return f"{split}.index.npy"


def sample_key(number: int, place: int) -> str:
    """Return the WebDataset key of sample `place` of shard `number`: `000000_00000`."""
    return f"{number:06d}_{place:05d}"


def split_member_name(name: str) -> tuple[str, str]:
    """Return key and ending of a tar member; the key is empty if the name has no dot."""
    dot = name.find(".", name.rfind("/") + 1)
    return (name[:dot], name[dot + 1 :]) if dot >= 0 else ("", name)


def read_key_from_idx(path: Path, place: int) -> str | None:
    """Return the key of sample `place` of the shard with this `.idx`; None if it has none."""
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            line = next(line for number, line in enumerate(file) if number == place + 1)
    except (OSError, StopIteration):
        return None
    words = line.split()
    return split_member_name(words[3])[0] if len(words) >= 4 else None


def save_index(data: Path, split: str, rows: Index) -> str:
    """Write `SPLIT.index.npy` and return its SHA-256."""
    path = data / index_name(split)
    with atomic_write(path) as file:
        np.save(file, rows, allow_pickle=False)
    return sha256(path)


def load_index(data: Path, name: str, split: Split) -> Index:
    """Map `SPLIT.index.npy` into memory, after comparing it with its hash.

    Training takes the labels from it alone, so the hash is compared each time.

    Raises:
        DataError: it is missing, damaged, or that of another data set.
    """
    path = data / index_name(name)
    try:
        is_known = sha256(path) == split.index_sha256
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds for a damaged header
        raise DataError(f"{path} cannot be read ({error}); {REBUILD}") from error
    if not is_known or rows.dtype != INDEX_DTYPE or len(rows) != split.samples:
        raise DataError(f"{path} is not the index that was built; {REBUILD}")
    return np.asarray(rows)
