from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipeline.packing.duplicates import BITS, NEAR, perceptual_hash
from pipeline.packing.resize import decode_square, encode
from tests.helpers.images import jpeg
from tests.helpers.images import pixels as drawn


def distance(one: bytes, other: bytes) -> int:
    """The number of bits in which two hashes differ."""
    return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()


def textbook(pixels: np.ndarray) -> np.ndarray:
    """pHash by its definition, in float64: block means, cosine transform, median; bool [256]."""
    grey = pixels.astype(float) @ [0.299, 0.587, 0.114]
    blocks = grey.reshape(32, 8, 32, 8).mean((1, 3))
    low = np.array(
        [
            [
                sum(
                    blocks[y, x]
                    * np.cos(np.pi / 32 * u * (y + 0.5))
                    * np.cos(np.pi / 32 * v * (x + 0.5))
                    for y in range(32)
                    for x in range(32)
                )
                for v in range(16)
            ]
            for u in range(16)
        ]
    ).ravel()
    return low > np.median(low)


def detailed(seed: int) -> np.ndarray:
    """Drawn colours with structure at many scales, as a photograph has."""
    rng = np.random.default_rng(seed)
    total = np.zeros((256, 256, 3))
    for side in (4, 8, 16, 32, 64):
        coarse = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        big = Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC)
        total += np.asarray(big).astype(float) / side
    total -= total.min()
    return (total * 255 / total.max()).astype(np.uint8)


IMAGES = [detailed(seed) for seed in range(30)]


def test_it_is_the_textbooks_hash():
    got = np.unpackbits(np.frombuffer(perceptual_hash(IMAGES[0]), np.uint8)).astype(bool)
    assert got.shape == (BITS,)
    assert (got != textbook(IMAGES[0])).sum() <= 4  # values next to the median


def test_unlike_images_differ_in_half_of_their_bits():
    hashes = [perceptual_hash(image) for image in IMAGES]
    apart = [distance(a, b) for place, a in enumerate(hashes) for b in hashes[:place]]
    assert 120 < np.mean(apart) < 136
    assert min(apart) > 3 * NEAR


def brighter(pixels: np.ndarray) -> np.ndarray:
    return (pixels.astype(int) + 10).clip(0, 255).astype(np.uint8)


def of_half_size(pixels: np.ndarray) -> np.ndarray:
    half = Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC)
    return decode_square(encode(np.asarray(half), 90))


CHANGES = {
    **{f"q{quality}": lambda p, q=quality: decode_square(encode(p, q)) for quality in (50, 75, 95)},
    "brighter": brighter,
    "half": of_half_size,
    "grey": lambda p: np.asarray(Image.fromarray(p).convert("L").convert("RGB")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_same_image_stored_otherwise_is_near(change):
    apart = [distance(perceptual_hash(p), perceptual_hash(change(p))) for p in IMAGES]
    assert max(apart) <= NEAR


def test_flat_images_have_one_hash():
    flat = [np.full((256, 256, 3), level, np.uint8) for level in (1, 100, 255)]
    hashes = {perceptual_hash(image) for image in flat}
    assert len(hashes) == 1
    assert int.from_bytes(hashes.pop()).bit_count() == 1
    black = np.zeros((256, 256, 3), np.uint8)
    assert perceptual_hash(black) == bytes(32)


def test_the_bits_do_not_depend_on_how_the_pixels_lie_in_memory():
    image = decode_square(jpeg(3, 300, 200))
    turned = np.asfortranarray(image)
    assert perceptual_hash(turned) == perceptual_hash(image)
    assert distance(perceptual_hash(image), perceptual_hash(drawn(4, 256, 256))) > NEAR
