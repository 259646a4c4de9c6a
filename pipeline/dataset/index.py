"""`SPLIT.index.npy`: shard, label, byte range and CRC-32 of each sample of a split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.dataset.jpeg_header import MAX_BYTES, MAX_PIXELS
from pipeline.dataset.manifest import Manifest, tables_folder
from pipeline.tools.errors import DamagedFile, refuse_forbidden, summarize_error
from pipeline.tools.files import atomic_write, sha256

INDEX_DTYPE = np.dtype(
    [("shard", "<u4"), ("label", "<i4"), ("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")]
)
"""A row of `SPLIT.index.npy`, 24 bytes: shard number, label, byte range in the tar, and zlib's
CRC-32 of those bytes. They are a whole JPEG, or the pixels of a raw image (uint8 [256, 256, 3])
without the header of their `.npy`. Row i describes sample i of the split."""

SIZED_DTYPE = np.dtype([*INDEX_DTYPE.descr, ("width", "<u2"), ("height", "<u2")])
"""A row where images differ in size, 28 bytes: their width and height in pixels besides, as they
are shown (an EXIF orientation is applied)."""

Index = npt.NDArray[np.void]

MOST_IMAGE_BYTES = 1 << 24
"""Bytes of a stored image; 256x256 pixels never come near. Larger ones may have more."""
BLOCK = 1 << 18
"""Rows that are checked at a time."""


def index_name(split: str) -> str:
    """Return the name of the index file of a split."""
    return f"{split}.index.npy"


def index_dtype(manifest: Manifest) -> np.dtype[np.void]:
    """Return the type of the index rows of a data set."""
    return INDEX_DTYPE if manifest.side else SIZED_DTYPE


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


def load_index(data: Path, name: str, manifest: Manifest) -> Index:
    """Map `SPLIT.index.npy` into memory, after comparing it with its hash, and check every row.

    Training takes labels and places from it alone, so all of it is checked each time.

    Raises:
        DamagedFile: it is missing, damaged, that of another data set, or has a row that cannot be.
        SetupError: it may not be read.
    """
    rows, shards = map_index(data, name, manifest), manifest.splits[name].shards
    path = _locate_index(data, name, manifest)
    ends = np.cumsum([shard.samples for shard in shards])
    sizes = np.array([shard.bytes for shard in shards], np.uint64)
    counts = np.zeros(len(shards), np.int64)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        if manifest.number > 1:  # a sample that was replaced lies in a later shard
            numbers = block["shard"].clip(max=len(shards) - 1).astype(np.int64)
        else:
            numbers = _expect_shards(ends, start, start + len(block))
        for place, fault in find_row_faults(block, numbers, sizes[numbers], manifest):
            raise DamagedFile(path, f"sample {start + place}: {fault}")
        counts += np.bincount(numbers, minlength=len(shards))
    for shard, count in zip(shards, counts.tolist(), strict=True):
        if count != shard.samples:
            counted = f"the manifest counts {shard.samples:,}"
            raise DamagedFile(path, f"it has {count:,} samples in {shard.name}, {counted}")
    return rows


def _expect_shards(ends: npt.NDArray[np.int64], start: int, stop: int) -> npt.NDArray[np.int64]:
    """Return the numbers of the shards of samples `start` to `stop`, one shard after the other."""
    first, last = np.searchsorted(ends, [start, stop - 1], side="right")
    inside = ends[first : last + 1].clip(max=stop)
    return np.repeat(np.arange(first, last + 1), np.diff(inside, prepend=start))


def _locate_index(data: Path, name: str, manifest: Manifest) -> Path:
    return tables_folder(data, manifest) / index_name(name)


def map_index(data: Path, name: str, manifest: Manifest) -> Index:
    """Do as `load_index`, but leave its rows to `find_row_faults`.

    Raises:
        DamagedFile: it is missing, damaged, or that of another data set.
        SetupError: it may not be read.
    """
    path, split = _locate_index(data, name, manifest), manifest.splits[name]
    try:
        is_known = sha256(path) == split.index_sha256
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds for a damaged header
        refuse_forbidden(error)
        raise DamagedFile(path, summarize_error(error)) from error
    # NumPy opens an archive of arrays, too.
    fits = isinstance(rows, np.ndarray) and rows.dtype == index_dtype(manifest) and rows.ndim == 1
    if not is_known or not fits:
        raise DamagedFile(path, "it is not the index that was built")
    if len(rows) != split.samples:
        counted = f"{split.samples:,} samples that the manifest counts"
        raise DamagedFile(path, f"it is no index of the {counted}")
    return np.asarray(rows)


def find_row_faults(
    rows: Index,
    numbers: npt.NDArray[np.int64] | int,
    ends: npt.NDArray[np.uint64] | int,
    manifest: Manifest,
) -> Iterator[tuple[int, str]]:
    """Yield place and fault of each row that cannot be, whatever the bytes of its shard.

    Args:
        rows: [n] of the data set's `index_dtype`.
        numbers: of the shard in which each row should be, from 0; or one for all.
        ends: size of this shard in bytes.
        manifest: of the data set; its index may be damaged, `rows` are of the right type.
    """
    classes, side = len(manifest.classes), manifest.side
    offsets, sizes, ends = rows["offset"], rows["size"], np.asarray(ends, np.uint64)
    smallest, largest = 1, MAX_BYTES
    if side is not None:
        raw = manifest.encoding == "raw"
        smallest = 3 * side**2 if raw else 1
        largest = smallest if raw else max(MOST_IMAGE_BYTES, 4 * side**2)
    first, last = (0, classes - 1) if classes else (-1, -1)
    wrong = (rows["shard"] != numbers) | (rows["label"] < first) | (rows["label"] > last)
    wrong |= (sizes < smallest) | (sizes > largest)
    # Offset and size may add up to more than 64 bits hold.
    wrong |= (offsets > ends) | (sizes > ends - np.minimum(offsets, ends))
    if side is None:
        widths, heights = rows["width"], rows["height"]
        shorter = np.minimum(widths, heights)
        wrong |= widths.astype(np.uint32) * heights > MAX_PIXELS
        wrong |= (shorter != manifest.image_size) if manifest.image_size else (shorter < 1)
    for place in np.flatnonzero(wrong).tolist():
        shard, label, offset, size, _, *sides = rows[place].tolist()
        if shard != np.broadcast_to(numbers, len(rows))[place]:
            yield place, f"the index has it in shard {shard}"
        elif not first <= label <= last:
            known = f"outside the classes, 0 to {last}" if classes else "not -1, in a set without"
            yield place, f"its label {label} is {known}"
        elif offset + size > int(np.broadcast_to(ends, len(rows))[place]):
            yield place, "the shard ends before it does"
        elif not smallest <= size <= largest:
            yield place, f"its image has {size:,} bytes"
        else:
            yield place, f"its image has {sides[0]}x{sides[1]} pixels"
