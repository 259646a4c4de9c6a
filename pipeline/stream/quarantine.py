"""`Quarantine`: the list of damaged samples; `HeaderCheck`: finds JPEGs that would crash DALI.

QUARANTINE.jsonl     one row a sample: split, sample, shard, key, reason
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from pipeline.dataset.images import Undecodable, check_header
from pipeline.dataset.jpeg_header import PROGRESSIVE
from pipeline.stream.decode import TrialDecoder
from pipeline.stream.order import Ids
from pipeline.stream.shard_reader import Bytes, Damage
from pipeline.tools.errors import UsageError
from pipeline.tools.files import NoLocks, flock
from pipeline.tools.jsonl import parse_rows

EOI = b"\xff\xd9"
HEADERS = 64
"""Largest number of headers remembered; with other headers each sample is tried once."""


class HeaderCheck:
    """Finds JPEGs whose headers DALI cannot parse, before they get into a batch.

    DALI 2.4 throws when it cannot parse one image of a batch, while its threads still write to the
    others' memory: often enough the process ends with a segmentation fault. An image alone is no
    danger. So a header that was not seen before is tried alone, with its image; all images from our
    packer have the same one, and comparing it costs next to nothing. (Scan data that cannot be
    decoded behind a good header is an ordinary error, which `Loader` handles when it occurs.)

    An image whose header says another size than 256x256, or a thousand scans, is not even tried.
    One that is progressive has tables of its own, and scans behind its header: it is tried once.

    DALI decodes an image whose scan ends too early if only the crop lies before the end. An image
    that does not end as a JPEG does is tried as well, so that it is damaged in every crop or none.
    """

    def __init__(self, samples: int) -> None:
        self._passed = np.zeros(samples, bool)
        self._headers: set[bytes] = set()
        self._lengths: set[int] = set()
        self._trial = TrialDecoder()

    def find_undecodable(self, ids: Ids, images: list[Bytes]) -> list[int]:
        """Return the places in `ids` (int64 [b]) of JPEGs that must not go into a batch."""
        unknown = np.flatnonzero(~self._passed[ids]).tolist()
        found = [place for place in unknown if not self._is_decodable(images[place])]
        self._passed[ids] = True
        self._passed[ids[found]] = False
        return found

    def _is_decodable(self, image: Bytes) -> bool:
        ended = image[-2:].tobytes() == EOI
        if ended and any(image[:length].tobytes() in self._headers for length in self._lengths):
            return True
        try:
            header = check_header(image.tobytes())
        except Undecodable:
            return False
        if not self._trial.can_decode(image):
            return False
        repeats = header is not None and header.process not in PROGRESSIVE
        if ended and repeats and len(self._headers) < HEADERS:
            try:
                length = find_scan(image)
            except IndexError:  # not a JPEG, or an unusual one, that DALI can read
                return True
            self._headers.add(image[:length].tobytes())
            self._lengths.add(length)
        return True


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
            with suppress(NoLocks):  # of two rows of the same moment the list may then lack one
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
