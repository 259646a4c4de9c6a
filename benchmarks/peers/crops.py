"""Random crops as all loaders take them; needs Pillow and NumPy alone, for spawned workers."""

from __future__ import annotations

import io
import math
import random

import numpy as np
import numpy.typing as npt
from PIL import Image

CROP = 224

SCALE, RATIO, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10
"""Share of the area and aspect ratio of a resized crop, and draws before the centre is taken:
those of torchvision's RandomResizedCrop."""


def draw_box(width: int, height: int, crop: str) -> tuple[int, int, int, int]:
    """Return left and upper edge, width and height of a random crop of an image."""
    if crop == "random":
        return random.randint(0, width - CROP), random.randint(0, height - CROP), CROP, CROP
    for _ in range(ATTEMPTS):
        area = width * height * random.uniform(*SCALE)
        ratio = math.exp(random.uniform(*map(math.log, RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def crop_jpeg(jpeg: bytes, crop: str) -> npt.NDArray[np.uint8]:
    """Return a random crop of a JPEG file, every second one mirrored; uint8 [224, 224, 3].

    Pillow decodes the whole image (it cannot do less exactly); only the crop is copied or resized.
    """
    image = Image.open(io.BytesIO(jpeg))
    x, y, width, height = draw_box(*image.size, crop)
    image = image.crop((x, y, x + width, y + height))
    if crop == "resized":
        image = image.resize((CROP, CROP), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return np.array(pixels[:, ::-1] if random.random() < 0.5 else pixels)
