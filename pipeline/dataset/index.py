"""Where each sample of a split lies: `SPLIT.index.npy`, a file that only Duet reads.

`python -m pipeline.index_shards DIR` gives shards of other tools such a file.
"""

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
"""A row of `SPLIT.index.npy`, 24 bytes: shard number, label, byte range in the tar, and the CRC-32
(zlib's) of those bytes: a whole JPEG, or the pixels of a raw image (uint8 [256, 256, 3]) without
the header of their `.npy`. Row i is sample i of the split."""

Index = npt.NDArray[np.void]


def index_name(split: str) -> str:
    """Name of the index file of a split."""
    return f"{split}.index.npy"


def sample_key(number: int, place: int) -> str:
    """WebDataset key of the sample at `place` of shard `number`: `000000_00000`."""
    return f"{number:06d}_{place:05d}"


def split_member_name(name: str) -> tuple[str, str]:
    """Return key and ending of a member; the key is empty where the name has no dot."""
    dot = name.find(".", name.rfind("/") + 1)
    return (name[:dot], name[dot + 1 :]) if dot >= 0 else ("", name)


def read_key_from_idx(path: Path, place: int) -> str | None:
    """Return the key of the sample at `place` of the shard with this `.idx`, if it can be had."""
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

    The labels stand in it and nowhere else that is read: they are checked every time.

    Raises:
        DataError: missing, damaged, or of another set.
    """
    path = data / index_name(name)
    try:
        known = sha256(path) == split.index_sha256
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of a damaged header, NumPy's reader raises what it pleases
        raise DataError(f"{path} cannot be read ({error}); {REBUILD}") from error
    if not known or rows.dtype != INDEX_DTYPE or len(rows) != split.samples:
        raise DataError(f"{path} is not the index that was built; {REBUILD}")
    return np.asarray(rows)
