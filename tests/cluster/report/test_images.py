"""The images of the report: kernels side by side, the first training batch."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from cluster.report.images import KERNEL_SCALE, load_training_images, tile_kernels
from pipeline.batches import Stream
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.manifest import Manifest


def test_tile_places_and_stretches() -> None:
    kernels = np.zeros((48, 3, 11, 11), np.float32)
    kernels[9, 0, 2, 4] = 1e-3  # row 1, place 1 of eight; the strongest of its kernel
    kernels[9, 2, 2, 4] = -5e-4
    sheet = tile_kernels(kernels)[::KERNEL_SCALE, ::KERNEL_SCALE]
    assert sheet.shape == (6 * 12 - 1, 8 * 12 - 1, 4)
    assert sheet[12 + 2, 12 + 4].tolist() == [255, 128, 64, 255]
    assert sheet[0, 0].tolist() == [128, 128, 128, 255]
    assert sheet[11, 0].tolist() == [0, 0, 0, 0], "gaps are clear"


def test_mosaic_is_the_first_batch_in_its_own_colours(tiny_data: Path, tmp_path: Path) -> None:
    samples = load_training_images(tmp_path, str(tiny_data), {"batch_size": 48, "seed": 5})
    with Stream(tiny_data, batch_size=48, seed=5) as stream:
        labels = next(stream).labels.tolist()
    names = Manifest.load(tiny_data).classes
    assert [sample.name for sample in samples] == [names[label] for label in labels[:32]]
    pixels = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(sample.uri.split(",")[1]))))
        for sample in samples
    ]
    # With the mean forgotten these would be dark: values around nought, clipped.
    expected = Statistics.load(tiny_data).channel_mean
    np.testing.assert_allclose(np.mean(pixels, axis=(0, 1, 2)), expected, atol=20)
