"""One shard: a plain WebDataset tar, DALI's index of it, and our rows about its samples.

DALI's `.idx`: where each file of each sample of a tar lies, as its `wds2idx` writes it.

v1.2 2
cls 512 1 000.cls jpg 1536 1000 000.jpg
cls 3072 1 001.cls jpg 4096 990 001.jpg
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from isal import isal_zlib

from pipeline.dataset.images import ENDINGS, SIZE, Encoding
from pipeline.dataset.index import INDEX_DTYPE, Index, sample_key
from pipeline.dataset.manifest import Shard
from pipeline.dataset.samples import Sample
from pipeline.tools.files import atomic_write

_COLUMNS = {"v1.1": 3, "v1.2": 4}
"""Words a file; the fourth is its name."""

Places = list[tuple[str, int, int]]
"""Ending, offset and size of the files of a sample."""


def format_idx(samples: Sequence[Sample]) -> bytes:
    """Return the `.idx` that lists these samples."""
    lines = [f"v1.2 {len(samples)}"]
    for sample in samples:
        # Words are told apart by blanks; of a name with some, DALI needs no more than a word.
        words = (
            f"{_word(part.ending)} {part.offset} {part.size} {_word(part.name)}"
            for part in sample.parts
        )
        lines.append(" ".join(words))
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def locate_files(samples: Sequence[Sample]) -> list[Places]:
    """Return what `read_idx` finds in `idx_text(samples)`."""
    return [[(_word(p.ending), p.offset, p.size) for p in sample.parts] for sample in samples]


def parse_idx(content: bytes) -> list[Places]:
    """Return what an `.idx` lists.

    Raises:
        ValueError: it is none; the message says why.
    """
    head, *lines = content.decode("utf-8", "surrogateescape").splitlines() or [""]
    version, _, count = head.partition(" ")
    if version not in _COLUMNS:
        raise ValueError("it does not begin with v1.1 or v1.2")
    if count.strip() != str(len(lines)):
        raise ValueError(f"it has {len(lines)} lines, and says {count.strip()!r}")
    return [_places(line.split(), _COLUMNS[version], number) for number, line in enumerate(lines)]


def _places(words: list[str], columns: int, number: int) -> Places:
    groups = [words[start : start + columns] for start in range(0, len(words), columns)]
    try:
        return [(group[0], int(group[1]), int(group[2])) for group in groups]
    except (IndexError, ValueError) as error:
        raise ValueError(f"line {number + 2} is not of endings, offsets and sizes") from error


def _word(text: str) -> str:
    return re.sub(r"\s", "_", text)


RECORD = 512
"""Bytes of a tar's header, and what contents are padded to."""


def shard_name(split: str, number: int) -> str:
    """Name of a tar: `train-000000.tar`."""
    return f"{split}-{number:06d}.tar"


@dataclass(frozen=True)
class WrittenTar:
    """What `write_tar` wrote."""

    rows: Index
    """`INDEX_DTYPE` rows, one a sample."""
    listing: bytes
    """The text of DALI's `wds2idx` for this tar."""
    bytes: int
    sha256: str


def write_tar(
    file: IO[bytes], number: int, samples: Iterable[tuple[bytes, int]], encoding: Encoding
) -> WrittenTar:
    """Write a tar of samples, byte for byte the same for the same samples, in one pass.

    Args:
        file: where to; only `write` is called.
        number: which shard of the split this is.
        samples: the file (a JPEG, or a `.npy` when raw) and label (0..) of each sample, in stored
            order.
        encoding: what those files are.
    """
    import webdataset  # half a second: it brings torch, which reading does without

    out = _Hashed(file)
    writer = webdataset.TarWriter(out, encoder=False, mtime=0)
    ending = ENDINGS[encoding]
    rows: list[tuple[int, int, int, int, int]] = []
    lines: list[str] = []
    place = 0
    try:
        for picture, label in samples:
            key, text = sample_key(number, len(rows)), str(label).encode()
            writer.write({"__key__": key, "cls": text, ending: picture})
            cls, start = place + RECORD, place + 2 * RECORD + _padded(len(text))
            place = start + _padded(len(picture))
            # Of a raw image only the pixels are fed to the graph, not the header of their `.npy`.
            skip = len(picture) - SIZE * SIZE * 3 if encoding == "raw" else 0
            crc = isal_zlib.crc32(memoryview(picture)[skip:])  # zlib's, several times faster
            rows.append((number, label, start + skip, len(picture) - skip, crc))
            lines.append(
                f"cls {cls} {len(text)} {key}.cls {ending} {start} {len(picture)} {key}.{ending}\n"
            )
    except BaseException:
        out.closed_early = True
        raise
    finally:
        writer.close()
    return WrittenTar(
        rows=np.array(rows, INDEX_DTYPE),
        listing="".join([f"v1.2 {len(rows)}\n", *lines]).encode(),
        bytes=out.size,
        sha256=out.digest.hexdigest(),
    )


def write_shard(
    data: Path,
    split: str,
    number: int,
    samples: Iterable[tuple[bytes, int]],
    encoding: Encoding = "jpeg",
) -> tuple[Shard, Index]:
    """Write one tar with its `.idx` into a folder, both sealed; arguments as of `write_tar`.

    Returns:
        The shard's row for the manifest, and its `INDEX_DTYPE` rows.
    """
    path = data / shard_name(split, number)
    with atomic_write(path) as file:
        written = write_tar(file, number, samples, encoding)
    with atomic_write(path.with_suffix(".idx")) as file:
        file.write(written.listing)
    return to_shard(path.name, written), written.rows


def to_shard(name: str, written: WrittenTar) -> Shard:
    """Return the manifest's row of a shard."""
    return Shard(
        name=name,
        samples=len(written.rows),
        bytes=written.bytes,
        sha256=written.sha256,
        idx_sha256=hashlib.sha256(written.listing).hexdigest(),
    )


class _Hashed(io.RawIOBase):
    """Passes on what is written, counted and hashed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest, self.size = file, hashlib.sha256(), 0
        self.closed_early = False
        """Whether the file will not be kept, so that what the tar ends with need not be written."""

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.closed_early:
            return len(data)
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)


def _padded(size: int) -> int:
    return -(-size // RECORD) * RECORD
