"""One encoded picture of any kind -> 256x256 RGB, as the paper's section 2 prepares ImageNet.

"Given a rectangular image, we first rescaled the image such that the shorter side was of
length 256, and then cropped out the central 256x256 patch from the resulting image."
"""

from __future__ import annotations

import io
import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

SIZE = 256
"""Height and width of a stored picture, in pixels."""

DRAFT_FACTOR = 2
"""JPEGs may be decoded at a reduced scale as long as this many times `SIZE` pixels remain."""

Pixels = npt.NDArray[np.uint8]

Encoding = Literal["jpeg", "raw"]
"""How a data set stores its pictures: as JPEGs, or as the pixels themselves."""

ENDINGS: dict[Encoding, str] = {"jpeg": "jpg", "raw": "npy"}
"""What a picture's member of a tar ends in."""


class PictureError(Exception):
    """The bytes are no picture that can be packed; the message is the reason, one line."""


def square(data: bytes) -> Pixels:
    """Decode a picture and return its central square, 256x256.

    EXIF orientation is honoured; grey, CMYK, palette, 16-bit and transparent pictures (on white)
    become RGB. The resampling is Pillow's antialiased bicubic, which also enlarges.

    Args:
        data: a JPEG, PNG, WebP or any other still picture that Pillow reads.

    Returns:
        uint8 [256, 256, 3], RGB, 0..255.

    Raises:
        PictureError: no picture, truncated, or too large to be one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF, large pictures: not the user's matter
            with Image.open(io.BytesIO(data)) as image:
                _draft(image)
                ImageOps.exif_transpose(image, in_place=True)
                side = min(image.size)
                left, top = (image.width - side) / 2, (image.height - side) / 2
                small = _flat(image).resize(
                    (SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
                )
                return np.asarray(small.convert("RGB"))
    # Pillow's decoders raise what they please on damaged input; whatever it is, it is this file.
    except Exception as error:
        raise PictureError(_one_line(error)) from error


def encode(pixels: Pixels, quality: int) -> bytes:
    """Return a baseline JPEG (4:2:0) of uint8 [h, w, 3]; `quality` is 1..100."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def as_npy(pixels: Pixels) -> bytes:
    """Return uint8 [h, w, 3] as a NumPy file (format 1.0, C order): a header, then the pixels."""
    file = io.BytesIO()
    # The version is named, and the order made sure of: the bytes are what data sets are made of.
    np.lib.format.write_array(
        file, np.ascontiguousarray(pixels), version=(1, 0), allow_pickle=False
    )
    return file.getvalue()


def _draft(image: Image.Image) -> None:
    """Let libjpeg skip what the resize would throw away (it scales by 1/2, 1/4 and 1/8)."""
    side = min(image.size)
    wanted = SIZE * DRAFT_FACTOR
    if image.format == "JPEG" and side > wanted:
        image.draft(None, (image.width * wanted // side, image.height * wanted // side))


def _flat(image: Image.Image) -> Image.Image:
    """Return the picture in a mode that can be resampled: L, RGB or CMYK."""
    if image.mode.startswith(("I", "F")):  # 16-bit grey comes as I;16 or I
        values = np.asarray(image, dtype=np.float64)
        scale = 1 / 257 if values.max(initial=0) > 255 else 1
        return Image.fromarray(np.clip(values * scale, 0, 255).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image if image.mode in {"L", "RGB", "CMYK"} else image.convert("RGB")


def _one_line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no picture: its bytes are of no known format"
    text = str(error).splitlines()
    return text[0] if text else type(error).__name__
