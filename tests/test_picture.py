from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.picture import PictureError, encode, square
from tests.drawn import jpeg, pixels


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def papers_way(data: bytes) -> np.ndarray:
    """Shorter side to 256, then the central 256x256, in two steps as the paper words it."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = 256 / min(image.size)
    size = [max(256, round(side * scale)) for side in image.size]
    big = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = (big.shape[0] - 256) // 2, (big.shape[1] - 256) // 2
    return big[top : top + 256, left : left + 256]


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(256, 256), (300, 520), (640, 427), (90, 70), (1400, 1100)])
def test_the_square_is_the_papers(size):
    data = jpeg(3, *size, quality=95)
    got = square(data)
    assert got.shape == (256, 256, 3)
    assert got.dtype == np.uint8
    assert psnr(got, papers_way(data)) > 40


def test_every_kind_of_picture_becomes_rgb():
    base = Image.fromarray(pixels(5, 300, 280))
    expected = square(saved(base, "PNG"))
    assert psnr(square(saved(base.convert("CMYK"), "JPEG", quality=98)), expected) > 30
    assert psnr(square(saved(base, "WEBP", lossless=True)), expected) > 50
    grey = square(saved(base.convert("L"), "JPEG"))
    assert (grey[..., 0] == grey[..., 1]).all()
    assert (grey[..., 0] == grey[..., 2]).all()
    deep = np.asarray(base.convert("L")).astype(np.uint16) * 257
    assert (
        psnr(square(saved(Image.fromarray(deep), "PNG")), square(saved(base.convert("L"), "PNG")))
        > 50
    )
    assert psnr(square(saved(base.quantize(256), "PNG")), expected) > 25


def test_transparency_lies_on_white():
    layer = Image.new("RGBA", (300, 300), (255, 0, 0, 0))
    assert (square(saved(layer, "PNG")) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation):
    upright = Image.fromarray(pixels(7, 320, 260))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what undoes each orientation
    turned = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(turned, "JPEG", quality=98, exif=exif.tobytes())
    assert psnr(square(data), square(saved(upright, "PNG"))) > 33


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no picture"),
        (b"hello, I am a text", "no picture"),
        (jpeg(1)[:-400], "truncated"),
        (jpeg(1)[:200], "Truncated"),
    ],
)
def test_what_is_no_whole_picture_is_refused_with_its_reason(data, reason):
    with pytest.raises(PictureError, match=reason) as caught:
        square(data)
    assert "\n" not in str(caught.value)


def test_encoding_keeps_the_picture():
    original = pixels(9, 256, 256)
    data = encode(original, 90)
    assert psnr(np.asarray(Image.open(io.BytesIO(data))), original) > 35
