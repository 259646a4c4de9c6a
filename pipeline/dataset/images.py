"""Stored images: size, encodings, and a strict decoder.

The decoder is the strictest there is: whatever libjpeg would only warn of (a scan that ends early,
stray bytes) is an error. An image that passes decodes everywhere.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from pipeline.dataset.jpeg_header import JpegHeader, read_header, to_one_line
from pipeline.tools.errors import summarize_error

try:
    import simplejpeg
except ImportError:  # Pillow decodes at half the speed
    simplejpeg = None

SIZE = 256
"""Height and width of a stored image, in pixels."""

Pixels = npt.NDArray[np.uint8]

Encoding = Literal["jpeg", "raw"]
"""Encoding of a data set's images: JPEGs, or raw pixels."""

ENDINGS: dict[Encoding, str] = {"jpeg": "jpg", "raw": "npy"}
"""Ending of an image's tar member."""

JPEG = b"\xff\xd8"
"""First bytes of every JPEG."""
SHAPE = (SIZE, SIZE, 3)
COLORS = ("YCbCr", "RGB", "Gray", "L")
"""Color spaces that JPEGs may have, in the names of simplejpeg and Pillow."""
OTHER_FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""Formats besides JPEG that DALI decodes too, in Pillow's names."""
EXIF_WITHIN = 65_536
"""Bytes at the head of a JPEG that are searched for an orientation."""


class Undecodable(Exception):
    """The bytes are no image of 256x256; the message is the reason, one line."""


def encode_npy(pixels: Pixels) -> bytes:
    """Return uint8 [h, w, 3] as a NumPy file (format 1.0, C order): a header, then the pixels."""
    file = io.BytesIO()
    # Version and order are fixed, since the bytes of a data set depend on them.
    np.lib.format.write_array(
        file, np.ascontiguousarray(pixels), version=(1, 0), allow_pickle=False
    )
    return file.getvalue()


def decode_image(data: bytes | memoryview, encoding: Encoding = "jpeg") -> Pixels:
    """Decode a stored image.

    Args:
        data: a JPEG, gray or RGB, or the pixels of a raw image.
        encoding: which of the two.

    Returns:
        uint8 [256, 256, 3], RGB, as DALI returns it (an EXIF orientation is applied).

    Raises:
        Undecodable: it cannot be decoded without an error, or has another shape.
    """
    if encoding == "raw":
        flat = np.frombuffer(data, np.uint8)
        if flat.size != math.prod(SHAPE):
            raise Undecodable(f"it has {flat.size:,} bytes, not 256x256x3")
        return flat.reshape(SHAPE)
    data = bytes(data)
    if not data.startswith(JPEG):
        raise Undecodable("it is no JPEG at all")
    check_header(data)
    try:
        colors = _read_colors(data)
    except Exception as error:  # as above
        raise Undecodable(f"it is no JPEG ({summarize_error(error)})") from error
    if colors not in COLORS:
        raise Undecodable(f"its colours are {colors}, neither RGB nor grey")
    if simplejpeg is None or b"Exif\0\0" in data[:EXIF_WITHIN]:
        return _decode_with_pillow(data)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except (ValueError, RuntimeError) as error:
        raise Undecodable(f"it cannot be decoded ({summarize_error(error)})") from error
    return pixels


def check_header(data: bytes) -> JpegHeader | None:
    """Return the header of a stored image, None if it is no JPEG; nothing is decoded.

    Raises:
        Undecodable: it is no image, of another size than 256x256, or has more scans than any.
    """
    try:
        header = read_header(data)
        width, height = (header.width, header.height) if header else _read_other_size(data)
    except Exception as error:  # parsers raise many kinds of exception on damaged input
        kind = "JPEG" if data.startswith(JPEG) else "image"
        raise Undecodable(f"it is no {kind} ({to_one_line(error)})") from error
    if (width, height) != (SIZE, SIZE):
        raise Undecodable(f"it is {width}x{height}, not {SIZE}x{SIZE}")
    return header


def _read_other_size(data: bytes) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the size, too, which callers check
        with Image.open(io.BytesIO(data), formats=OTHER_FORMATS) as image:
            return image.size


def _read_colors(data: bytes) -> str:
    """Return the color space of a JPEG."""
    if simplejpeg is not None:
        colors: str = simplejpeg.decode_jpeg_header(data, strict=True)[2]
        return colors
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        return image.mode


def _decode_with_pillow(data: bytes) -> Pixels:
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            warnings.simplefilter("ignore")  # damaged EXIF
            image.load()
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # as above
        raise Undecodable(f"it cannot be decoded ({summarize_error(error)})") from error
    return pixels
