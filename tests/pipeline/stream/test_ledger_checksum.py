"""The checksums of pixels, on the host and on a GPU."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from pipeline.stream.ledger.writer import compute_crc32s, compute_weighted_sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_host_checksums_are_those_of_zlib(dtype):
    images = (torch.randn(5, 3, 7, 7) * 100).to(dtype)
    expected = [zlib.crc32(image.numpy().tobytes()) for image in images]
    assert compute_crc32s(images).tolist() == expected
    across = images.permute(0, 2, 3, 1)
    expected = [zlib.crc32(np.ascontiguousarray(image).tobytes()) for image in across.numpy()]
    assert compute_crc32s(across).tolist() == expected


def test_device_checksums_are_the_sum_they_say():
    images = torch.randn(37, 3, 5, 5).half()  # more than are summed at a time
    weights = [int(word) | 1 for word in np.random.PCG64(0).random_raw(75)]
    for image, found in zip(images, compute_weighted_sums(images).tolist(), strict=True):
        bits = image.numpy().view(np.int16).ravel().tolist()
        total = sum(bit * weight for bit, weight in zip(bits, weights, strict=True)) % 2**64
        assert found == (total ^ (total >> 32)) % 2**32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_checksums_take_every_type_in_the_order_of_memory(dtype):
    images = (torch.rand(3, 5, 7, 3) * 200).to(dtype)
    views = images.permute(0, 3, 1, 2)
    assert compute_weighted_sums(views).tolist() == compute_weighted_sums(images).tolist()
    raw = images.view(torch.uint8).reshape(3, -1).numpy()
    assert compute_crc32s(views).tolist() == [zlib.crc32(row.tobytes()) for row in raw]
    changed = images.clone()
    changed[1, 2, 3, 1] += 1
    differ = compute_weighted_sums(changed) != compute_weighted_sums(images)
    assert differ.tolist() == [False, True, False]


def test_device_checksums_see_a_single_bit_and_two_swapped_values():
    image = torch.randn(1, 3, 224, 224).half()
    known = compute_weighted_sums(image)
    rng = np.random.default_rng(0)
    for place, bit in rng.integers(0, (3 * 224 * 224, 16), (100, 2)).tolist():
        other = image.numpy().copy()
        other.view(np.uint16).reshape(-1)[place] ^= 1 << bit
        assert compute_weighted_sums(torch.from_numpy(other)) != known
    other = image.clone()
    other[0, 0, 0, 0], other[0, 0, 0, 1] = image[0, 0, 0, 1], image[0, 0, 0, 0]
    assert compute_weighted_sums(other) != known
