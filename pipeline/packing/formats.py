"""Formats of images: those that Pillow reads, and those for which it needs another package.

AVIF, HEIF (HEIC), JPEG XL and JPEG 2000 are told by their first bytes. Where their decoder is not
installed, an image of theirs is a reject that names the extra to install. Decoders run one thread:
the workers of a build share the cores already.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from PIL import AvifImagePlugin, Image, PngImagePlugin, features

from pipeline.dataset.jpeg_header import ImageError, check_size
from pipeline.tools.packages import suggest_extra

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that Pillow may detect in any case."""
EXTRA = "formats"
"""Extra of pyproject.toml that brings the other decoders."""
PACKAGES = ("pillow-heif", "pillow-jxl-plugin")
"""Distributions of decoders beside Pillow; their versions decide bytes, too."""
PNG = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
"""Kinds of a PNG's chunks that hold text."""
MAX_PROFILE = 4 * 2**20
"""Bytes of a colour profile, or of a text in a PNG; larger ones are ignored."""
PngImagePlugin.MAX_TEXT_CHUNK = MAX_PROFILE  # Pillow refuses the image for a larger one


def _load_avif() -> bool:
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    return bool(features.check("avif"))


def _load_heif() -> bool:
    import pillow_heif

    pillow_heif.register_heif_opener(
        decode_threads=1, thumbnails=False, depth_images=False, aux_images=False
    )
    return True


def _load_jxl() -> bool:
    from pillow_jxl import JpegXLImagePlugin

    JpegXLImagePlugin.DECODE_THREADS = 0  # none beside the caller's
    return True


def _load_jpeg2000() -> bool:
    return bool(features.check("jpg_2000"))


class _Kind(NamedTuple):
    """A format with a decoder of its own."""

    name: str
    pillow: str
    """Name by which Pillow knows it."""
    load: Callable[[], bool]
    """Load the decoder; False or ImportError if there is none."""


_AVIF = _Kind("AVIF", "AVIF", _load_avif)
_HEIF = _Kind("HEIC", "HEIF", _load_heif)
_JXL = _Kind("JPEG XL", "JXL", _load_jxl)
_JPEG2000 = _Kind("JPEG 2000", "JPEG2000", _load_jpeg2000)
_HEAD = {
    b"\xff\x0a": _JXL,
    b"\0\0\0\x0cJXL \r\n\x87\n": _JXL,
    b"\0\0\0\x0cjP  \r\n\x87\n": _JPEG2000,
    b"\xff\x4f\xff\x51": _JPEG2000,
}
"""First bytes of an image."""
_BRANDS = {b"avif": _AVIF, b"avis": _AVIF} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), _HEIF
)
"""Brands of an ISO media file; a general one (`mif1`) stands before others of its kind."""


def open_image(data: bytes, min_side: int = 1) -> Image.Image:
    """Open an image by its first bytes; its pixels are decoded later, of JPEG XL at once.

    Raises:
        ImageError: the decoder is not installed, or the size is beyond the limits (JPEG XL).
        Exception: what Pillow raises for damage.
    """
    kind = _identify(data)
    if kind is None:
        return Image.open(io.BytesIO(drop_odd_chunks(data)), formats=FORMATS)
    if not _is_there(kind):
        raise ImageError(f"{kind.name}, whose decoder is not installed: {suggest_extra(EXTRA)}")
    if kind is _JXL:
        check_size(*read_jxl_size(data), min_side)
    return Image.open(io.BytesIO(data), formats=(kind.pillow,))


def _identify(data: bytes) -> _Kind | None:
    """Return the format of an image, if it is none of `FORMATS`."""
    if data[4:8] == b"ftyp":
        end = min(int.from_bytes(data[:4], "big"), 256)
        brands = (data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4)))
        return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), None)
    return next((kind for head, kind in _HEAD.items() if data.startswith(head)), None)


@cache
def _is_there(kind: _Kind) -> bool:
    try:
        return kind.load()
    except ImportError:
        return False


_JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_JXL_BITS = (9, 13, 18, 30)
"""Bits of a side in a JPEG XL, by a selector of two bits."""


def read_jxl_size(data: bytes) -> tuple[int, int]:
    """Return width and height in the header of a JPEG XL (ISO/IEC 18181-1, SizeHeader).

    Raises:
        ImageError: there is no header.
    """
    stream = _find_codestream(data)
    if not stream.startswith(b"\xff\x0a") or len(stream) < 4:
        raise ImageError("truncated: a JPEG XL without a header")
    bits = int.from_bytes(stream[2:12], "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    small = take(1)

    def take_side() -> int:
        return 8 * (1 + take(5)) if small else 1 + take(_JXL_BITS[take(2)])

    height = take_side()
    if not (ratio := take(3)):
        return take_side(), height
    above, below = _JXL_RATIOS[ratio - 1]
    return height * above // below, height


def _find_codestream(data: bytes) -> bytes:
    """Return the first bytes of the codestream, which may lie in a box."""
    if data.startswith(b"\xff\x0a"):
        return data[:12]
    at = 0
    while at + 16 <= len(data):
        size, kind, head = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            begin = at + head + (4 if kind == b"jxlp" else 0)
            return data[begin : begin + 12]
        if size < head:  # 0: to the end of the file
            break
        at += size
    return b""


def drop_odd_chunks(data: bytes) -> bytes:
    """Return a PNG without the texts and profiles for which Pillow would refuse it.

    They are longer than `MAX_PROFILE`, more than Pillow's limit together, or compressed in a way
    that does not exist.
    """
    if not data.startswith(PNG):
        return data
    at, kept, room, parts = len(PNG), 0, PngImagePlugin.MAX_TEXT_MEMORY, []
    while at + 12 <= len(data):
        kind, begin = data[at + 4 : at + 8], at + 8
        stop = begin + int.from_bytes(data[at : at + 4], "big") + 4
        if kind in (*PNG_TEXTS, b"iCCP"):
            length = _measure_text(kind, data[begin : stop - 4])
            if length is None or length > room:
                parts.append(data[kept:at])
                kept = stop
            elif kind in PNG_TEXTS:
                room -= length
        at = stop
    return b"".join([*parts, data[kept:]]) if parts else data


def _measure_text(kind: bytes, body: bytes) -> int | None:
    """Return the bytes of a text or profile in a chunk, unpacked; None if there are too many, or
    it cannot be unpacked.
    """
    _, _, text = body.partition(b"\0")
    if kind == b"iTXt" and text[:2] == b"\1\0":
        text = text[2:].split(b"\0", 2)[-1]
    elif kind in (b"tEXt", b"iTXt"):
        return len(text)
    elif text[:1] in (b"\0", b"") and (text or kind == b"zTXt"):
        text = text[1:]
    else:
        return None
    unpacker = zlib.decompressobj()
    try:
        length = len(unpacker.decompress(text, MAX_PROFILE))
    except zlib.error:  # Pillow passes over it
        return 0
    return None if unpacker.unconsumed_tail else length
