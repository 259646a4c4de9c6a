"""`Quarantine`: the list of damaged samples; `HeaderCheck`: finds JPEGs that would crash DALI;
`TrialDecoder`: decodes one image alone.

QUARANTINE.jsonl     one row a sample: split, sample, shard, key, reason
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from pipeline.dataset.images import SIZE, Size, Undecodable, check_header, read_exif_orientation
from pipeline.dataset.jpeg_header import PROGRESSIVE, JpegHeader
from pipeline.stream import operators as dali
from pipeline.stream.order import Ids
from pipeline.stream.shard_reader import Bytes, Damage
from pipeline.tools.errors import UsageError
from pipeline.tools.files import LockHang, NoLocks, flock
from pipeline.tools.jsonl import parse_rows

EOI = b"\xff\xd9"
HEADERS = 64
"""Largest number of headers remembered; with other headers each sample is tried once."""


class TrialDecoder:
    """Decodes one image at a time on the CPU, to find those that cannot be decoded.

    It judges for GPUs as well: what none of their decoders takes, DALI gives to libjpeg-turbo on
    the host in the end, which is what decodes here.
    """

    def __init__(self) -> None:
        self._pipe: dali.Pipeline | None = None

    def can_decode(self, image: Bytes, size: Size = (SIZE, SIZE)) -> bool:
        """Return whether a JPEG (uint8 [bytes]) decodes to pixels of this height and width."""
        if self._pipe is None:
            self._pipe = dali.Pipeline(batch_size=1, num_threads=1, prefetch_queue_depth=1)
            with self._pipe:
                jpeg = dali.fn.external_source(name="image", dtype=dali.types.UINT8, ndim=1)
                self._pipe.set_outputs(dali.fn.decoders.image(jpeg, output_type=dali.types.RGB))
            self._pipe.build()
        self._pipe.feed_input("image", [image])
        try:
            (pixels,) = self._pipe.run()
        except RuntimeError:
            self._pipe = None  # DALI calls it "no longer valid"
            return False
        return tuple(pixels[0].shape()) == (*size, 3)


class HeaderCheck:
    """Finds JPEGs whose headers DALI cannot parse, before they get into a batch.

    DALI 2.4 throws when it cannot parse one image of a batch, while its threads still write to the
    others' memory: often enough the process ends with a segmentation fault. An image alone is no
    danger. So a header that was not seen before is tried alone, with its image; all images from our
    packer have the same one, and comparing it costs next to nothing. (Scan data that cannot be
    decoded behind a good header is an ordinary error, which `Loader` handles when it occurs.)

    An image whose header says another size than the index, or a thousand scans, is not even tried.
    One that is progressive has tables of its own, and scans behind its header: it is tried once.

    Where images differ in size, so do their headers, and in JPEGs of other programs the tables too.
    Then headers are compared without sizes, tables and the segments that decoders ignore. One with
    damaged EXIF data, from which DALI may take another orientation than we do, is tried once.

    DALI decodes an image whose scan ends too early if only the crop lies before the end. An image
    that does not end as a JPEG does is tried as well, so that it is damaged in every crop or none.
    """

    def __init__(
        self,
        samples: int,
        read_sizes: Callable[[Ids], tuple[Ids, Ids]] | None = None,
        *,
        differ: bool = False,
    ) -> None:
        """Start without any header.

        Args:
            samples: number of samples of the split.
            read_sizes: returns heights and widths of samples, int64 [b] each; None: all are
                256x256.
            differ: True if sizes differ.
        """
        self._read_sizes, self._differ = read_sizes, differ
        self._passed = np.zeros(samples, bool)
        self._headers: set[bytes] = set()
        self._lengths: set[int] = set()
        self._trial = TrialDecoder()

    def find_undecodable(self, ids: Ids, images: list[Bytes]) -> list[int]:
        """Return the places in `ids` (int64 [b]) of JPEGs that must not go into a batch."""
        unknown = np.flatnonzero(~self._passed[ids])
        rows, columns = np.full((2, len(unknown)), SIZE)
        if self._read_sizes is not None and len(unknown):
            rows, columns = self._read_sizes(ids[unknown])
        sizes = zip(rows.tolist(), columns.tolist(), strict=True)
        found = [
            place
            for place, size in zip(unknown.tolist(), sizes, strict=True)
            if not self._is_decodable(images[place], size)
        ]
        self._passed[ids] = True
        self._passed[ids[found]] = False
        return found

    def _is_decodable(self, image: Bytes, size: Size) -> bool:
        ended = image[-2:].tobytes() == EOI
        if ended and any(image[:length].tobytes() in self._headers for length in self._lengths):
            return True
        data = image.tobytes()
        try:
            header = check_header(data, size)
        except Undecodable:
            return False
        repeats = ended and header is not None and header.process not in PROGRESSIVE
        kind = None
        if self._differ and repeats and header is not None:
            if not _has_size(header, size):
                return False
            kind = summarize_header(data, header)
        if kind is not None and kind in self._headers:
            return True
        if not self._trial.can_decode(image, size):
            return False
        if kind is not None:
            self._headers.add(kind)
        elif repeats and not self._differ and len(self._headers) < HEADERS:
            try:
                length = find_scan(image)
            except IndexError:  # not a JPEG, or an unusual one, that DALI can read
                return True
            self._headers.add(image[:length].tobytes())
            self._lengths.add(length)
        return True


def _has_size(header: JpegHeader, size: Size) -> bool:
    """Return whether a JPEG is so high and wide when it is turned by its EXIF orientation."""
    if not header.exif:
        return (header.height, header.width) == size
    try:
        turned = (read_exif_orientation(header.exif) or 1) >= 5
    except Undecodable:
        return True  # DALI tells
    return (header.height, header.width) == (size[::-1] if turned else size)


def summarize_header(data: bytes, header: JpegHeader) -> bytes | None:
    """Return a JPEG's header without its size, its tables and the segments that decoders ignore.

    None if it is not a plain sequence of segments (T.81, annex B), or its EXIF data are damaged.
    """
    if header.exif:
        try:
            read_exif_orientation(header.exif)
        except Undecodable:
            return None
    place, kept = 2, b""
    while data[place : place + 1] == b"\xff":
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        segment = data[place : place + 2 + length]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            kept += segment[:5] + segment[9:]
        elif marker in (0xDA, 0xEE):  # a scan; colours, as Adobe's programs write them
            kept += segment
        if marker == 0xDA:
            return kept
        place += len(segment)
    return None


def find_scan(image: Bytes) -> int:
    """Return the byte at which the first scan's data begin in a well-formed JPEG, uint8 [size].

    All bytes before are the header (ITU-T T.81, annex B); marker segments have their length.
    """
    place = 2
    while image[place + 1] != 0xDA:
        place += 2 + int(image[place + 2]) * 256 + int(image[place + 3])
    return place + 2 + int(image[place + 2]) * 256 + int(image[place + 3])


UNDECODABLE = "its bytes are as packed, but it cannot be decoded"


class Quarantine:
    """Samples of one split known to be damaged; any number of processes share them by a file."""

    def __init__(self, split: str, path: Path | None = None) -> None:
        """Start with the samples that cannot be decoded according to the file at `path`, if any.

        Other damage in the file may have been repaired since: reading the sample finds out.

        Raises:
            UsageError: the file is not such a list, or cannot be read.
        """
        self.known: dict[int, Damage] = {}
        """Damage by sample id."""
        self._list = _QuarantineFile(path) if path is not None else None
        for damage in self._list.read() if self._list else []:
            if damage.split == split and damage.reason == UNDECODABLE:
                self.known[damage.sample] = damage

    def __contains__(self, sample: int) -> bool:
        return sample in self.known

    def find_damaged(self, ids: Ids) -> list[int]:
        """Return the places of `ids` (int64 [b]) that hold samples known to be damaged."""
        found = enumerate(ids.tolist() if self.known else ())
        return [place for place, sample in found if sample in self.known]

    def add(self, damages: Iterable[Damage]) -> None:
        """Add damaged samples, and append those to the file that it does not list yet."""
        new = [damage for damage in damages if damage.sample not in self.known]
        self.known.update((damage.sample, damage) for damage in new)
        if new and self._list:
            self._list.append(new)


class _QuarantineFile:
    """The file of a quarantine. Only rows that other processes added are read again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listed: set[tuple[str, int]] = set()
        self._end = 0  # offset after the rows that are in `_listed`

    def read(self) -> list[Damage]:
        """Return the rows that were not read before."""
        if not self._path.parent.is_dir():
            raise UsageError(f"there is no folder for {self._path}; make it, or name another")
        if not self._path.exists():
            return []
        with self._open("rb") as file:
            return self._read_new(file)

    def _open(self, mode: str) -> IO[bytes]:
        try:
            return self._path.open(mode)
        except OSError as error:
            raise UsageError(
                f"{self._path} cannot be opened ({error.strerror}); name another file"
            ) from error

    def append(self, damages: list[Damage]) -> None:
        """Append the samples that are not listed; other processes may do the same at this time."""
        with self._open("a+b") as file:
            with suppress(NoLocks, LockHang):  # of two rows of one moment the list may lack one
                flock(file, wait=True)
            if os.fstat(file.fileno()).st_size < self._end:  # moved away: this is a new one
                self._listed.clear()
                self._end = 0
            self._read_new(file)
            file.truncate(self._end)  # the rest of a writer that was killed
            rows = [one for one in damages if one[:2] not in self._listed]
            file.write(b"".join(json.dumps(row._asdict()).encode() + b"\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
            self._listed.update(row[:2] for row in rows)
            self._end = file.tell()

    def _read_new(self, file: IO[bytes]) -> list[Damage]:
        file.seek(self._end)
        content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        try:
            rows = [Damage(**(row or {})) for row in parse_rows(content.splitlines())]
        except TypeError as error:  # no row, or columns of another list
            raise UsageError(f"{self._path} is no list of damaged samples; move it away") from error
        self._listed.update(row[:2] for row in rows)
        self._end += len(content)
        return rows
