"""What a picture may be at most, and the error that says why one is refused.

Sources are not trusted: every limit is checked on the header, before anything is decoded. Within
them a picture takes at most about 2 GB of memory (100 megapixels as a WebP with transparency; a
JPEG 0.9 GB) beside the file itself, and some seconds.
"""

from __future__ import annotations

import re

MAX_BYTES = 256 * 2**20
"""Size of an encoded picture."""
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
