"""Images of every kind become upright RGB in the colours of sRGB."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from pipeline.dataset.jpeg_header import ImageError
from pipeline.packing import formats, resize
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


def with_tag(tiff: bytes, tag: int, before: int, after: int) -> bytes:
    """Change a short number in the directory of a TIFF."""
    old, new = (struct.pack("<HHIHH", tag, 3, 1, value, 0) for value in (before, after))
    assert tiff.count(old) == 1
    return tiff.replace(old, new)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("level", [0, 1, 200, 255, 256, 20_000, 65_535])
def test_the_scale_of_deep_grey_follows_from_its_type(kind, level):
    data = saved(Image.fromarray(np.full((280, 300), level, np.uint16)), kind)
    assert (decode_square(data) == round(level / 257)).all()


def test_the_scale_of_other_deep_types():
    def square(values: np.ndarray, kind: str = "TIFF") -> int:
        (level,) = np.unique(decode_square(saved(Image.fromarray(values), kind)))
        return level

    full = np.ones((280, 300), np.uint16)
    assert square(full.astype(np.float32) * 0.004) == 1
    assert square(full.astype(np.float32)) == square(full.astype(np.float32) * 1.05) == 255
    for values, words in (
        (full.astype(np.float32) * 200, "fractions beyond 1, whose white is unknown"),
        (full.astype(np.int32) * 60_000, "whole numbers of 32 bits, whose white is unknown"),
    ):
        with pytest.raises(ImageError, match=words):
            square(values)
    tiff = saved(Image.fromarray(full * 0x4040), "TIFF")
    assert (decode_square(with_tag(tiff, 262, 1, 0)) == 255 - 64).all()  # 0 is white
    signed = struct.pack("<HHIHH", 339, 3, 1, 2, 0)
    longer = bytearray(saved(Image.fromarray(full * 0x4040), "TIFF", tiffinfo={339: 1}))
    at = longer.index(signed[:8])
    longer[at : at + 12] = signed
    assert (decode_square(bytes(longer)) == 128).all()
    assert (decode_square(with_tag(saved(Image.fromarray(full * 0xFFFF), "TIFF"), 258, 16, 12))
            == 255).all()  # fmt: skip


def png(width: int, depth: int, color: int, row: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a square PNG of equal rows."""
    header = struct.pack(">IIBBBBB", width, width, depth, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress((b"\0" + row) * width))]
    return formats.PNG + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (*parts, (b"IEND", b""))
    )


@pytest.mark.parametrize(
    ("depth", "color", "clear", "pixel"),
    [
        (1, 0, b"\0\0", b"\x00"),
        (2, 0, b"\0\1", b"\x55"),
        (4, 0, b"\0\5", b"\x55"),
        (8, 0, b"\0\5", b"\x05"),
        (16, 0, b"\1\5", b"\x01\x05"),
        (8, 2, b"\0\1\0\2\0\3", b"\1\2\3"),
        (16, 2, b"\1\7\2\7\3\7", b"\1\7\2\7\3\7"),
    ],
)
def test_one_transparent_value_of_a_png_lies_on_white(depth, color, clear, pixel):
    row = pixel * (300 * depth * (3 if color else 1) // (8 * len(pixel)) + 1)
    row = row[: -(-300 * depth * (3 if color else 1) // 8)]
    assert (decode_square(png(300, depth, color, row, (b"tRNS", clear))) == 255).all()
    other = clear[:-1] + bytes([clear[-1] ^ 1])
    other = bytes([clear[0] ^ 1]) + other[1:] if depth == 16 else other
    assert (decode_square(png(300, depth, color, row, (b"tRNS", other))) < 128).all()


LONG = 5 << 20
"""Bytes of a text that Pillow refuses."""


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(LONG)))],
        [(b"iTXt", b"Comment\0\1\0en\0\0" + zlib.compress(bytes(LONG)))],
        [(b"iTXt", b"Comment\0\0\0en\0\0" + b"x" * LONG)],
        [(b"tEXt", b"Comment\0" + b"x" * LONG)],
        [(b"zTXt", b"a\0\0" + zlib.compress(bytes(4_000_000)))] * 20,
        [(b"iCCP", b"a\0\0" + zlib.compress(bytes(LONG)))],
        [(b"iCCP", b"a\0\7" + zlib.compress(b"x"))],
        [(b"iCCP", b"abc")],
        [(b"zTXt", b"a\0\7x")],
        [(b"zTXt", b"a\0\0x"), (b"zTXt", b""), (b"iTXt", b"a\0"), (b"tEXt", b"x")],
        [(b"eXIf", b"nonsense")],
    ],
)
def test_what_stands_beside_the_pixels_of_a_png_is_no_reason_to_refuse_it(chunks):
    assert (decode_square(png(300, 8, 0, b"\x40" * 300, *chunks)) == 64).all()


def test_a_long_text_takes_no_other_with_it():
    long = profile(1.8)
    long = struct.pack(">I", len(long) + (2 << 20)) + long[4:] + bytes(2 << 20)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * LONG, zip=True)
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="3"/>')
    image = Image.fromarray(drawn(3, 300, 270))
    got = decode_square(saved(image, "PNG", pnginfo=text, icc_profile=long))
    expected = decode_square(saved(image, "PNG", icc_profile=profile(1.8)))
    assert (got[::-1, ::-1] == expected).all()


def test_orientation_of_xmp_counts_where_exif_has_none():
    upright = Image.fromarray(drawn(7, 320, 260))
    xmp = b'<rdf tiff:Orientation="3"/>'
    data = saved(upright, "JPEG", quality=98, xmp=xmp)
    assert (
        decode_square(data)[::-1, ::-1] == decode_square(saved(upright, "JPEG", quality=98))
    ).all()
    check_roads(data)
    exif = Image.Exif()
    exif[0x0112] = 1
    both = saved(upright, "JPEG", quality=98, xmp=xmp, exif=exif.tobytes())
    assert (decode_square(both)[::-1, ::-1] == decode_square(data)).all()


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
    monstrous = long[:-4] + b"\0" * formats.MAX_PROFILE
    assert (resize.pixels_to_srgb(plain, monstrous) == plain).all()
