"""Stored images and their masks: size, encodings, and strict decoders.

The decoder is the strictest there is: whatever libjpeg would only warn of (a scan that ends early,
stray bytes) is an error. An image that passes decodes everywhere.
"""

from __future__ import annotations

import io
import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.dataset.jpeg_header import (
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
MASK_MODES = ("L", "P", "1")
"""Pillow's names for one channel of at most eight bits: grey, palette, black and white."""
GREY_SCALES = {"L;2": 85, "L;4": 17}
"""Factor by which Pillow brings grey PNGs of 2 and 4 bits to 8."""


class Undecodable(Exception):
    """The bytes are no image of the size they should be; the message is the reason, one line."""


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
    header = _check_jpeg(data, size)
    if simplejpeg is None:
        pixels = _decode_with_pillow(data)
    else:
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
        except (ValueError, RuntimeError) as error:
            raise Undecodable(f"it cannot be decoded ({summarize_error(error)})") from error
    if header is not None and header.exif:
        pixels = turn_upright(pixels, read_exif_orientation(header.exif) or 1)
    if size is not None and pixels.shape[:2] != size:  # it is turned by its EXIF orientation
        raise Undecodable(_describe_size(pixels.shape[1], pixels.shape[0], size))
    return pixels


def measure_jpeg(data: bytes) -> Size:
    """Return height and width of a JPEG as it is shown, from its header: nothing is decoded.

    Raises:
        Undecodable: as `decode_image`, but for damage behind the header.
    """
    header = _check_jpeg(data, None)
    if header is None:
        return decode_image(data, size=None).shape[:2]
    turned = bool(header.exif) and (read_exif_orientation(header.exif) or 1) >= 5
    return (header.width, header.height) if turned else (header.height, header.width)


def _check_jpeg(data: bytes, size: Size | None) -> JpegHeader | None:
    if not data.startswith(JPEG):
        raise Undecodable("it is no JPEG at all")
    header = check_header(data, size)
    try:
        colors = _read_colors(data)
    except Exception as error:  # as in `check_header`
        raise Undecodable(f"it is no JPEG ({summarize_error(error)})") from error
    if colors not in COLORS:
        raise Undecodable(f"its colours are {colors}, neither RGB nor grey")
    return header


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


def read_exif_orientation(exif: bytes, *, strict: bool = True) -> int | None:
    """Return 1..8 from the Exif data of a JPEG, without the name before it; 1 is upright.

    None: they have none. Of damaged ones it is 1, unless `strict`.

    Raises:
        Undecodable: they are damaged; decoders may read another orientation then.
    """
    tags = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error" if strict else "ignore")
            tags.load(exif)
            return valid_orientation(tags.get(ORIENTATION)) if ORIENTATION in tags else None
    except Exception as error:  # Pillow's reader raises what it pleases on damaged data
        if not strict:
            return 1
        raise Undecodable(f"its EXIF data are damaged ({summarize_error(error)})") from error


def read_orientation(image: bytes) -> int:
    """Return 1..8 by which a stored JPEG is turned; 1 for what is damaged, or none."""
    try:
        header = read_header(image)
        return (header and read_exif_orientation(header.exif)) or 1
    except (ImageError, Undecodable):
        return 1


def valid_orientation(value: object) -> int:
    """Return an orientation that exists: 1..8, else 1."""
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Return [h, w, channels] as the camera was held, by the numbers of Exif."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def decode_mask(content: bytes, size: Size, orientation: int = 1) -> Pixels:
    """Decode a mask without changing a value, as its image is shown.

    Where an EXIF orientation turns the image, the size of the mask tells whether it was drawn on
    the image as it is shown (by labelme, CVAT) or as its pixels are stored (by whoever opens it
    with Pillow): then it is turned, too.

    Args:
        content: a PNG.
        size: height and width of its image as it is shown.
        orientation: 1..8, by which the image is turned.

    Returns:
        uint8 [height, width, 1].

    Raises:
        ValueError: it has another size, several channels, or 16 bits; or its size does not tell.
        OSError: it is no PNG, or damaged.
    """
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        if image.mode not in MASK_MODES:
            raise ValueError(f"its pixels are {image.mode}; a mask has one channel of 8 bits")
        found, stored = (image.height, image.width), size[::-1] if orientation >= 5 else size
        if found not in (size, stored):
            height, width = size
            raise ValueError(f"it is {image.width}x{image.height}, its image {width}x{height}")
        if orientation != 1 and size == stored:
            raise ValueError(
                f"its image is turned by EXIF orientation {orientation}, and its size does not "
                "tell whether the mask is, too; store the image upright"
            )
        scale = GREY_SCALES.get(str(image.tile[0].args), 1) if image.tile else 1
        values = (np.array(image, np.uint8) // scale)[:, :, None]
    return values if found == size else turn_upright(values, orientation)


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
