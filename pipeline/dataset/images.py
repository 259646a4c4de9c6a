"""Stored images: size, encodings, and a strict decoder.

The decoder is the strictest there is: whatever libjpeg would only warn of (a scan that ends early,
stray bytes) is an error. An image that passes decodes everywhere.
"""

from __future__ import annotations

import io
import warnings
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.dataset.jpeg_header import (
    MAX_PIXELS,
    ImageError,
    JpegHeader,
    check_size,
    read_header,
    to_one_line,
)
from pipeline.tools.errors import summarize_error

try:
    import simplejpeg
except ImportError:  # Pillow decodes at half the speed
    simplejpeg = None

SIZE = 256
"""Height and width of a stored image in pixels, where a data set has no other."""
LEAST_SIZE, MOST_SIZE = 32, 4096
"""Smallest and largest size to which images are packed, in pixels."""

Pixels = npt.NDArray[np.uint8]

Encoding = Literal["jpeg", "raw"]
"""Encoding of a data set's images: JPEGs, or raw pixels."""

Fit = Literal["square", "shorter", "none"]
"""Size of a data set's images: squares of one size; one shorter side; or each its own."""

Size = tuple[int, int]
"""Height and width of an image in pixels."""

ENDINGS: dict[Encoding, str] = {"jpeg": "jpg", "raw": "npy"}
"""Ending of an image's tar member."""

JPEG = b"\xff\xd8"
"""First bytes of every JPEG."""
COLORS = ("YCbCr", "RGB", "Gray", "L")
"""Color spaces that JPEGs may have, in the names of simplejpeg and Pillow."""
OTHER_FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""Formats besides JPEG that DALI decodes too, in Pillow's names."""
ORIENTATION = 0x0112
"""Number of the Exif tag."""


class Undecodable(Exception):
    """The bytes are no image of the size they should be; the message is the reason, one line."""


LEAST_KEPT = 8
"""JPEGs are decoded at 1/2, 1/4 or 1/8 only as long as this many times the pixels of the side
remain to which they are resampled.

Below that the scaled transform is no antialiased bicubic any more: on ImageNet originals, with 2
times as many pixels left, the image's PSNR falls from 58 to 37 dB, with 4 times to 42 dB.
"""
LONGEST = 65_500
"""Most pixels of a stored image's longer side, as of a JPEG."""


class Sizing(NamedTuple):
    """Size to which images are brought."""

    fit: Fit = "square"
    """square: the central square, `size` on a side; shorter: `size` on the shorter side; none: as
    they are."""
    size: int = SIZE

    def resize(self, height: int, width: int) -> Size:
        """Return height and width of what an image of this size becomes.

        Raises:
            ImageError: too large.
        """
        if self.fit == "square":
            return self.size, self.size
        new, shorter = (height, width), min(height, width)
        if self.fit == "shorter":
            new = round(height * self.size / shorter), round(width * self.size / shorter)
        if max(new) > LONGEST or new[0] * new[1] > MAX_PIXELS:
            raise ImageError(f"too long: {width}x{height} would be stored as {new[1]}x{new[0]}")
        return new

    def choose_reduction(self, side: int) -> int:
        """Return the power of two by which a JPEG of this shorter side is decoded smaller."""
        factor = 1
        while self.fit != "none" and factor < 8 and side // (2 * factor) >= LEAST_KEPT * self.size:
            factor *= 2
        return factor


SQUARE = Sizing()


def encode_npy(pixels: Pixels) -> bytes:
    """Return uint8 [h, w, 3] as a NumPy file (format 1.0, C order): a header, then the pixels."""
    file = io.BytesIO()
    # Version and order are fixed, since the bytes of a data set depend on them.
    np.lib.format.write_array(
        file, np.ascontiguousarray(pixels), version=(1, 0), allow_pickle=False
    )
    return file.getvalue()


def decode_image(
    data: bytes | memoryview, encoding: Encoding = "jpeg", size: Size | None = (SIZE, SIZE)
) -> Pixels:
    """Decode a stored image.

    Args:
        data: a JPEG, gray or RGB, or the pixels of a raw image.
        encoding: which of the two.
        size: height and width that it must have; None, for JPEGs only: any within the limits of
            `jpeg_header`.

    Returns:
        uint8 [height, width, 3], RGB, as DALI returns it (an EXIF orientation is applied).

    Raises:
        Undecodable: it cannot be decoded without an error, or has another shape.
    """
    if encoding == "raw":
        flat = np.frombuffer(data, np.uint8)
        assert size is not None
        if flat.size != 3 * size[0] * size[1]:
            raise Undecodable(f"it has {flat.size:,} bytes, not {size[0]}x{size[1]}x3")
        return flat.reshape(*size, 3)
    data = bytes(data)
    if not data.startswith(JPEG):
        raise Undecodable("it is no JPEG at all")
    header = check_header(data, size)
    try:
        colors = _read_colors(data)
    except Exception as error:  # as above
        raise Undecodable(f"it is no JPEG ({summarize_error(error)})") from error
    if colors not in COLORS:
        raise Undecodable(f"its colours are {colors}, neither RGB nor grey")
    if simplejpeg is None:
        pixels = _decode_with_pillow(data)
    else:
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
        except (ValueError, RuntimeError) as error:
            raise Undecodable(f"it cannot be decoded ({summarize_error(error)})") from error
    if header is not None and header.exif:
        pixels = turn_upright(pixels, read_exif_orientation(header.exif))
    if size is not None and pixels.shape[:2] != size:  # it is turned by its EXIF orientation
        raise Undecodable(_describe_size(pixels.shape[1], pixels.shape[0], size))
    return pixels


def check_header(data: bytes, size: Size | None = (SIZE, SIZE)) -> JpegHeader | None:
    """Return the header of a stored image, None if it is no JPEG; nothing is decoded.

    Args:
        data: the image.
        size: height and width that it must have, or the other way round where an EXIF orientation
            may turn it; None: any within the limits of `jpeg_header`.

    Raises:
        Undecodable: it is no image, of another size, or has more scans than any.
    """
    try:
        header = read_header(data)
        width, height = (header.width, header.height) if header else _read_other_size(data)
        if size is None:
            check_size(width, height, 1)
    except Exception as error:  # parsers raise many kinds of exception on damaged input
        kind = "JPEG" if data.startswith(JPEG) else "image"
        raise Undecodable(f"it is no {kind} ({to_one_line(error)})") from error
    may_turn = header is None or header.exif
    if size is not None and (height, width) != size and not (may_turn and (width, height) == size):
        raise Undecodable(_describe_size(width, height, size))
    return header


def _describe_size(width: int, height: int, size: Size) -> str:
    return f"it is {width}x{height}, not {size[1]}x{size[0]}"


def npy_header_size(npy: bytes) -> int:
    """Return the number of bytes before the pixels of what `encode_npy` returned."""
    return 10 + int.from_bytes(npy[8:10], "little")


def read_exif_orientation(exif: bytes) -> int:
    """Return 1..8 from the Exif data of a JPEG, without the name before it; 1 is upright.

    Raises:
        Undecodable: they are damaged; decoders may read another orientation then.
    """
    tags = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tags.load(exif)
            return valid_orientation(tags.get(ORIENTATION))
    except Exception as error:  # Pillow's reader raises what it pleases on damaged data
        raise Undecodable(f"its EXIF data are damaged ({summarize_error(error)})") from error


def valid_orientation(value: object) -> int:
    """Return an orientation that exists: 1..8, else 1."""
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Return [h, w, 3] as the camera was held, by the numbers of Exif."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


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
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # as above
        raise Undecodable(f"it cannot be decoded ({summarize_error(error)})") from error
    return pixels
