"""The Pillow road: every kind of still picture, at its own pace.

The formats are named, so that nothing reaches a decoder that starts programs or reads files (EPS,
PDF). Colours, transparency and 16 bits are dealt with after the resampling where that is the same,
so that few copies of a large picture exist at once.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.dataset.images import SIZE, Pixels
from pipeline.packing.fast import reduction
from pipeline.packing.finish import ORIENTATION, to_srgb, upright, valid
from pipeline.packing.limits import MAX_OTHER_BYTES, PictureError, check_size, in_time

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What Pillow may take the bytes for."""
JPEG = b"\xff\xd8"
BAND = 2**20
"""Values of a deep picture that are converted at once."""

_stderr = threading.Lock()
logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)  # what is wrong with a picture is a reason


def square_any(data: bytes, min_side: int) -> Pixels:
    """Return the central square of a picture, uint8 [256, 256, 3], sRGB; of a film the first frame.

    Raises:
        PictureError: no picture, truncated, too small, or too large to be one.
    """
    if data[:2] in (b"P1", b"P2", b"P3"):
        raise PictureError("a PNM whose pixels are written as text")
    if data[:2] != JPEG and len(data) > MAX_OTHER_BYTES:
        raise PictureError(f"{len(data)} bytes are more than it may have ({MAX_OTHER_BYTES})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF, large pictures: not the user's matter
            with in_time(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
                check_size(*image.size, min_side)
                _check_tiles(image)
                with _silent() if image.format == "TIFF" else nullcontext():
                    return _square(image)
    except PictureError:
        raise
    # Pillow's decoders raise what they please on damaged input; whatever it is, it is this file.
    except Exception as error:
        raise PictureError(_reason(error)) from error


def _check_tiles(image: Image.Image) -> None:
    """Refuse a picture in more pieces than it has rows or tiles: each starts a decoder."""
    pieces = len(getattr(image, "tile", ()))
    if pieces > 2 * image.height + image.width * image.height // 64 + 1000:
        raise PictureError(f"{pieces} strips or tiles in {image.width}x{image.height} pixels")


@contextmanager
def _silent() -> Iterator[None]:
    """Keep libtiff from writing its complaints to the process's stderr; it cannot be asked to."""
    with _stderr, open(os.devnull, "wb") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _square(image: Image.Image) -> Pixels:
    factor = reduction(min(image.size))
    if image.format == "JPEG" and factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))
    image.load()  # a TIFF is turned upright by it
    turned = valid(image.getexif().get(ORIENTATION))
    profile = image.info.get("icc_profile") or None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    middle = image.crop((left, top, left + side, top + side))
    small = _resamplable(middle).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if small.mode != "RGBA":
        return upright(np.asarray(to_srgb(small, profile)), turned)
    colours = to_srgb(small.convert("RGB"), profile)
    white = Image.new("RGB", small.size, "white")
    return upright(np.asarray(Image.composite(colours, white, small.getchannel("A"))), turned)


def _resamplable(image: Image.Image) -> Image.Image:
    """Return the picture in a mode that can be resampled: L, RGB, RGBA or CMYK."""
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image)
    if "A" in image.mode.upper() or "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in {"L", "RGB", "CMYK"} else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return deep grey as L, in bands: 16 bits become 8; fractions, as floats come, 0..255."""
    values = np.asarray(image)
    rows = max(1, BAND // max(1, image.width))
    bands = [values[top : top + rows] for top in range(0, image.height, rows)]
    largest = max(float(np.nanmax(band, initial=0)) for band in bands)
    scale = 1 / 257 if largest > 255 else 255 if image.mode == "F" and largest <= 1 else 1
    out = np.empty(values.shape, np.uint8)
    for top, band in zip(range(0, image.height, rows), bands, strict=True):
        scaled = np.nan_to_num(band.astype(np.float64) * scale, posinf=255, neginf=0)
        out[top : top + rows] = scaled.clip(0, 255).round()
    return Image.fromarray(out)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no picture: its bytes are of no known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"decompression bomb: {error}"
    if isinstance(error, MemoryError):
        return "too large: there is not enough memory to decode it"
    text = str(error) or type(error).__name__
    if "truncated" in text.lower() and not text.startswith("truncated"):
        return f"truncated: {text}"
    return text
