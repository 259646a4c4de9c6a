"""Shard files: the tar that is written, and the `.idx` that DALI reads beside it.

An `.idx` lists where each file of each sample of a tar lies, as DALI's `wds2idx` writes it:

v1.2 2
cls 512 1 000.cls jpg 1536 1000 000.jpg
cls 3072 1 001.cls jpg 4096 990 001.jpg
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, NamedTuple

import numpy as np
from isal import isal_zlib

from pipeline.dataset.images import ENDINGS, Encoding, Size, npy_header_size
from pipeline.dataset.index import INDEX_DTYPE, SIZED_DTYPE, Index, sample_key
from pipeline.dataset.manifest import Shard
from pipeline.dataset.members import MEMBER_DTYPE, Members
from pipeline.dataset.samples import Sample

_BLANK = re.compile(r"\s")
_COLUMNS = {"v1.1": 3, "v1.2": 4}
"""Words for each file, by version; the fourth is its name."""

Places = list[tuple[str, int, int]]
"""Ending, offset and size in bytes of each file of a sample."""
RECORD = 512
"""Bytes of a tar header; contents are padded to a multiple of it."""


def format_idx(samples: Sequence[Sample]) -> bytes:
    """Return the `.idx` that lists these samples."""
    lines = [f"v1.2 {len(samples)}"]
    for sample in samples:
        # Blanks separate the words; in a name they become underscores, as DALI ignores the name.
        words = (
            f"{_word(part.ending)} {part.offset} {part.size} {_word(part.name)}"
            for part in sample.parts
        )
        lines.append(" ".join(words))
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def locate_files(samples: Sequence[Sample]) -> list[Places]:
    """Return what `parse_idx` finds in `format_idx(samples)`."""
    return [[(_word(p.ending), p.offset, p.size) for p in sample.parts] for sample in samples]


def parse_idx(content: bytes) -> list[Places]:
    """Return the places that an `.idx` lists, for each sample.

    Raises:
        ValueError: the content is no `.idx`; the message says why.
    """
    head, *lines = content.decode("utf-8", "surrogateescape").splitlines() or [""]
    version, _, count = head.partition(" ")
    if version not in _COLUMNS:
        raise ValueError("it does not begin with v1.1 or v1.2")
    if count.strip() != str(len(lines)):
        raise ValueError(f"it has {len(lines)} lines, and says {count.strip()!r}")
    columns, found = _COLUMNS[version], list[Places]()
    for number, line in enumerate(lines, 2):
        words = line.split()
        groups = [words[start : start + columns] for start in range(0, len(words), columns)]
        try:
            found.append([(group[0], int(group[1]), int(group[2])) for group in groups])
        except (IndexError, ValueError) as error:
            raise ValueError(f"line {number} is not of endings, offsets and sizes") from error
    return found


def find_idx_fault(content: bytes, name: str, samples: Sequence[Sample]) -> str | None:
    """Return what is wrong with the `.idx` of a shard of this name with these samples, or None."""
    try:
        known = {tuple(one) for one in parse_idx(content)}
    except ValueError as error:
        return f"is no index of DALI's ({error})"
    for one in locate_files(samples):
        if tuple(one) not in known:
            return f"is not of {name}, where a sample begins at byte {one[0][1]:,}"
    return None


def _word(text: str) -> str:
    return _BLANK.sub("_", text)


def shard_name(split: str, number: int) -> str:
    """Return the name of a shard's tar: `train-000000.tar`."""
    return f"{split}-{number:06d}.tar"


def shard_number(name: str) -> int:
    """Return the number of a shard that a build named, -1 of another."""
    found = re.fullmatch(r".+-([0-9]{6,})\.tar", name)
    return int(found[1]) if found else -1


@dataclass(frozen=True)
class WrittenTar:
    """Result of `write_tar`."""

    rows: Index
    """`INDEX_DTYPE` [n], or `SIZED_DTYPE` if sizes were given: one row for each sample."""
    listing: bytes
    """Content of the tar's `.idx`."""
    bytes: int
    sha256: str
    members: dict[str, Members] = field(default_factory=dict)
    """Rows of each field, `MEMBER_DTYPE` [n]."""


class SampleContent(NamedTuple):
    """A sample to write."""

    image: bytes
    """A JPEG, or a `.npy` when raw."""
    label: int
    """0.., or -1 without classes: then it has no `.cls`."""
    members: Mapping[str, bytes] = {}
    """Content of each field."""


def write_tar(
    file: IO[bytes],
    number: int,
    samples: Iterable[SampleContent],
    encoding: Encoding,
    sizes: Sequence[Size] | None = None,
) -> WrittenTar:
    """Write a tar of samples in one pass; the same samples give the same bytes.

    The files of a sample are in the order of their endings.

    Args:
        file: gets the bytes; only its `write` is called.
        number: of the shard in its split, from 0.
        samples: content of each sample, in stored order; all have the same fields.
        encoding: of the image files.
        sizes: height and width of each image, where the index is to have them.
    """
    import webdataset  # takes half a second: it imports torch, which readers do not need

    out = _Hashed(file)
    writer = webdataset.TarWriter(out, encoder=False, mtime=0)
    places = _Places(number, encoding)
    try:
        for sample in samples:
            writer.write(places.add(sample))
    except BaseException:
        out.closed_early = True
        raise
    finally:
        writer.close()
    return WrittenTar(
        rows=places.build_index(sizes),
        listing="".join([f"v1.2 {len(places.lines)}\n", *places.lines]).encode(),
        bytes=out.size,
        sha256=out.digest.hexdigest(),
        members={name: np.array(rows, MEMBER_DTYPE) for name, rows in places.members.items()},
    )


class _Places:
    """Places that the files of samples will have in a tar, one sample after the other."""

    def __init__(self, number: int, encoding: Encoding) -> None:
        self._number, self._encoding = number, encoding
        self._end = 0
        self._rows: list[tuple[int, int, int, int, int]] = []
        """Fields of `INDEX_DTYPE`, of each sample."""
        self.members: dict[str, list[tuple[int, int, int]]] = {}
        """Fields of `MEMBER_DTYPE`, of each sample, by the name of the field."""
        self.lines: list[str] = []
        """Lines of the tar's `.idx`."""

    def add(self, sample: SampleContent) -> dict[str, str | bytes]:
        """Note a sample's places; return the sample as webdataset's writer takes it."""
        image, label, others = sample
        key, ending = sample_key(self._number, len(self._rows)), ENDINGS[self._encoding]
        files: dict[str, bytes] = {**others, ending: image}
        if label >= 0:
            files["cls"] = str(label).encode()
        starts = {}
        for name in sorted(files):  # webdataset's order
            starts[name] = self._end + RECORD
            self._end += RECORD + _pad(len(files[name]))
        # The index points at the pixels of a raw image, behind the header of its `.npy`.
        skip = npy_header_size(image) if self._encoding == "raw" else 0
        crc = isal_zlib.crc32(memoryview(image)[skip:])  # zlib's, several times faster
        self._rows.append((self._number, label, starts[ending] + skip, len(image) - skip, crc))
        for name, content in others.items():
            row = starts[name], len(content), isal_zlib.crc32(content)
            self.members.setdefault(name, []).append(row)
        words = (f"{name} {at} {len(files[name])} {key}.{name}" for name, at in starts.items())
        self.lines.append(" ".join(words) + "\n")
        return {"__key__": key, **files}

    def build_index(self, sizes: Sequence[Size] | None) -> Index:
        """Return the rows of all samples, with the sizes of their images if there are some."""
        if sizes is None:
            return np.array(self._rows, INDEX_DTYPE)
        pairs = zip(self._rows, sizes, strict=True)
        return np.array([(*row, width, height) for row, (height, width) in pairs], SIZED_DTYPE)


def to_shard(name: str, written: WrittenTar) -> Shard:
    """Return the manifest's entry of a shard."""
    return Shard(
        name=name,
        samples=len(written.rows),
        bytes=written.bytes,
        sha256=written.sha256,
        idx_sha256=hashlib.sha256(written.listing).hexdigest(),
    )


class _Hashed(io.RawIOBase):
    """Passes written bytes on to a file, and counts and hashes them."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest, self.size = file, hashlib.sha256(), 0
        self.closed_early = False
        """True once the tar was given up, so that its end need not be written."""

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.closed_early:
            return len(data)
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)


def _pad(size: int) -> int:
    """Return the bytes that contents of `size` bytes take in a tar."""
    return -(-size // RECORD) * RECORD
