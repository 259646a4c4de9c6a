"""Tables beside the index of a split: names, keys, and the other members of each sample.

SPLIT.names.txt               original file name of each image, relative to its source
SPLIT.keys.txt                WebDataset key of each sample, where another tool chose it
SPLIT.field-json.index.npy    byte range and CRC-32 of the `.json` of each sample

A text table has a line for each sample, in the order of ids, and a `SPLIT.names.index.npy` beside
it has the end of each line, so that one is found without reading the others. A split has the tables
that its manifest lists.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from pipeline.dataset.samples import Read, Sample, SampleFile, UnfitSample, is_field
from pipeline.dataset.tar import ENCODING
from pipeline.tools.errors import DamagedFile, refuse_forbidden, summarize_error
from pipeline.tools.files import atomic_write, sha256

TextKind = Literal["names", "keys"]
TEXT_KINDS: tuple[TextKind, ...] = ("names", "keys")

MEMBER_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")])
"""A row of the table of a field, 16 bytes: byte range in the sample's shard, and zlib's CRC-32 of
those bytes. Row i is that of sample i."""

Members = npt.NDArray[np.void]

MOST_MEMBER_BYTES = 1 << 26
"""Size limit of a member besides the image, in bytes: a batch is in memory at once."""
INDEX_ENDING = ".index.npy"
"""Ending of a table of numbers, by which a build that reads this folder knows that it is one."""
LINES = 1 << 16
"""Lines of a table that are read or written at a time."""
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_UNESCAPED = re.compile(r"[\\\n\r]")


def field_table(field: str) -> str:
    """Return the name of the table of a field, without its split: `field-json.index.npy`."""
    return f"field-{field}{INDEX_ENDING}"


def list_fields(tables: Iterable[str]) -> list[str]:
    """Return the fields among the names of a split's tables."""
    fields = (name.removeprefix("field-") for name in tables if name.startswith("field-"))
    return [name.removesuffix(INDEX_ENDING) for name in fields]


def text_files(kind: TextKind) -> tuple[str, str]:
    """Return the names of the two files of a text table, without their split."""
    return f"{kind}.txt", f"{kind}{INDEX_ENDING}"


def is_table(name: object) -> bool:
    """Return whether a manifest may list a table of this name."""
    if name in [file for kind in TEXT_KINDS for file in text_files(kind)]:
        return True
    return isinstance(name, str) and name in map(field_table, filter(is_field, list_fields([name])))


def escape_line(text: str) -> bytes:
    """Return a text as one line of a table, with its end: UTF-8, bytes of no text as they are."""
    return _UNESCAPED.sub(lambda found: _ESCAPES[found[0]], text).encode(*ENCODING) + b"\n"


def unescape_line(line: bytes) -> str:
    """Return the text that `escape_line` wrote."""
    text, ends = line[:-1].decode(*ENCODING), {"n": "\n", "r": "\r"}
    return _ESCAPED.sub(lambda found: ends.get(found[1], found[1]), text)


def save_texts(
    folder: Path, split: str, kind: TextKind, count: int, lines: Iterable[bytes]
) -> dict[str, str]:
    """Write a text table; memory does not grow with it.

    Args:
        folder: where the two files are written.
        split: name of the split.
        kind: of the table.
        count: number of lines, N.
        lines: what `escape_line` returns for each sample.

    Returns:
        SHA-256 of each file by its name without the split, as a manifest lists them.
    """
    names = text_files(kind)
    left, end = iter(lines), 0
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_write(folder / f"{split}.{name}")) for name in names]
        digests = [hashlib.sha256(), hashlib.sha256()]
        write_npy_header(files[1], digests[1], np.dtype("<u8"), count)
        while block := list(islice(left, LINES)):
            ends = np.cumsum([len(line) for line in block], dtype="<u8") + np.uint64(end)
            end = int(ends[-1])
            for file, digest, data in zip(
                files, digests, (b"".join(block), ends.tobytes()), strict=True
            ):
                file.write(data)
                digest.update(data)
    return {name: digest.hexdigest() for name, digest in zip(names, digests, strict=True)}


def write_npy_header(file: IO[bytes], digest: Any, dtype: np.dtype[Any], count: int) -> None:
    """Write the header of a NumPy file of `count` such values, as `np.save` does, and hash it."""
    header = np.lib.format
    description = {"descr": header.dtype_to_descr(dtype), "fortran_order": False}
    out = _Tee(file, digest)
    header.write_array_header_1_0(out, {**description, "shape": (count,)})


class _Tee:
    """A file whose bytes are hashed as they are written."""

    def __init__(self, file: IO[bytes], digest: Any) -> None:
        self._file, self._digest = file, digest

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._file.write(data)


class TextTable:
    """A text table, mapped: opening it reads no line, and a line costs a page or two."""

    def __init__(self, folder: Path, split: str, kind: TextKind, count: int) -> None:
        """Map the two files; whether they have their SHA-256 is left to `pipeline.verify`.

        Args:
            folder: of the data set.
            split: name of the split.
            kind: of the table.
            count: number of samples, N.

        Raises:
            DamagedFile: a file is missing, or they do not fit together.
            SetupError: one may not be read.
        """
        self._path = folder / f"{split}.{kind}.txt"
        self._ends = _map_rows(folder / f"{split}.{text_files(kind)[1]}", np.dtype("<u8"), count)
        try:
            with self._path.open("rb") as file:
                self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            refuse_forbidden(error)
            raise DamagedFile(self._path, summarize_error(error)) from error
        if int(self._ends[-1]) != len(self._text):
            raise DamagedFile(self._path, f"its {count:,} lines do not end where they should")

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        """Yield the texts of all samples, in the order of ids; raises as `read`."""
        for start in range(0, len(self), LINES):
            yield from self.read(np.arange(start, min(start + LINES, len(self))))

    def read(self, ids: npt.NDArray[np.int64]) -> list[str]:
        """Return the texts of samples `ids` (int64 [b]).

        Raises:
            DamagedFile: one is no line.
        """
        starts = np.where(ids > 0, self._ends[np.maximum(ids, 1) - 1], 0)
        lines = []
        for sample, start, end in zip(ids, starts.tolist(), self._ends[ids].tolist(), strict=True):
            line = self._text[start:end]
            if line.find(b"\n") != end - start - 1:
                raise DamagedFile(self._path, f"line {sample + 1} is not where it should be")
            lines.append(unescape_line(line))
        return lines

    def check(self) -> None:
        """Check that every line is where it should be.

        Raises:
            DamagedFile: one is not.
        """
        for _ in self:
            pass

    def find(self, text: str) -> Iterator[int]:
        """Yield the samples that have this text, in the order of ids; reads the file through."""
        try:
            line = escape_line(text)
        except UnicodeEncodeError:  # half a character: no file has it
            return
        place = 0 if self._text[: len(line)] == line else self._next(line, 0)
        while place >= 0:
            yield int(np.searchsorted(self._ends, place, side="right"))
            place = self._next(line, place + len(line) - 1)

    def _next(self, line: bytes, start: int) -> int:
        """Return where this line begins, behind an end of line at or after `start`; -1: nowhere."""
        found = self._text.find(b"\n" + line, start)
        return found + 1 if found >= 0 else -1


def find_member(sample: Sample, field: str) -> SampleFile:
    """Return the file of a sample whose ending is `field`.

    Raises:
        UnfitSample: it has no such member, or a large one.
    """
    part = sample.find_member(field)
    if part.size > MOST_MEMBER_BYTES:
        raise UnfitSample(describe_large(field, part.size))
    return part


def describe_large(field: str, size: int) -> str:
    """Return why a member of so many bytes is not taken."""
    return f"its .{field} has {size:,} bytes, {MOST_MEMBER_BYTES:,} are taken at most"


def locate_member(sample: Sample, field: str, read: Read) -> tuple[int, int, int]:
    """Return offset, size and CRC-32 of a member of a sample: a row of the table.

    Args:
        sample: as it lies in its tar.
        field: ending of the member.
        read: reads the tar.

    Raises:
        UnfitSample: it has no such member, or a large one.
        OSError: it cannot be read.
    """
    part = find_member(sample, field)
    return part.offset, part.size, isal_zlib.crc32(read(part.offset, part.size))


def save_members(folder: Path, split: str, field: str, rows: Members) -> dict[str, str]:
    """Write the table of a field, `MEMBER_DTYPE` [N]; returns as `save_texts`."""
    path = folder / f"{split}.{field_table(field)}"
    with atomic_write(path) as file:
        np.save(file, rows, allow_pickle=False)
    return {field_table(field): sha256(path)}


def save_tables(
    folder: Path, split: str, keys: Sequence[bytes], members: Sequence[Mapping[str, Members]]
) -> dict[str, str]:
    """Write the keys of a split, and a table of each field; returns as `save_texts`.

    Args:
        folder: where they are written.
        split: name of the split.
        keys: lines of the table of keys, those of each shard joined.
        members: rows of each field, of each shard.
    """
    lines = chain.from_iterable(one.splitlines(keepends=True) for one in keys)
    count = sum(one.count(b"\n") for one in keys)
    tables = save_texts(folder, split, "keys", count, lines)
    for field in members[0]:
        rows = np.concatenate([one[field] for one in members])
        tables |= save_members(folder, split, field, rows)
    return tables


def map_members(folder: Path, split: str, field: str, count: int, digest: str | None) -> Members:
    """Map the table of a field, after comparing it with its hash; None: that was done before.

    Raises:
        DamagedFile: it is missing, damaged, or of another number of samples.
        SetupError: it may not be read.
    """
    path = folder / f"{split}.{field_table(field)}"
    rows = _map_rows(path, MEMBER_DTYPE, count)
    if digest is not None and sha256(path) != digest:
        raise DamagedFile(path, "it is not the table that was written")
    return rows


def find_member_faults(rows: Members, ends: npt.NDArray[np.uint64] | int) -> list[int]:
    """Return the places of rows that lie outside of their shards, which end at `ends` bytes."""
    offsets, sizes, ends = rows["offset"], rows["size"], np.asarray(ends, np.uint64)
    wrong = (sizes > MOST_MEMBER_BYTES) | (offsets > ends)
    wrong |= sizes > ends - np.minimum(offsets, ends)
    return np.flatnonzero(wrong).tolist()


def _map_rows(path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds for a damaged header
        refuse_forbidden(error)
        raise DamagedFile(path, summarize_error(error)) from error
    fits = isinstance(rows, np.ndarray) and rows.dtype == dtype and rows.ndim == 1
    if not fits or len(rows) != count:
        raise DamagedFile(path, f"it is no table of {count:,} samples")
    return np.asarray(rows)


def choose_sample(key: str, found: Sequence[int], split: str) -> int:
    """Return the only sample that was found by a key.

    Raises:
        KeyError: there is none, or several; the message is one line.
    """
    if len(found) == 1:
        return found[0]
    if found:
        raise KeyError(f"split {split} has {key!r} more than once; give an id, as {found[:2]}")
    raise KeyError(f"split {split} has no sample {key!r:.200}")
