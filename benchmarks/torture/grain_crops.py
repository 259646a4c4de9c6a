"""Grain's transformation, apart from all that its spawned workers would have to import."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from torture.images import CROP, SIDE


def crop_record(record: bytes, rng: np.random.Generator) -> dict[str, Any]:
    """Return number and random crop of a record, uint8 [48, 48, 3]."""
    image = Image.open(io.BytesIO(record[4:])).convert("RGB")
    x, y = rng.integers(0, SIDE - CROP + 1, 2).tolist()
    pixels = np.asarray(image.crop((x, y, x + CROP, y + CROP)))
    return {
        "id": int.from_bytes(record[:4], "little"),
        "pixels": np.array(pixels[:, ::-1] if rng.random() < 0.5 else pixels),
    }
