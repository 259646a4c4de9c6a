"""One shard: a plain WebDataset tar, DALI's index of it, and our rows about its samples."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import webdataset
from isal import isal_zlib

from pipeline.errors import REBUILD, DataError
from pipeline.files import sealed, sha256
from pipeline.manifest import Shard, Split
from pipeline.picture import ENDINGS, Encoding

INDEX_DTYPE = np.dtype(
    [("shard", "<u4"), ("label", "<i4"), ("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")]
)
"""A row of `SPLIT.index.npy`, 24 bytes: shard number, label, byte range in the tar, and the CRC-32
(zlib's) of those bytes: a whole JPEG, or the pixels of a raw picture (uint8 [256, 256, 3]) without
the header of their `.npy`. Row i is sample i of the split."""

Index = npt.NDArray[np.void]


def index_name(split: str) -> str:
    """Name of the index file of a split."""
    return f"{split}.index.npy"


def shard_name(split: str, number: int) -> str:
    """Name of a tar: `train-000000.tar`."""
    return f"{split}-{number:06d}.tar"


def sample_key(number: int, place: int) -> str:
    """WebDataset key of the sample at `place` of shard `number`: `000000_00000`."""
    return f"{number:06d}_{place:05d}"


def write_shard(
    data: Path,
    split: str,
    number: int,
    samples: Iterable[tuple[bytes, int]],
    encoding: Encoding = "jpeg",
) -> tuple[Shard, Index]:
    """Write one tar with its `.idx`, both sealed, byte for byte the same for the same samples.

    Args:
        data: the folder of the set.
        split: `train`, `val`.
        number: which shard of the split this is.
        samples: the file (a JPEG, or a `.npy` when raw) and label (0..) of each sample, in stored
            order.
        encoding: what those files are.

    Returns:
        The shard's row for the manifest, and its `INDEX_DTYPE` rows.
    """
    path = data / shard_name(split, number)
    labels: list[int] = []
    with sealed(path) as file:
        writer = webdataset.TarWriter(file, encoder=False, mtime=0)
        for place, (picture, label) in enumerate(samples):
            key = sample_key(number, place)
            writer.write({"__key__": key, "cls": str(label).encode(), ENDINGS[encoding]: picture})
            labels.append(label)
        writer.close()
    rows, listing = _index(path, number, labels, encoding)
    with sealed(path.with_suffix(".idx")) as file:
        file.write(listing.encode())
    shard = Shard(
        name=path.name,
        samples=len(rows),
        bytes=path.stat().st_size,
        sha256=sha256(path),
        idx_sha256=sha256(path.with_suffix(".idx")),
    )
    return shard, rows


def _index(path: Path, number: int, labels: list[int], encoding: Encoding) -> tuple[Index, str]:
    """Read a finished tar back: our rows, and the text of DALI's `wds2idx` for it."""
    rows = np.zeros(len(labels), INDEX_DTYPE)
    lines = [f"v1.2 {len(labels)}"]
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        members = tar.getmembers()
        for place, (cls, picture) in enumerate(zip(members[::2], members[1::2], strict=True)):
            lines.append(
                f"cls {cls.offset_data} {cls.size} {cls.name} "
                f"{ENDINGS[encoding]} {picture.offset_data} {picture.size} {picture.name}"
            )
            start, size = _payload(file, picture, encoding)
            file.seek(start)
            crc = isal_zlib.crc32(file.read(size))  # zlib's polynomial, several times faster
            rows[place] = (number, labels[place], start, size, crc)
    return rows, "\n".join(lines) + "\n"


def _payload(file: IO[bytes], picture: tarfile.TarInfo, encoding: Encoding) -> tuple[int, int]:
    """Return offset and size of what is fed to the graph: the JPEG, or the pixels of a `.npy`."""
    start = picture.offset_data
    if encoding == "raw":
        file.seek(start)
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    return start, picture.offset_data + picture.size - start


def save_index(data: Path, split: str, rows: Index) -> str:
    """Write `SPLIT.index.npy` and return its SHA-256."""
    path = data / index_name(split)
    with sealed(path) as file:
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
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); {REBUILD}") from error
    if not known or rows.dtype != INDEX_DTYPE or len(rows) != split.samples:
        raise DataError(f"{path} is not the index that was built; {REBUILD}")
    return np.asarray(rows)
