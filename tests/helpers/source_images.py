"""Images in many formats, and what their squares must hold to."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, ImageCms

from pipeline.dataset.jpeg_header import read_header
from pipeline.packing.resize import jpeg_path, pillow_path


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def check_roads(data: bytes) -> None:
    header = read_header(data)
    assert header is not None
    quick = jpeg_path(data, header)
    assert quick is not None
    difference = np.abs(quick.astype(int) - pillow_path(data, 8))
    assert difference.max() <= 2
    assert difference.mean() < 0.02


def profile(gamma: float, space: bytes = b"RGB ") -> bytes:
    """Return an ICC profile of sRGB's primaries and another curve, made by the specification."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    count = struct.unpack(">I", srgb[128:132])[0]
    entries = [struct.unpack(">4sII", srgb[132 + 12 * n : 144 + 12 * n]) for n in range(count)]
    curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256)) + b"\0\0"
    tags = [
        (name, curve if name.endswith(b"TRC") else srgb[at : at + size])
        for name, at, size in entries
    ]
    at = 132 + 12 * count
    table, body = b"", b""
    for name, content in tags:
        table += struct.pack(">4sII", name, at + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    header = srgb[4:16] + space + srgb[20:128]
    whole = header + struct.pack(">I", count) + table + body
    return struct.pack(">I", len(whole) + 4) + whole
