from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, JpegImagePlugin

from pipeline.packing import fast, finish, pixels
from pipeline.packing.careful import square_any
from pipeline.packing.fast import square_jpeg
from pipeline.packing.jpeg_header import read_header
from pipeline.packing.pixels import PictureError, encode, square
from tests.drawn import jpeg
from tests.drawn import pixels as drawn


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


def weights(side: int) -> np.ndarray:
    """The antialiased bicubic kernel (a = -0.5) in float64, [256, side]: Keys' formula."""
    scale = max(side / 256, 1)
    centres = (np.arange(256) + 0.5) * side / 256
    x = np.abs((np.arange(side) + 0.5 - centres[:, None]) / scale)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    kernel = np.where(x < 1, near, np.where(x < 2, far, 0))
    return kernel / kernel.sum(1, keepdims=True)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noisy(seed: int, width: int, height: int) -> np.ndarray:
    """Drawn colours with fine detail on them, which a poor resampling would show."""
    noise = np.random.default_rng(seed).integers(-40, 41, (height, width, 1))
    return (drawn(seed, width, height).astype(int) + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(256, 256), (300, 520), (640, 427), (90, 70), (1400, 1100)])
def test_the_square_is_the_papers(size):
    data = jpeg(3, *size, quality=95)
    got = square(data)
    assert got.shape == (256, 256, 3)
    assert got.dtype == np.uint8
    assert psnr(got, papers_way(data)) > 40


@pytest.mark.parametrize("side", [100, 257, 375, 700])
def test_resampling_is_as_good_as_pillows(side):
    original = noisy(side, side, side)
    across = np.einsum("ij,hjc->hic", weights(side), original.astype(float))
    exact = np.einsum("ij,jwc->iwc", weights(side), across).clip(0, 255)
    pillow = Image.fromarray(original).resize((256, 256), Image.Resampling.BICUBIC)
    got = psnr(fast.shrink(original), exact)
    assert got > 55
    assert got > psnr(np.asarray(pillow), exact) - 0.3


JPEGS = {
    "4:4:4": {"subsampling": 0},
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 2},
    "optimised": {"optimize": True, "quality": 60},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("size", [(401, 333), (120, 171), (256, 300)])
def test_both_roads_agree(options, size):
    check_roads(saved(Image.fromarray(noisy(1, *size)), "JPEG", **options))


def check_roads(data: bytes) -> None:
    header = read_header(data)
    assert header is not None
    quick = square_jpeg(data, header)
    assert quick is not None
    difference = np.abs(quick.astype(int) - square_any(data, 8))
    assert difference.max() <= 2
    assert difference.mean() < 0.02


def test_both_roads_agree_on_grey_and_on_what_they_decode_smaller():
    check_roads(jpeg(4, 300, 400, "L"))
    large = jpeg(5, 4120, 4098, quality=80)
    assert fast.reduction(4098) == 2
    assert fast.reduction(4095) == 1
    check_roads(large)
    assert psnr(square(large), papers_way(large)) > 45


def test_the_fast_road_gives_the_same_bytes_on_a_processor_without_avx(tmp_path):
    code = (
        "import hashlib, sys; from pipeline.packing.fast import shrink; import numpy as np;"
        "p = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8);"
        "print(hashlib.sha256(shrink(p).tobytes() + shrink(p[:90]).tobytes()).hexdigest())"
    )
    root = Path(__file__).parents[1]
    old = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    out = subprocess.run([sys.executable, "-c", code], env=old, cwd=root, capture_output=True)
    rng = np.random.default_rng(0)
    p = rng.integers(0, 256, (375, 500, 3), np.uint8)
    import hashlib

    here = hashlib.sha256(fast.shrink(p).tobytes() + fast.shrink(p[:90]).tobytes()).hexdigest()
    assert out.stdout.decode().strip() == here, out.stderr.decode()


def test_what_was_returned_stays_when_the_next_is_decoded():
    data = [jpeg(seed, *size) for seed, size in enumerate([(256, 256), (300, 256), (500, 400)])]
    kept = [square(one) for one in data]
    copies = [one.copy() for one in kept]
    square(jpeg(9, 500, 500))
    assert all((one == copy).all() for one, copy in zip(kept, copies, strict=True))


def test_threads_do_not_disturb_each_other():
    data = [jpeg(seed, 500, 400) for seed in range(4)]
    expected = [square(one) for one in data]
    wrong: list[int] = []

    def work(place: int) -> None:
        for _ in range(20):
            if not (square(data[place]) == expected[place]).all():
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_every_kind_of_picture_becomes_rgb():
    base = Image.fromarray(drawn(5, 300, 280))
    expected = square(saved(base, "PNG"))
    assert psnr(square(saved(base.convert("CMYK"), "JPEG", quality=98)), expected) > 30
    for kind, options in (("WEBP", {"lossless": True}), ("TIFF", {}), ("BMP", {}), ("PPM", {})):
        assert psnr(square(saved(base, kind, **options)), expected) > 50
    assert psnr(square(saved(base.quantize(256), "PNG")), expected) > 25
    assert psnr(square(saved(base.quantize(256), "GIF")), expected) > 25
    grey = square(saved(base.convert("L"), "JPEG"))
    assert (grey[..., 0] == grey[..., 1]).all()
    assert (grey[..., 0] == grey[..., 2]).all()
    black_and_white = square(saved(Image.new("1", (300, 300), 1), "PNG"))
    assert (black_and_white == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_grey_becomes_eight_bits(kind):
    grey = Image.fromarray(drawn(5, 300, 280)).convert("L")
    expected = square(saved(grey, "PNG"))
    deep = np.asarray(grey).astype(np.uint16) * 257
    assert psnr(square(saved(Image.fromarray(deep), kind)), expected) > 50
    if kind == "TIFF":
        fractions = np.asarray(grey).astype(np.float32) / 255
        fractions[0, 0] = np.nan
        assert psnr(square(saved(Image.fromarray(fractions), kind)), expected) > 45


def test_transparency_lies_on_white():
    layer = Image.new("RGBA", (300, 300), (255, 0, 0, 0))
    assert (square(saved(layer, "PNG")) == 255).all()
    half = square(saved(Image.new("RGBA", (300, 300), (200, 0, 100, 128)), "PNG"))
    assert np.abs(half.astype(int) - [227, 127, 177]).max() <= 1
    palette = Image.new("P", (300, 300), 3)
    palette.putpalette([0, 0, 0] * 3 + [9, 9, 9])
    assert (square(saved(palette, "PNG", transparency=3)) == 255).all()


def test_of_an_animation_it_is_the_first_frame():
    frames = [Image.new("RGB", (300, 300), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(square(data).astype(int) - [255, 0, 0]).max() < 4, kind


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
    got = square(data)
    assert psnr(got, square(saved(upright, "PNG"))) > 33
    assert got.flags.c_contiguous
    if kind == "JPEG":
        check_roads(data)


def profile(gamma: float, space: bytes = b"RGB ") -> bytes:
    """An ICC profile of sRGB's primaries and another curve, made by the specification."""
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


def srgb_of(level: int, gamma: float) -> float:
    """The level in sRGB of one in a space of a pure power, by the standard's formula."""
    light = (level / 255) ** gamma
    return 255 * (12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_colour_profiles_become_srgb(kind):
    colour = (40, 120, 200)
    flat = Image.new("RGB", (300, 270), colour)
    got = square(saved(flat, kind, icc_profile=profile(1.0), quality=100))
    expected = [srgb_of(level, 1.0) for level in colour]
    assert np.abs(got - expected).max() <= 3
    if kind == "JPEG":
        check_roads(saved(flat, kind, icc_profile=profile(1.8)))


def test_profiles_that_change_nothing_or_are_broken_are_ignored():
    picture = Image.fromarray(drawn(3, 300, 270))
    plain = square(saved(picture, "JPEG"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (srgb, b"nonsense", profile(1.8)[:300], profile(1.8, b"CMYK"), b"\0" * 200):
        assert (square(saved(picture, "JPEG", icc_profile=icc)) == plain).all()
    assert not (square(saved(picture, "JPEG", icc_profile=profile(1.8))) == plain).all()
    long = profile(1.8)
    monstrous = long[:-4] + b"\0" * finish.MAX_PROFILE
    assert (finish.pixels_to_srgb(plain, monstrous) == plain).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no picture"),
        (b"hello, I am a text", "no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 300 300\n", "no picture"),
        (jpeg(1)[:-400], "truncated"),
        (jpeg(1)[:200], "truncated"),
        (saved(Image.fromarray(drawn(1, 300, 300)), "PNG")[:-4000], "truncated"),
        (b"\xff\xd8\xff\xd9", "truncated"),
        (jpeg(1, 300, 4), "^too small: 300x4$"),
        (saved(Image.new("L", (4, 300)), "PNG"), "^too small: 4x300$"),
        (b"\xff\xd8" + b"\xff\xe2\0\2" * 5000, "segments"),
        (b"\xff\xd8\xff\xe2\0\2" + b"\0" * 70000 + jpeg(1)[2:], "junk"),
    ],
)
def test_what_is_no_whole_picture_is_refused_with_its_reason(data, reason):
    refused(data, reason)


def refused(data: bytes, reason: str) -> None:
    reasons = []
    for _ in range(2):
        with pytest.raises(PictureError, match=reason) as caught:
            square(data)
        reasons.append(str(caught.value))
    assert reasons[0] == reasons[1]
    check_reason(reasons[0])


def check_reason(reason: str) -> None:
    assert reason.strip()
    assert reason.isprintable(), reason
    assert len(reason) <= 200
    assert not re.search(r"0x[0-9a-f]{6}", reason), reason


def test_the_smallest_side_is_the_callers():
    assert square(jpeg(1, 20, 9)).shape == (256, 256, 3)
    with pytest.raises(PictureError, match="too small: 20x9"):
        square(jpeg(1, 20, 9), min_side=10)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *more: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + body


def test_decompression_bombs_are_refused_by_their_headers():
    data = bytearray(jpeg(1, 300, 300))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 20000, 20000)
    started = time.monotonic()
    refused(bytes(data), "decompression bomb: 20000x20000")
    refused(png(10001, 10000), "decompression bomb: 10001x10000")
    refused(png(60000, 60000), "decompression bomb")
    zeros = zlib.compress(b"\0" * 100_000_000)
    for text in (chunk(b"zTXt", b"a\0\0" + zeros), chunk(b"iCCP", b"a\0\0" + zeros)):
        refused(png(300, 300, text), ".")
    assert time.monotonic() - started < 5


def test_a_jpeg_of_endless_scans_is_refused():
    data = jpeg(1, 300, 300, progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    assert square(data[:-2] + 9 * scan + data[-2:]).shape == (256, 256, 3)
    refused(data[:-2] + 100 * scan + data[-2:], "decompression bomb: 1.. scans of 300x300")


def test_large_files_are_refused(monkeypatch):
    data = jpeg(1)
    monkeypatch.setattr(pixels, "MAX_BYTES", len(data) - 1)
    refused(data, f"^{len(data)} bytes")


FORMATS = {
    "jpeg": lambda p: saved(p, "JPEG"),
    "progressive": lambda p: saved(p, "JPEG", progressive=True, icc_profile=profile(1.8)),
    "cmyk": lambda p: saved(p.convert("CMYK"), "JPEG"),
    "png": lambda p: saved(p, "PNG"),
    "png-p": lambda p: saved(p.quantize(16), "PNG", transparency=3),
    "png-16": lambda p: saved(Image.fromarray(np.asarray(p.convert("L")) * np.uint16(257)), "PNG"),
    "webp": lambda p: saved(p, "WEBP"),
    "gif": lambda p: saved(p.quantize(16), "GIF", save_all=True, append_images=[p.quantize(8)]),
    "tiff": lambda p: saved(p, "TIFF", compression="tiff_lzw"),
    "tiff-jpeg": lambda p: saved(p, "TIFF", compression="jpeg"),
    "bmp": lambda p: saved(p, "BMP"),
    "ppm": lambda p: saved(p, "PPM"),
}


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Bits flipped, bytes set to extremes, pieces cut out, doubled, moved, or the end cut off."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        # Headers are where parsers decide; half of the damage is done there.
        reach = min(len(out), 700) if rng.random() < 0.5 else len(out)
        at = int(rng.integers(0, max(reach, 1)))
        piece = int(rng.integers(1, 64))
        kind = rng.integers(0, 6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            out[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff", b"\xff"])
        elif kind == 2:
            del out[at : at + piece]
        elif kind == 3:
            out[at:at] = out[at : at + piece] * int(rng.integers(1, 20))
        elif kind == 4:
            out[at:at] = rng.bytes(piece)
        elif rng.random() < 0.3:
            del out[at:]
    return bytes(out)


def fuzz(rounds: int, seed: int) -> tuple[int, float]:
    """Return how many of rounds x 12 damaged pictures were still packed, and the slowest's time."""
    rng = np.random.default_rng(seed)
    good, slowest = 0, 0.0
    picture = Image.fromarray(drawn(8, 72, 64))
    for make in FORMATS.values():
        data = make(picture)
        assert square(data).shape == (256, 256, 3)
        for _ in range(rounds):
            damaged = mutated(data, rng)
            started = time.monotonic()
            try:
                got = square(damaged)
                assert got.shape == (256, 256, 3)
                assert got.dtype == np.uint8
                good += 1
            except PictureError as error:
                check_reason(str(error))
            slowest = max(slowest, time.monotonic() - started)
    return good, slowest


def test_damaged_pictures_are_packed_or_refused():
    good, slowest = fuzz(170, seed=1)
    assert 100 < good < 1900  # neither all refused by their first bytes nor hardly touched
    assert slowest < 5


@pytest.mark.parametrize("chroma", ["4:2:0", "4:4:4"])
def test_encoding_keeps_the_picture(chroma):
    original = drawn(9, 256, 256)
    data = encode(original, 90, chroma)
    image = Image.open(io.BytesIO(data))
    assert psnr(np.asarray(image), original) > 35
    assert JpegImagePlugin.get_sampling(image) == {"4:2:0": 2, "4:4:4": 0}[chroma]
    assert b"\xff\xc0" in data  # baseline
    assert encode(original, 90, chroma) == data
    assert encode(original[:, ::-1], 90, chroma) != data
    assert len(encode(original, 50, chroma)) < len(data)


@pytest.mark.parametrize("chroma", ["4:2:0", "4:4:4"])
@pytest.mark.parametrize("quality", [50, 90, 95, 96, 98])
def test_stored_pictures_lose_no_more_than_pillows(quality, chroma):
    original = noisy(9, 256, 256)
    pillow = saved(Image.fromarray(original), "JPEG", quality=quality, subsampling=chroma)
    ours = encode(original, quality, chroma)
    got, theirs = (np.asarray(Image.open(io.BytesIO(data))) for data in (ours, pillow))
    assert psnr(got, original) > psnr(theirs, original) - 0.02
    assert len(ours) < 1.01 * len(pillow)


def test_libraries_print_nothing(capfd):
    data = bytearray(FORMATS["tiff-jpeg"](Image.fromarray(drawn(8, 72, 64))))
    data[data.index(b"\xff\xdb") + 4] = 15  # a quantisation table that cannot be
    refused(bytes(data), ".")
    assert capfd.readouterr() == ("", "")
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"
