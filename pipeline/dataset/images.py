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

from pipeline.dataset.jpeg_header import JpegHeader, read_header
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

SHAPE = (SIZE, SIZE, 3)
COLORS = ("YCbCr", "RGB", "Gray", "L")
"""Color spaces that JPEGs may have, in the names of simplejpeg and Pillow."""
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
    check_jpeg(data)
    if simplejpeg is None or b"Exif\0\0" in data[:EXIF_WITHIN]:
        return _decode_with_pillow(data)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except (ValueError, RuntimeError) as error:
        raise Undecodable(f"it cannot be decoded ({summarize_error(error)})") from error
    return pixels


def check_jpeg(data: bytes) -> JpegHeader:
    """Return the header of a stored JPEG; nothing is decoded.

    Raises:
        Undecodable: it is no JPEG, of another size, neither gray nor RGB, or of endless scans.
    """
    try:
        width, height, colors = _read_jpeg_facts(data)
        header = read_header(data)
    # Parsers raise many kinds of exception on damaged input.
    except Exception as error:
        what = f"({summarize_error(error)})" if data.startswith(b"\xff\xd8") else "at all"
        raise Undecodable(f"it is no JPEG {what}") from error
    if colors not in COLORS:
        raise Undecodable(f"its colours are {colors}, neither RGB nor grey")
    # Two readers, and so two sizes, where the header has several frames.
    sizes = {(width, height), (width, height) if header is None else (header.width, header.height)}
    for one in sizes - {(SIZE, SIZE)}:
        raise Undecodable(f"it is {one[0]}x{one[1]}, not {SIZE}x{SIZE}")
    return header or JpegHeader()


def _read_jpeg_facts(data: bytes) -> tuple[int, int, str]:
    """Return width, height and color space of a JPEG."""
    if simplejpeg is not None:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        return width, height, colors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # also of the size, which callers check
        image = Image.open(io.BytesIO(data), formats=["JPEG"])
    return *image.size, image.mode


def _decode_with_pillow(data: bytes) -> Pixels:
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            warnings.simplefilter("ignore")  # damaged EXIF
            image.load()
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # as above
        raise Undecodable(f"it cannot be decoded ({summarize_error(error)})") from error
    return pixels
