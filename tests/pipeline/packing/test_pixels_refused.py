"""Truncated images, files of other kinds and traps are refused with a reason."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import struct
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline.options import BuildConfig
from pipeline.packing import resize
from pipeline.packing.resize import ImageError, decode_square
from pipeline.tools.processes import Crash, call_isolated
from tests.helpers.images import jpeg
from tests.helpers.images import pixels as drawn
from tests.helpers.source_images import profile, saved


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no image"),
        (b"hello, I am a text", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 300 300\n", "no image"),
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
def test_what_is_no_whole_image_is_refused_with_its_reason(data, reason):
    refused(data, reason)


def refused(data: bytes, reason: str) -> None:
    reasons = []
    for _ in range(2):
        with pytest.raises(ImageError, match=reason) as caught:
            decode_square(data)
        reasons.append(str(caught.value))
    assert reasons[0] == reasons[1]
    check_reason(reasons[0])


def check_reason(reason: str) -> None:
    assert reason.strip()
    assert reason.isprintable(), reason
    assert len(reason) <= 200
    assert not re.search(r"0x[0-9a-f]{6}", reason), reason


def test_the_smallest_side_is_the_callers():
    assert decode_square(jpeg(1, 20, 9)).shape == (256, 256, 3)
    with pytest.raises(ImageError, match="too small: 20x9"):
        decode_square(jpeg(1, 20, 9), min_side=10)


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
    assert decode_square(data[:-2] + 9 * scan + data[-2:]).shape == (256, 256, 3)
    refused(data[:-2] + 100 * scan + data[-2:], "decompression bomb: 1.. scans of 300x300")


@pytest.mark.parametrize("process", [2, 6, 10, 14])
def test_every_progressive_process_has_its_scans_counted(process):
    """Arithmetic coding (SOF10) is progressive as well; its first scan, too, is of everything."""
    data = jpeg(1, 300, 300, progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    data = (data[:-2] + 3000 * scan + data[-2:]).replace(b"\xff\xc2", bytes([0xFF, 0xC0 + process]))
    started = time.monotonic()
    refused(data, "decompression bomb: 30.. scans of 300x300")
    assert time.monotonic() - started < 5


def test_a_jpeg_of_two_frames_is_refused():
    data = jpeg(1, 300, 300)
    at = data.index(b"\xff\xc0")
    frame = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
    refused(data[:at] + frame + data[at:], "several frames")


def test_large_files_are_refused(monkeypatch):
    data = jpeg(1)
    monkeypatch.setattr(resize, "MAX_BYTES", len(data) - 1)
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
    """Return how many of rounds x 12 damaged images were still packed, and the slowest's time."""
    rng = np.random.default_rng(seed)
    good, slowest = 0, 0.0
    image = Image.fromarray(drawn(8, 72, 64))
    for make in FORMATS.values():
        data = make(image)
        assert decode_square(data).shape == (256, 256, 3)
        for _ in range(rounds):
            damaged = mutated(data, rng)
            started = time.monotonic()
            try:
                got = decode_square(damaged)
                assert got.shape == (256, 256, 3)
                assert got.dtype == np.uint8
                good += 1
            except ImageError as error:
                check_reason(str(error))
            slowest = max(slowest, time.monotonic() - started)
    return good, slowest


def test_damaged_images_are_packed_or_refused():
    good, slowest = fuzz(170, seed=1)
    assert 100 < good < 1900  # neither all refused by their first bytes nor hardly touched
    assert slowest < 5


def test_libraries_print_nothing(capfd):
    data = bytearray(FORMATS["tiff-jpeg"](Image.fromarray(drawn(8, 72, 64))))
    data[data.index(b"\xff\xdb") + 4] = 15  # a quantisation table that cannot be
    refused(bytes(data), ".")
    assert capfd.readouterr() == ("", "")
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"


def test_a_jpeg_that_lost_its_data_is_truncated_though_it_has_an_end():
    """Pillow alone would make the rest up in grey."""
    whole = jpeg(3, 400, 300)
    header = whole.index(b"\xff\xda") + 14
    third = whole[: len(whole) // 3] + b"\xff\xd9"
    none = whole[:header] + b"\xff\xd9"
    size = whole.index(b"\xff\xc0") + 5
    larger = whole[:size] + struct.pack(">HH", 3000, 4000) + whole[size + 4 :]
    for data in (third, none, larger):
        with pytest.raises(ImageError, match="truncated"):
            decode_square(data)
    assert decode_square(whole).shape == (256, 256, 3)


def test_slow_kinds_are_refused_by_what_they_say_of_themselves(monkeypatch):
    with pytest.raises(ImageError, match="written as text"):
        decode_square(b"P3 300 300 255\n" + b"1 " * 270_000)
    binary = b"P6 300 300 255\n" + bytes(270_000)
    assert decode_square(binary).max() == 0
    strips = Image.new("L", (64, 64))
    data = saved(strips, "TIFF", strip_size=1)
    assert decode_square(data).shape == (256, 256, 3)
    monkeypatch.setattr("pipeline.packing.resize.MAX_OTHER_BYTES", 1000)
    with pytest.raises(ImageError, match="more than it may have"):
        decode_square(binary)


def test_a_decoder_in_python_is_stopped(monkeypatch):
    from pipeline.dataset import jpeg_header
    from pipeline.packing import resize as careful

    def forever(*_):
        while True:
            pass

    monkeypatch.setattr(careful, "_crop_and_resample", forever)
    monkeypatch.setattr(careful, "limit_time", lambda: jpeg_header.limit_time(0.05))
    with pytest.raises(ImageError, match=r"takes more than 0\.05 s"):
        decode_square(saved(Image.new("L", (64, 64)), "PNG"))


def test_a_decoder_that_python_cannot_interrupt_ends_with_its_process(monkeypatch):
    """A pool then packs its chunk with `careful`, where the image alone is refused."""
    from pipeline.packing import chunks

    def busy(*_):
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # native code that takes an hour

    monkeypatch.setattr("pipeline.dataset.jpeg_header.MAX_CPU_SECONDS", 0.1)
    monkeypatch.setattr(chunks, "prepare_image", busy)
    job = SimpleNamespace(options=BuildConfig(out="out", train="in"), number=0)
    sample = chunks.SourceSample(b"", {})
    with pytest.raises(Crash, match="SIGVTALRM"):
        call_isolated(chunks._decode, sample, job.options)
    assert chunks._decode_isolated(sample, job) == "decoding it takes more than 75 s"
    monkeypatch.setattr(chunks, "prepare_image", lambda *_: "pixels")
    assert chunks._decode_isolated(sample, job).image == "pixels"
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
