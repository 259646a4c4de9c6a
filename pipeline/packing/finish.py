"""What both roads do with the small square: its colours become sRGB, and it is turned upright.

Both steps are as good after the resampling as before it, and cost a fraction there.
"""

from __future__ import annotations

import io
import warnings
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from pipeline.dataset.images import Pixels

MAX_PROFILE = 4 * 2**20
"""Bytes of a colour profile; larger ones are ignored."""
SAME = 1
"""Levels by which a profile may move a colour and still count as sRGB."""

_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return the RGB picture in sRGB of one in L, RGB or CMYK; a broken profile is ignored."""
    transform = None if profile is None else _transform(profile, image.mode)
    if transform is not None:
        try:
            converted = ImageCms.applyTransform(image, transform)
            assert converted is not None  # it is not in place
            return converted
        except (ImageCms.PyCMSError, ValueError):
            pass
    return image.convert("RGB")


def pixels_to_srgb(pixels: Pixels, profile: bytes | None) -> Pixels:
    """Return uint8 [h, w, 3] in sRGB; itself where the profile says so, is none, or is broken."""
    if profile is None or _transform(profile, "RGB") is None:
        return pixels
    return np.asarray(to_srgb(Image.fromarray(pixels), profile))


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the way to sRGB; None where there is nothing to do, or the profile will not do.

    Many a profile is sRGB under another name: it is told by what it does to a cube of colours.
    """
    if len(profile) > MAX_PROFILE:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(source, _srgb(), mode, "RGB")
        if mode == "RGB":
            steps = np.arange(0, 256, 15, dtype=np.uint8)
            cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(len(steps), -1, 3)
            moved = ImageCms.applyTransform(Image.fromarray(cube), transform)
            if np.abs(np.asarray(moved).astype(int) - cube).max() <= SAME:
                return None
        return transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def orientation(exif: bytes) -> int:
    """Return 1..8 from the Exif data of a JPEG; 1, upright, where they say nothing valid."""
    if not exif:
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tags = Image.Exif()
            tags.load(exif)
            return valid(tags.get(ORIENTATION))
    except Exception:  # Pillow's reader raises what it pleases on damaged data
        return 1


ORIENTATION = 0x0112
"""Number of the Exif tag."""


def valid(value: object) -> int:
    """Return an orientation that exists: 1..8, else 1."""
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(pixels: Pixels, orientation: int) -> Pixels:
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
