"""The crop that users of the loaders in Python would write."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from torture.images import CROP, SIDE


def random_crop(jpeg: bytes) -> torch.Tensor:
    """Return a random crop of a JPEG file, every second one mirrored; uint8 [48, 48, 3].

    torch's generator of the process draws, as that of torchvision's transforms.
    """
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    x, y = torch.randint(0, SIDE - CROP + 1, (2,)).tolist()
    pixels = np.asarray(image.crop((x, y, x + CROP, y + CROP)))
    return torch.from_numpy(np.array(pixels[:, ::-1] if torch.rand(()) < 0.5 else pixels))
