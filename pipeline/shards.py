"""One shard: a plain WebDataset tar, DALI's index of it, and our rows about its samples."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import webdataset
from isal import isal_zlib

from pipeline.files import sealed, sha256
from pipeline.index import INDEX_DTYPE, Index, sample_key
from pipeline.manifest import Shard
from pipeline.picture import ENDINGS, Encoding


def shard_name(split: str, number: int) -> str:
    """Name of a tar: `train-000000.tar`."""
    return f"{split}-{number:06d}.tar"


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
