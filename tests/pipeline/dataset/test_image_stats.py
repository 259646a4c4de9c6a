from __future__ import annotations

import numpy as np

from pipeline.dataset.image_stats import Statistics, Sums

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 256, 256, 3), dtype=np.uint8)


def exact(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums by integers alone."""
    rows = images.reshape(-1, 3).astype(np.int64)
    outer = np.array([[(rows[:, a] * rows[:, b]).sum() for b in range(3)] for a in range(3)])
    return images.sum(0, dtype=np.int64), outer


def sums_of(images: np.ndarray) -> Sums:
    sums = Sums()
    for image in images:
        sums.add(image)
    return sums


def test_sums_are_exact():
    image, outer = exact(IMAGES)
    sums = sums_of(IMAGES)
    assert sums.images == 7
    assert (sums.image_sum == image).all()
    assert (sums.outer == outer).all()


def test_sums_are_exact_where_they_are_largest():
    white = np.full((256, 256, 3), 255, np.uint8)
    sums = sums_of([white] * 300)  # beyond what 16 bits hold
    assert (sums.image_sum == 300 * 255).all()
    assert (sums.outer == 300 * 65536 * 65025).all()
    sums.add(white)
    assert (sums.image_sum == 301 * 255).all()


def test_parts_add_up_in_any_order():
    whole = sums_of(IMAGES)
    one, other = sums_of(IMAGES[4:]), sums_of(IMAGES[:4])
    one += other
    assert one.images == whole.images
    assert (one.image_sum == whole.image_sum).all()
    assert (one.outer == whole.outer).all()
    assert other.images == 4


def test_statistics_are_numpys():
    found = Statistics.from_sums(sums_of(IMAGES))
    rows = IMAGES.reshape(-1, 3).astype(float)
    assert np.allclose(found.channel_mean, rows.mean(0))
    assert np.allclose(found.covariance, np.cov(rows.T, bias=True))
    assert np.allclose(found.mean_picture, IMAGES.mean(0))
    assert np.allclose(
        found.covariance @ found.eigenvectors, found.eigenvectors * found.eigenvalues
    )
