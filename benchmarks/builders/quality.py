"""Quality of stored images against an exact antialiased bicubic resampling of the originals."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from harness.report import Table
from PIL import Image

from pipeline.dataset.jpeg_header import read_header
from pipeline.packing.resize import Chroma, encode, resample

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

CHROMAS: tuple[Chroma, ...] = ("4:2:0", "4:4:4")


def resample_exactly(pixels: Pixels) -> Floats:
    """Return float64 [256, 256, 3] of uint8 [side, side, 3]: Keys' kernel, a = -0.5, widened."""
    side = len(pixels)
    scale = max(side / 256, 1)
    centres = (np.arange(256) + 0.5) * side / 256
    x = np.abs((np.arange(side) + 0.5 - centres[:, None]) / scale)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    kernel = np.where(x < 1, near, np.where(x < 2, far, 0))
    kernel /= kernel.sum(1, keepdims=True)
    across = np.matmul(kernel, pixels.astype(np.float64))
    return np.tensordot(kernel, across, (1, 0)).clip(0, 255)


def resample_by_pillow(pixels: Pixels) -> Pixels:
    """Return Pillow's antialiased bicubic resampling to 256x256."""
    image = Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC)
    return np.asarray(image)


def encode_by_pillow(pixels: Pixels, quality: int, chroma: Chroma) -> bytes:
    """Return the image as Pillow's JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=chroma)
    return file.getvalue()


def compute_psnr(a: Pixels, b: Floats) -> float:
    """Return the peak signal-to-noise ratio in decibels."""
    return float(10 * np.log10(255**2 / max(float(np.mean((a - b) ** 2)), 1e-9)))


def measure_quality(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Measure each way to resample and to store over plain JPEGs among the files."""
    squares = []
    for file in files:
        data = file.read_bytes()
        header = read_header(data)
        if header is not None and header.plain:
            pixels = simplejpeg.decode_jpeg(data)
            side = min(pixels.shape[:2])
            top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
            squares.append(np.ascontiguousarray(pixels[top : top + side, left : left + side]))
    references = [resample_exactly(square) for square in squares]
    rows = []
    for name, shrink, store in (
        ("ours", resample, encode),
        ("Pillow", resample_by_pillow, encode_by_pillow),
    ):
        small = [shrink(square) for square in squares]
        unstored = [compute_psnr(a, b) for a, b in zip(small, references, strict=True)]
        rows.append({"road": name, "stored": "as pixels", "psnr": _mean(unstored)})
        for quality, chroma in product((90, 95, 96), CHROMAS):
            rows.append(_measure_encoding(name, small, references, store, quality, chroma))
    return rows


def _measure_encoding(
    name: str,
    small: list[Pixels],
    references: list[Floats],
    store: Callable[[Pixels, int, Chroma], bytes],
    quality: int,
    chroma: Chroma,
) -> dict[str, Any]:
    started = time.thread_time()
    stored = [store(pixels, quality, chroma) for pixels in small]
    encoding = time.thread_time() - started
    started = time.thread_time()
    decoded = [simplejpeg.decode_jpeg(data) for data in stored]
    decoding = time.thread_time() - started
    lost = [compute_psnr(a, b) for a, b in zip(decoded, references, strict=True)]
    return {
        "road": name,
        "stored": f"q{quality} {chroma}",
        "psnr": _mean(lost),
        "psnr_worst": round(min(lost), 1),
        "bytes": round(statistics.mean(map(len, stored))),
        "encode_ms": round(1000 * encoding / len(stored), 3),
        "decode_ms": round(1000 * decoding / len(stored), 3),
    }


def make_quality_table(rows: list[dict[str, Any]]) -> Table:
    """Return the measurements as a table."""
    titles = {"psnr": "PSNR dB", "psnr_worst": "worst", "bytes": "bytes"}
    titles |= {"encode_ms": "encode ms", "decode_ms": "decode ms"}
    cells = [
        (row["road"], row["stored"], *(str(row.get(key, "")) for key in titles)) for row in rows
    ]
    title = "against an exact (float64) antialiased bicubic of the decoded originals"
    return Table(("road", "stored", *titles.values()), cells, title)


def _mean(values: list[float]) -> float:
    return round(statistics.mean(values), 2)
