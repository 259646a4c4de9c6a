"""JPEG headers, read from their markers alone, and the limits on images.

Reading a header takes a few microseconds; neither Pillow nor simplejpeg tells all of it, and their
own readers pass over junk and segments one at a time in Python or without end. Sources are not
trusted: every limit is checked on the header, before anything is decoded. Within the limits an
image takes at most about 2 GB of memory (100 megapixels as a WebP with transparency; a JPEG 0.9 GB)
beside the file itself, and some seconds; `MAX_SECONDS` ends what takes longer, and
`MAX_CPU_SECONDS` the process of a decoder that does not come back to Python.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

MAX_BYTES = 256 * 2**20
"""Size limit of a JPEG in bytes."""
MAX_OTHER_BYTES = 64 * 2**20
"""Size limit of other images in bytes: decoders take millions of small steps for a few of them."""
MAX_SECONDS = 60
"""Time limit of an image in seconds; native code of a decoder is not interrupted."""
MAX_CPU_SECONDS = 75
"""Seconds of a process's CPU time after which the kernel ends it; see `limit_process`."""
MAX_PIXELS = 100_000_000
"""Most pixels of an image: width times height."""
MAX_SCANS = 100
"""Most scans of a JPEG: a progressive one has about ten, and each goes over all pixels again."""
MAX_SCANNED = 2_000_000_000
"""Most pixels times scans of a JPEG: seconds of decoding."""
MAX_REASON = 200
"""Most characters of a reason."""


class ImageError(Exception):
    """The bytes are no image that can be packed; the message is the reason, one line."""

    def __init__(self, reason: object) -> None:
        super().__init__(to_one_line(reason))


def to_one_line(reason: object) -> str:
    """Return a reason as one line that is the same in every run: no addresses, no control signs."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", str(reason))
    text = "".join(sign if sign.isprintable() else " " for sign in text[: 4 * MAX_REASON])
    return " ".join(text.split())[:MAX_REASON]


def check_size(width: int, height: int, min_side: int) -> None:
    """Refuse an image by its size alone.

    Raises:
        ImageError: too small, or too large to be one.
    """
    if min(width, height) < max(min_side, 1):
        raise ImageError(f"too small: {width}x{height}")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"decompression bomb: {width}x{height} is more than {MAX_PIXELS // 10**6} megapixels"
        )


@contextmanager
def limit_time(seconds: float = MAX_SECONDS) -> Iterator[None]:
    """Refuse an image that takes longer; only a process's main thread can be stopped so.

    Raises:
        ImageError: the time is over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: object) -> None:
        raise ImageError(f"decoding it takes more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def limit_process(seconds: float | None = None) -> Iterator[None]:
    """Have the kernel end this process, by SIGVTALRM, where the block takes more CPU time.

    A signal's Python handler waits until native code returns. This one has none: it ends a decoder
    whatever that does, and the process with it, which must be one that may end.
    """
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds or MAX_CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


MAX_SEGMENTS = 4096
"""Most segments before the first scan: an ICC profile may take 255, a long XMP some hundred."""
MAX_JUNK = 65536
"""Most bytes between segments."""

PROGRESSIVE = frozenset((2, 6, 10, 14))
"""Processes of a frame (n of its SOFn) whose scans refine each other: Huffman or arithmetic coded,
alone or in a hierarchy."""
_START = b"\xff\xd8\xff"
_SCAN, _APP1, _APP2 = 0xDA, 0xE1, 0xE2
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_BARE = {0x01, *range(0xD0, 0xD8)}
_EXIF, _ICC, _XMP = b"Exif\0\0", b"ICC_PROFILE\0", b"http://ns.adobe.com/xap/1.0/\0"


@dataclass
class JpegHeader:
    """Fields of a JPEG header."""

    width: int = 0
    height: int = 0
    components: int = 0
    bits: int = 0
    """Bits of a sample: 8, or 12."""
    process: int = -1
    """n of the frame's marker SOFn: 0 baseline, 1 extended, 2 progressive."""
    exif: bytes = b""
    """The first Exif segment without its name."""
    xmp: bytes = b""
    """The first XMP segment without its name."""
    icc: list[bytes] = field(default_factory=list)
    """Segments of the colour profile, in stored order."""

    @property
    def plain(self) -> bool:
        """True for a kind that any decoder knows: 8-bit Huffman-coded grey or three components."""
        return self.process in (0, 1, 2) and self.bits == 8 and self.components in (1, 3)

    @property
    def profile(self) -> bytes | None:
        """The colour profile, or None where there is none or a part is missing."""
        parts = {part[0]: part[2:] for part in self.icc if len(part) > 2}
        if not parts or sorted(parts) != list(range(1, self.icc[0][1] + 1)):
            return None
        return b"".join(parts[number] for number in sorted(parts))


def read_header(data: bytes) -> JpegHeader | None:
    """Return the header of a JPEG; None for anything else, and for a frame that was not found.

    Raises:
        ImageError: it ends within its header, or goes on beyond every limit.
    """
    if data[:3] != _START:
        return None
    header, at, junk = JpegHeader(), 2, 0
    for _ in range(MAX_SEGMENTS):
        begin = data.find(b"\xff", at)
        junk += begin - at
        if junk > MAX_JUNK:
            raise ImageError(f"more than {MAX_JUNK} bytes of junk between its JPEG markers")
        if begin < 0 or begin + 4 > len(data):
            raise ImageError("truncated: it ends within its header")
        marker = data[begin + 1]
        if marker == 0xFF:  # a fill byte
            at = begin + 1
        elif marker in _BARE or marker == 0:
            at = begin + 2
        elif marker == 0xD9:
            raise ImageError("truncated: it ends before its first scan")
        else:
            at = begin + 2 + int.from_bytes(data[begin + 2 : begin + 4], "big")
            if marker == _SCAN:
                _check_scans(data, begin, header)
                return header if header.components else None
            _read_segment(header, marker, data[begin + 4 : at])
    raise ImageError(f"more than {MAX_SEGMENTS} segments in its JPEG header")


def _read_segment(header: JpegHeader, marker: int, body: bytes) -> None:
    if marker in _FRAMES and len(body) >= 6:
        if header.process >= 0:
            raise ImageError("it has several frames, and so several sizes")
        header.process, header.bits = marker - 0xC0, body[0]
        header.height = int.from_bytes(body[1:3], "big")
        header.width = int.from_bytes(body[3:5], "big")
        header.components = body[5]
    elif marker == _APP1 and body.startswith(_EXIF) and not header.exif:
        header.exif = body[len(_EXIF) :]
    elif marker == _APP1 and body.startswith(_XMP) and not header.xmp:
        header.xmp = body[len(_XMP) :]
    elif marker == _APP2 and body.startswith(_ICC):
        header.icc.append(body[len(_ICC) :])


def _check_scans(data: bytes, first: int, header: JpegHeader) -> None:
    """Refuse a JPEG whose pixels would be decoded over and over.

    A first scan of all components in a frame that is not progressive is the only one that decoders
    accept, and looking for more would cost a tenth of the decoding.
    """
    if header.process not in PROGRESSIVE and data[first + 4 : first + 5] == bytes(
        [header.components]
    ):
        return
    scans = data.count(b"\xff\xda", first)  # within a scan, 0xff is followed by 0
    if scans > MAX_SCANS or scans * header.width * header.height > MAX_SCANNED:
        raise ImageError(
            f"decompression bomb: {scans} scans of {header.width}x{header.height} pixels"
        )
