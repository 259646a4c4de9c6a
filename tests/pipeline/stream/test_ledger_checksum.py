"""The checksums of pixels, on the host and on a GPU."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.batches import Stream
from pipeline.dataset.index import load_index
from pipeline.dataset.manifest import Manifest
from pipeline.stream.ledger.format import LedgerHeader, scan_ledger
from pipeline.stream.ledger.proof import prove
from pipeline.stream.ledger.writer import Ledger, compute_crc32s, compute_weighted_sums


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


def deliver(data, folder=None, **settings):
    """Return pixels, and the header and checksums of the ledger, of the first 24 samples."""
    with Stream(data, batch_size=12, seed=3, ledger=folder, **settings) as stream:
        images = torch.cat([next(stream).images for _ in range(2)])
        means = stream._reader.normalization.channel_mean.astype(np.float32)
    if folder is None:
        return images, means
    file = scan_ledger(max(folder.glob("*.ledger")))
    return images, file.header, file.read(0, 24).checksums


@pytest.mark.parametrize("crop", ["random", "resized"])
def test_checksums_of_crops_are_those_of_all_that_pixels_follow_from(tiny_data, tmp_path, crop):
    stored = {"dtype": "uint8", "layout": "NHWC", "mean": None}
    crops, _ = deliver(tiny_data, crop=crop, flip=0, colour=0, **stored)
    flipped, _ = deliver(tiny_data, crop=crop, colour=0, **stored)
    flips = [not torch.equal(*pair) for pair in zip(crops, flipped, strict=True)]
    assert 4 < sum(flips) < 20
    pixels, means = deliver(tiny_data, crop=crop, colour=0)
    images, header, found = deliver(tiny_data, tmp_path, crop=crop, colour=0)
    assert header.checksum == "crop-crc32"
    assert torch.equal(images, pixels)  # a ledger changes no bit
    parts = zip(crops.permute(0, 2, 3, 1).numpy(), np.array(flips, np.int32), strict=True)
    expected = [
        zlib.crc32(np.ascontiguousarray(one).tobytes() + flip.tobytes() + means.tobytes())
        for one, flip in parts
    ]
    assert found.tolist() == expected
    _, _, colored = deliver(tiny_data, tmp_path / "color", crop=crop)
    assert (colored != found).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "uint8", "layout": "NHWC", "mean": None, "colour": 0},
        {"augment": lambda images, draw: images * 0.5},
    ],
)
def test_other_pixels_are_checked_as_they_are_delivered(tiny_data, tmp_path, settings):
    images, header, found = deliver(tiny_data, tmp_path, **settings)
    assert header.checksum == "crc32"
    assert found.tolist() == compute_crc32s(images).tolist()


@pytest.mark.parametrize("settings", [{}, {"dtype": "uint8", "layout": "NHWC", "mean": None}])
def test_checksums_of_raw_images_are_those_of_what_was_read(raw_data, tmp_path, settings):
    pixels, means = deliver(raw_data, crop="center", colour=0, **settings)
    images, header, found = deliver(raw_data, tmp_path, crop="center", colour=0, **settings)
    assert header.checksum == "stored-crc32"
    assert torch.equal(images, pixels)
    (file,) = map(scan_ledger, tmp_path.glob("*.ledger"))
    index = load_index(raw_data, "train", Manifest.load(raw_data))
    stored = index["crc"][file.read(0, 24).delivered].astype("<u4")
    half, none = np.float32([16 / 32] * 2).tobytes(), np.int32(0).tobytes()
    facts = [crc.tobytes() + half + none + means.tobytes() for crc in stored]
    for position in (0, 16):
        crc = int(compute_crc32s(images[position : position + 1])[0])
        assert int(found[position]) == zlib.crc32(facts[position], crc)
    others = [position for position in range(24) if position % 16]
    assert found[others].tolist() == [zlib.crc32(facts[one]) for one in others]


def test_checksums_of_raw_images_see_draws_and_each_sixteenth_delivery(raw_data, tmp_path):
    _, header, known = deliver(raw_data, tmp_path / "a")
    assert deliver(raw_data, tmp_path / "b")[2].tolist() == known.tolist()
    assert (deliver(raw_data, tmp_path / "c", colour=0.2)[2] != known).all()
    assert 0 < (deliver(raw_data, tmp_path / "d", flip=0)[2] != known).sum() < 24
    images, ids = torch.zeros(24, 3, 4, 4), np.arange(24)
    sums = []
    for value in (0, 1):
        images[3:5] += value  # at the positions 15 and 16
        with Ledger(tmp_path / str(value), header) as ledger:
            ledger.record(12, ids, ids, images, [ids])
        sums.append(scan_ledger(ledger.path).read(12, 36).checksums)
    assert np.flatnonzero(sums[0] != sums[1]).tolist() == [4]
    assert deliver(raw_data, tmp_path / "resized", crop="resized")[1].checksum == "crop-crc32"
    halved = {"augment": lambda images, draw: images * 0.5}
    assert deliver(raw_data, tmp_path / "augmented", **halved)[1].checksum == "crc32"


def test_ledgers_of_before_stay_provable_beside_new_ones(tiny_data, tmp_path):
    """Those of releases that checksummed float pixels: their sums are not compared with others."""
    for folder in ("a", "b"):
        _, header, _ = deliver(tiny_data, tmp_path / folder)
    (path,) = (tmp_path / "b").glob("*.ledger")
    line, _, frames = path.read_bytes().partition(b"\n")
    old = line.replace(b'"crop-crc32"', b'"crc32"')
    assert LedgerHeader.parse(old) == replace(header, checksum="crc32")
    path.write_bytes(old + b"\n" + frames)
    proof = prove(tiny_data, [tmp_path / "a", tmp_path / "b"])
    assert (proof.findings, proof.again, proof.compared) == ((), 24, 0)
    with pytest.raises(ValueError, match=r"'xxh3', not crc32, crop-crc32, stored-crc32, .*a later"):
        LedgerHeader.parse(line.replace(b'"crop-crc32"', b'"xxh3"'))
