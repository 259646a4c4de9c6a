"""One encoded picture of any kind -> 256x256 RGB, as the paper's section 2 prepares ImageNet.

"Given a rectangular image, we first rescaled the image such that the shorter side was of
length 256, and then cropped out the central 256x256 patch from the resulting image."

Plain JPEGs take `fast`; everything else, and what its strict decoder does not like, `careful`.
Both cut the square out first and resample it with an antialiased bicubic kernel, which also
enlarges. The sources are not trusted: see `limits`.
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image

from pipeline.dataset.images import Pixels
from pipeline.packing.careful import square_any
from pipeline.packing.fast import square_jpeg
from pipeline.packing.jpeg_header import read_header
from pipeline.packing.limits import MAX_BYTES, PictureError, check_size

__all__ = ["Chroma", "PictureError", "encode", "one_thread", "square"]

Chroma = Literal["4:2:0", "4:4:4"]
"""How a JPEG keeps its colours: at half the width and height, or in full."""

ACCURATE = 96
"""Quality from which on libjpeg-turbo's own interface, which simplejpeg uses, is accurate."""


def square(data: bytes, min_side: int = 8) -> Pixels:
    """Decode a picture and return its central square, 256x256.

    EXIF orientation is honoured; grey, CMYK, palette, 16-bit and transparent pictures (on white)
    become RGB, and colour profiles sRGB. Of an animation it is the first frame.

    Args:
        data: a JPEG, PNG, WebP, GIF, BMP or TIFF.
        min_side: smaller pictures, in pixels of their shorter side, are refused.

    Returns:
        uint8 [256, 256, 3], RGB, 0..255.

    Raises:
        PictureError: no picture, truncated, too small, or beyond the `limits`.
    """
    if len(data) > MAX_BYTES:
        raise PictureError(f"{len(data)} bytes are more than a picture may have ({MAX_BYTES})")
    header = read_header(data)
    if header is not None:
        check_size(header.width, header.height, min_side)
        if header.plain and (pixels := square_jpeg(data, header)) is not None:
            return pixels
    return square_any(data, min_side)


def encode(pixels: Pixels, quality: int, chroma: Chroma = "4:2:0") -> bytes:
    """Return a baseline JPEG of uint8 [h, w, 3]; `quality` is 1..100.

    The cosine transform is the accurate one. simplejpeg, the quicker encoder, takes it from
    quality 96 on only; its fast one would cost 0.3 dB at 95 (0.6 at 4:4:4).
    """
    if quality < ACCURATE:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=chroma)
        return file.getvalue()
    return bytes(
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels),
            quality=quality,
            colorspace="RGB",
            colorsubsampling=chroma.replace(":", ""),
            fastdct=False,  # its rounding would cost 0.3 dB
        )
    )


def one_thread() -> None:
    """Keep this process to one core; a worker of a pool calls it at its start."""
    torch.set_num_threads(1)
