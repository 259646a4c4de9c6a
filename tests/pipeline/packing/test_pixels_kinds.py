"""Images of every kind become upright RGB in the colours of sRGB."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from pipeline.packing import resize
from pipeline.packing.resize import decode_square
from tests.helpers.images import pixels as drawn
from tests.helpers.source_images import check_roads, profile, psnr, saved


def test_every_kind_of_image_becomes_rgb():
    base = Image.fromarray(drawn(5, 300, 280))
    expected = decode_square(saved(base, "PNG"))
    assert psnr(decode_square(saved(base.convert("CMYK"), "JPEG", quality=98)), expected) > 30
    for kind, options in (("WEBP", {"lossless": True}), ("TIFF", {}), ("BMP", {}), ("PPM", {})):
        assert psnr(decode_square(saved(base, kind, **options)), expected) > 50
    assert psnr(decode_square(saved(base.quantize(256), "PNG")), expected) > 25
    assert psnr(decode_square(saved(base.quantize(256), "GIF")), expected) > 25
    grey = decode_square(saved(base.convert("L"), "JPEG"))
    assert (grey[..., 0] == grey[..., 1]).all()
    assert (grey[..., 0] == grey[..., 2]).all()
    black_and_white = decode_square(saved(Image.new("1", (300, 300), 1), "PNG"))
    assert (black_and_white == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_grey_becomes_eight_bits(kind):
    grey = Image.fromarray(drawn(5, 300, 280)).convert("L")
    expected = decode_square(saved(grey, "PNG"))
    deep = np.asarray(grey).astype(np.uint16) * 257
    assert psnr(decode_square(saved(Image.fromarray(deep), kind)), expected) > 50
    if kind == "TIFF":
        fractions = np.asarray(grey).astype(np.float32) / 255
        fractions[0, 0] = np.nan
        assert psnr(decode_square(saved(Image.fromarray(fractions), kind)), expected) > 45


def test_transparency_lies_on_white():
    layer = Image.new("RGBA", (300, 300), (255, 0, 0, 0))
    assert (decode_square(saved(layer, "PNG")) == 255).all()
    half = decode_square(saved(Image.new("RGBA", (300, 300), (200, 0, 100, 128)), "PNG"))
    assert np.abs(half.astype(int) - [227, 127, 177]).max() <= 1
    palette = Image.new("P", (300, 300), 3)
    palette.putpalette([0, 0, 0] * 3 + [9, 9, 9])
    assert (decode_square(saved(palette, "PNG", transparency=3)) == 255).all()


def test_of_an_animation_it_is_the_first_frame():
    frames = [Image.new("RGB", (300, 300), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(decode_square(data).astype(int) - [255, 0, 0]).max() < 4, kind


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_honoured(orientation, kind):
    upright = Image.fromarray(drawn(7, 320, 260))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what undoes each orientation
    turned = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(turned, kind, quality=98, exif=exif.tobytes())
    assert (np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).shape) == (
        (260, 320, 3)
    )
    got = decode_square(data)
    assert psnr(got, decode_square(saved(upright, "PNG"))) > 33
    assert got.flags.c_contiguous
    if kind == "JPEG":
        check_roads(data)


def srgb_of(level: int, gamma: float) -> float:
    """The level in sRGB of one in a space of a pure power, by the standard's formula."""
    light = (level / 255) ** gamma
    return 255 * (12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_colour_profiles_become_srgb(kind):
    colour = (40, 120, 200)
    flat = Image.new("RGB", (300, 270), colour)
    got = decode_square(saved(flat, kind, icc_profile=profile(1.0), quality=100))
    expected = [srgb_of(level, 1.0) for level in colour]
    assert np.abs(got - expected).max() <= 3
    if kind == "JPEG":
        check_roads(saved(flat, kind, icc_profile=profile(1.8)))


def test_profiles_that_change_nothing_or_are_broken_are_ignored():
    image = Image.fromarray(drawn(3, 300, 270))
    plain = decode_square(saved(image, "JPEG"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (srgb, b"nonsense", profile(1.8)[:300], profile(1.8, b"CMYK"), b"\0" * 200):
        assert (decode_square(saved(image, "JPEG", icc_profile=icc)) == plain).all()
    assert not (decode_square(saved(image, "JPEG", icc_profile=profile(1.8))) == plain).all()
    long = profile(1.8)
    monstrous = long[:-4] + b"\0" * resize.MAX_PROFILE
    assert (resize.pixels_to_srgb(plain, monstrous) == plain).all()
