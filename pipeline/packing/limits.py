"""What a picture may be at most, and the error that says why one is refused.

Sources are not trusted: every limit is checked on the header, before anything is decoded. Within
them a picture takes at most about 2 GB of memory (100 megapixels as a WebP with transparency; a
JPEG 0.9 GB) beside the file itself, and some seconds; `MAX_SECONDS` ends what takes longer.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

MAX_BYTES = 256 * 2**20
"""Size of a JPEG."""
MAX_OTHER_BYTES = 64 * 2**20
"""Size of any other picture: of these, decoders take millions of small steps for a few bytes."""
MAX_SECONDS = 60
"""Time for a picture; what a decoder does in its own code is waited for."""
MAX_PIXELS = 100_000_000
"""Width times height."""
MAX_SCANS = 100
"""Scans of a JPEG: a progressive one has about ten, and each goes over all pixels again."""
MAX_SCANNED = 2_000_000_000
"""Pixels times scans of a JPEG: seconds of decoding."""
MAX_REASON = 200
"""Characters of a reason."""


class PictureError(Exception):
    """The bytes are no picture that can be packed; the message is the reason, one line."""

    def __init__(self, reason: object) -> None:
        super().__init__(one_line(reason))


def one_line(reason: object) -> str:
    """Return a reason as one line that is the same in every run: no addresses, no control signs."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", str(reason))
    text = "".join(sign if sign.isprintable() else " " for sign in text[: 4 * MAX_REASON])
    return " ".join(text.split())[:MAX_REASON]


def check_size(width: int, height: int, min_side: int) -> None:
    """Refuse a picture by its size alone.

    Raises:
        PictureError: too small, or too large to be one.
    """
    if min(width, height) < max(min_side, 1):
        raise PictureError(f"too small: {width}x{height}")
    if width * height > MAX_PIXELS:
        raise PictureError(
            f"decompression bomb: {width}x{height} is more than {MAX_PIXELS // 10**6} megapixels"
        )


@contextmanager
def in_time(seconds: float = MAX_SECONDS) -> Iterator[None]:
    """Refuse a picture that takes longer; only a process's main thread can be stopped so.

    Raises:
        PictureError: the time is over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: object) -> None:
        raise PictureError(f"decoding it takes more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
