"""Keep JPEGs from a batch that DALI would fail to parse there.

DALI 2.4 throws when it cannot parse one picture of a batch, while its threads still write to the
others' memory: often enough the process ends with a segmentation fault. A picture alone is no
danger. So a header that was not seen before is tried alone, with its picture; pictures that our
packer wrote all have the same one, and looking at it costs next to nothing. (Scan data that cannot
be decoded behind a good header is an ordinary error, and `flow` looks for it when it comes.)

DALI decodes a picture whose scan ends too early if only the crop lies before the end. So that a
picture is damaged in every crop or in none, one that does not end as a JPEG does is tried, too.
"""

from __future__ import annotations

import numpy as np

from pipeline.stream.decode import Trial
from pipeline.stream.order import Ids
from pipeline.stream.shard_reader import Bytes

EOI = b"\xff\xd9"
HEADERS = 64
"""Headers that are remembered. Beyond them each sample is tried once."""


class Screen:
    """What is known of the headers of a split's samples."""

    def __init__(self, samples: int) -> None:
        self._passed = np.zeros(samples, bool)
        self._headers: set[bytes] = set()
        self._lengths: set[int] = set()
        self._trial = Trial("cpu")  # whatever decodes: the parser is the same

    def refused(self, ids: Ids, pictures: list[Bytes]) -> list[int]:
        """Return the places of samples `ids` (int64 [b]) whose JPEGs must not go into a batch."""
        unknown = np.flatnonzero(~self._passed[ids]).tolist()
        refused = [place for place in unknown if not self._passes(pictures[place])]
        self._passed[ids] = True
        self._passed[ids[refused]] = False
        return refused

    def _passes(self, picture: Bytes) -> bool:
        ended = picture[-2:].tobytes() == EOI
        if ended and any(picture[:length].tobytes() in self._headers for length in self._lengths):
            return True
        if not self._trial.decodes(picture):
            return False
        if ended and len(self._headers) < HEADERS:
            try:
                length = scan_start(picture)
            except IndexError:  # no JPEG, or a strange one, but DALI can read it
                return True
            self._headers.add(picture[:length].tobytes())
            self._lengths.add(length)
        return True


def scan_start(picture: Bytes) -> int:
    """Return where the first scan's data begin in a well-formed JPEG, uint8 [size].

    All before is the header: ITU-T T.81, annex B. Marker segments give their own length.
    """
    place = 2
    while picture[place + 1] != 0xDA:
        place += 2 + int(picture[place + 2]) * 256 + int(picture[place + 3])
    return place + 2 + int(picture[place + 2]) * 256 + int(picture[place + 3])
