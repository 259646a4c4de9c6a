"""A stored picture: how large it is, what encodings there are, and the raw one.

How pictures of any kind become one is `pipeline.packing.resize`.
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import numpy.typing as npt

SIZE = 256
"""Height and width of a stored picture, in pixels."""

Pixels = npt.NDArray[np.uint8]

Encoding = Literal["jpeg", "raw"]
"""How a data set stores its pictures: as JPEGs, or as the pixels themselves."""

ENDINGS: dict[Encoding, str] = {"jpeg": "jpg", "raw": "npy"}
"""What a picture's member of a tar ends in."""


def as_npy(pixels: Pixels) -> bytes:
    """Return uint8 [h, w, 3] as a NumPy file (format 1.0, C order): a header, then the pixels."""
    file = io.BytesIO()
    # The version is named, and the order made sure of: the bytes are what data sets are made of.
    np.lib.format.write_array(
        file, np.ascontiguousarray(pixels), version=(1, 0), allow_pickle=False
    )
    return file.getvalue()
