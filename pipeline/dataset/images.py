"""A stored image: how large it is, what encodings there are, and the raw one.

How images of any kind become one is `pipeline.packing.resize`.

One image as it is stored in a shard -> its pixels, or the reason why it has none.

The strictest reading there is: whatever libjpeg would only warn of (a scan that ends early, bytes
that fit nowhere) is a fault here. An image that passes decodes everywhere.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

SIZE = 256
"""Height and width of a stored image, in pixels."""

Pixels = npt.NDArray[np.uint8]

Encoding = Literal["jpeg", "raw"]
"""How a data set stores its images: as JPEGs, or as the pixels themselves."""

ENDINGS: dict[Encoding, str] = {"jpeg": "jpg", "raw": "npy"}
"""What an image's member of a tar ends in."""


def encode_npy(pixels: Pixels) -> bytes:
    """Return uint8 [h, w, 3] as a NumPy file (format 1.0, C order): a header, then the pixels."""
    file = io.BytesIO()
    # The version is named, and the order made sure of: the bytes are what data sets are made of.
    np.lib.format.write_array(
        file, np.ascontiguousarray(pixels), version=(1, 0), allow_pickle=False
    )
    return file.getvalue()


try:
    import simplejpeg
except ImportError:  # Pillow does it too, at half the speed
    simplejpeg = None

SHAPE = (SIZE, SIZE, 3)
COLORS = ("YCbCr", "RGB", "Gray", "L")
"""What JPEGs may hold, as simplejpeg and Pillow call it."""
SOI = b"\xff\xd8"
EXIF = b"Exif\0\0"
EXIF_WITHIN = 65_536
"""Bytes at the head of a JPEG that are searched for an orientation."""


class Undecodable(Exception):
    """These bytes are no image of 256x256; the message is the reason, one line."""


def decode_image(data: bytes | memoryview, encoding: Encoding = "jpeg") -> Pixels:
    """Decode a stored image.

    Args:
        data: a JPEG, grey or RGB, or the pixels of a raw image.
        encoding: which of the two.

    Returns:
        uint8 [256, 256, 3], RGB, as DALI gives it (an EXIF orientation is heeded).

    Raises:
        Undecodable: it cannot be decoded without a fault, or has another shape.
    """
    if encoding == "raw":
        flat = np.frombuffer(data, np.uint8)
        if flat.size != math.prod(SHAPE):
            raise Undecodable(f"it has {flat.size:,} bytes, not 256x256x3")
        return flat.reshape(SHAPE)
    data = bytes(data)
    size = read_jpeg_size(data)
    if size != (SIZE, SIZE):
        raise Undecodable(f"it is {size[0]}x{size[1]}, not {SIZE}x{SIZE}")
    if simplejpeg is None or EXIF in data[:EXIF_WITHIN]:
        return _by_pillow(data)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except (ValueError, RuntimeError) as error:
        raise Undecodable(f"it cannot be decoded ({_one_line(error)})") from error
    return pixels


def read_jpeg_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a JPEG from its header.

    Raises:
        Undecodable: it is no JPEG, or neither grey nor RGB.
    """
    try:
        if simplejpeg is not None:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of size, too: whoever calls looks at that
                image = Image.open(io.BytesIO(data), formats=["JPEG"])
            (width, height), colours = image.size, image.mode
    # Parsers raise what they please on damaged input; whatever it is, it is this image.
    except Exception as error:
        what = f"({_one_line(error)})" if data.startswith(SOI) else "at all"
        raise Undecodable(f"it is no JPEG {what}") from error
    if colours not in COLORS:
        raise Undecodable(f"its colours are {colours}, neither RGB nor grey")
    return width, height


def _by_pillow(data: bytes) -> Pixels:
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            warnings.simplefilter("ignore")  # damaged EXIF
            image.load()
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # as above
        raise Undecodable(f"it cannot be decoded ({_one_line(error)})") from error
    return pixels


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
