"""The square of 256 that is packed: resampled as the paper has it, on two roads."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from pipeline.packing import resize
from pipeline.packing.resize import decode_square, encode
from tests.helpers.images import jpeg
from tests.helpers.images import pixels as drawn
from tests.helpers.source_images import check_roads, psnr, saved


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


def noisy(seed: int, width: int, height: int) -> np.ndarray:
    """Drawn colours with fine detail on them, which a poor resampling would show."""
    noise = np.random.default_rng(seed).integers(-40, 41, (height, width, 1))
    return (drawn(seed, width, height).astype(int) + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(256, 256), (300, 520), (640, 427), (90, 70), (1400, 1100)])
def test_the_square_is_the_papers(size):
    data = jpeg(3, *size, quality=95)
    got = decode_square(data)
    assert got.shape == (256, 256, 3)
    assert got.dtype == np.uint8
    assert psnr(got, papers_way(data)) > 40


@pytest.mark.parametrize("side", [100, 257, 375, 700])
def test_resampling_is_as_good_as_pillows(side):
    original = noisy(side, side, side)
    across = np.einsum("ij,hjc->hic", weights(side), original.astype(float))
    exact = np.einsum("ij,jwc->iwc", weights(side), across).clip(0, 255)
    pillow = Image.fromarray(original).resize((256, 256), Image.Resampling.BICUBIC)
    got = psnr(resize.resample(original), exact)
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


def test_both_roads_agree_on_grey_and_on_what_they_decode_smaller():
    check_roads(jpeg(4, 300, 400, "L"))
    large = jpeg(5, 4120, 4098, quality=80)
    assert resize.SQUARE.choose_reduction(4098) == 2
    assert resize.SQUARE.choose_reduction(4095) == 1
    check_roads(large)
    assert psnr(decode_square(large), papers_way(large)) > 45


def test_the_fast_road_gives_the_same_bytes_on_a_processor_without_avx(tmp_path):
    code = (
        "import hashlib, sys; from pipeline.packing.resize import resample; import numpy as np;"
        "p = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8);"
        "print(hashlib.sha256(resample(p).tobytes() + resample(p[:90]).tobytes()).hexdigest())"
    )
    root = Path(__file__).resolve().parents[3]
    old = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    out = subprocess.run([sys.executable, "-c", code], env=old, cwd=root, capture_output=True)
    rng = np.random.default_rng(0)
    p = rng.integers(0, 256, (375, 500, 3), np.uint8)
    import hashlib

    here = hashlib.sha256(
        resize.resample(p).tobytes() + resize.resample(p[:90]).tobytes()
    ).hexdigest()
    assert out.stdout.decode().strip() == here, out.stderr.decode()


def test_what_was_returned_stays_when_the_next_is_decoded():
    data = [jpeg(seed, *size) for seed, size in enumerate([(256, 256), (300, 256), (500, 400)])]
    kept = [decode_square(one) for one in data]
    copies = [one.copy() for one in kept]
    decode_square(jpeg(9, 500, 500))
    assert all((one == copy).all() for one, copy in zip(kept, copies, strict=True))


def test_threads_do_not_disturb_each_other():
    data = [jpeg(seed, 500, 400) for seed in range(4)]
    expected = [decode_square(one) for one in data]
    wrong: list[int] = []

    def work(place: int) -> None:
        for _ in range(20):
            if not (decode_square(data[place]) == expected[place]).all():
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("chroma", ["4:2:0", "4:4:4"])
def test_encoding_keeps_the_image(chroma):
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
def test_stored_images_lose_no_more_than_pillows(quality, chroma):
    original = noisy(9, 256, 256)
    pillow = saved(Image.fromarray(original), "JPEG", quality=quality, subsampling=chroma)
    ours = encode(original, quality, chroma)
    got, theirs = (np.asarray(Image.open(io.BytesIO(data))) for data in (ours, pillow))
    assert psnr(got, original) > psnr(theirs, original) - 0.02
    assert len(ours) < 1.01 * len(pillow)
