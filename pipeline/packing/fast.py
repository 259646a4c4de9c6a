"""The JPEG road: libjpeg-turbo, then torch's antialiased bicubic resampling on bytes.

Twice as fast as Pillow on both steps. The resampling is derived from Pillow's: same kernel, same
whole-number arithmetic but for the precision of the weights, so that a value differs by at most 2
levels (in 0.3 % of the values by 1), and gives the same bytes with AVX-512, AVX2 or neither.
"""

from __future__ import annotations

import threading

import numpy as np
import simplejpeg
import torch

from pipeline.dataset.images import SIZE, Pixels
from pipeline.packing.finish import orientation, pixels_to_srgb, upright
from pipeline.packing.jpeg_header import JpegHeader
from pipeline.packing.limits import PictureError

KEPT = 8
"""JPEGs are decoded at 1/2, 1/4 or 1/8 only as long as this many times `SIZE` pixels remain.

Below that the scaled transform is no antialiased bicubic any more: on ImageNet originals, with 2
times as many pixels left, the picture's PSNR falls from 58 to 37 dB, with 4 times to 42 dB.
"""


SCRATCH = 4 * 2**20
"""Bytes of decoded pictures that are put in the same place each time, where the cache has them."""


class _Scratch(threading.local):
    """Each thread's memory for the picture in hand."""

    def __init__(self) -> None:
        self.decoded = np.empty(SCRATCH, np.uint8)
        self.cut = np.empty(SCRATCH, np.uint8)


_scratch = _Scratch()


def reduction(side: int) -> int:
    """Return the power of two by which a JPEG of this shorter side is decoded smaller."""
    factor = 1
    while factor < 8 and side // (2 * factor) >= KEPT * SIZE:
        factor *= 2
    return factor


def square_jpeg(data: bytes, header: JpegHeader) -> Pixels | None:
    """Return the central square of a plain JPEG, or None where its decoder refuses or warns.

    Args:
        data: the JPEG.
        header: of it; `plain`, and of a size that may be decoded.

    Returns:
        uint8 [256, 256, 3], sRGB.

    Raises:
        PictureError: its data ends before the picture does.
    """
    profile = header.profile
    if profile is not None and header.components == 1:
        return None  # what a grey profile says of greys is lost in RGB
    factor = reduction(min(header.width, header.height))
    height, width = -(-header.height // factor), -(-header.width // factor)
    try:
        pixels = simplejpeg.decode_jpeg(
            data,
            min_height=height,
            min_width=width,
            min_factor=factor,
            buffer=_scratch.decoded if 3 * height * width <= SCRATCH else None,
        )
    except ValueError as error:
        if "premature end" in str(error).lower():  # Pillow would make it up in grey
            raise PictureError(f"truncated: {error}") from error
        return None
    except MemoryError:
        return None
    return upright(pixels_to_srgb(shrink(pixels), profile), orientation(header.exif))


def shrink(pixels: Pixels) -> Pixels:
    """Return the central square of uint8 [h, w, 3], resampled to [256, 256, 3].

    The square is cut out first: what lies beside it is not resampled.
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    if side == SIZE:
        return square.copy()  # what is decoded next lies where this does
    if not square.flags.c_contiguous:
        square = _contiguous(square)
    # [1, 3, side, side] in channels-last order without a copy: torch has a road of its own for it.
    planes = torch.from_numpy(square)[None].permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(planes, (SIZE, SIZE), mode="bicubic", antialias=True)
    return small[0].permute(1, 2, 0).contiguous().numpy()


def _contiguous(square: Pixels) -> Pixels:
    if square.size > SCRATCH:
        return np.ascontiguousarray(square)
    copy = _scratch.cut[: square.size].reshape(square.shape)
    np.copyto(copy, square)
    return copy
