"""Every rank and restart replaces a damaged sample by the same one; an evaluation skips it."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.batches import Stream
from pipeline.dataset.images import Undecodable, decode_image
from pipeline.stream.quarantine import HeaderCheck, TrialDecoder
from pipeline.tools.errors import DataError
from tests.helpers.damage import BAD, BATCHES, SAMPLES, six_damaged, taken, undecodable  # noqa: F401 - a fixture
from tests.helpers.images import jpeg, rows_of


def end_early(jpeg: bytearray) -> None:
    jpeg[-len(jpeg) // 12 :] = bytes(len(jpeg) // 12 + 1)


def joined(batches: list, field: str) -> torch.Tensor:
    return torch.cat([getattr(batch, field) for batch in batches])


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_training_goes_on_with_the_same_substitutes_in_every_world(damaged, tiny_data, shuffle):
    options = {"batch_size": 24, "seed": 1, "shuffle": shuffle, "window": 2}
    with Stream(tiny_data, **options) as stream:
        sound = taken(stream, BATCHES)
    with Stream(damaged, **options) as stream:
        whole = taken(stream, BATCHES)
        assert set(stream.damaged) == BAD
    replaced = joined(whole, "replaced")
    due = joined(sound, "ids")
    assert due[replaced].tolist() == [i for i in due.tolist() if i in BAD]
    assert torch.equal(joined(whole, "ids")[~replaced], due[~replaced])
    assert torch.equal(joined(whole, "images")[~replaced], joined(sound, "images")[~replaced])
    assert not BAD & set(joined(whole, "ids").tolist())
    labels = rows_of(damaged, "train")["label"]
    assert joined(whole, "labels").tolist() == labels[joined(whole, "ids")].tolist()
    for world in (2, 3):
        parts = []
        for rank in range(world):
            with Stream(damaged, **options, rank=rank, world_size=world, threads=1) as stream:
                parts.append(taken(stream, BATCHES))
        for step, batch in enumerate(whole):
            for field in ("ids", "labels", "images", "replaced"):
                pieces = joined([part[step] for part in parts], field)
                assert torch.equal(pieces, getattr(batch, field))


def test_an_image_that_ends_early_is_damaged_in_every_crop_or_in_none(data):
    """DALI decodes it where the crop lies before the end: then batch and world would decide."""
    undecodable(data, *range(0, SAMPLES, 4), edit=end_early)
    options = {"batch_size": 24, "seed": 1}
    with Stream(data, **options) as stream:
        whole = taken(stream, BATCHES)
        assert stream.damaged
    for world in (2, 4):
        parts = []
        for rank in range(world):
            with Stream(data, **options, rank=rank, world_size=world) as stream:
                parts.append(taken(stream, BATCHES))
        for step, batch in enumerate(whole):
            for field in ("ids", "images"):
                pieces = joined([part[step] for part in parts], field)
                assert torch.equal(pieces, getattr(batch, field))
    with Stream(data, **options, position=72) as stream:
        assert torch.equal(joined(taken(stream, 3), "ids"), joined(whole[3:], "ids"))


@pytest.mark.parametrize("window", [1, 2])
def test_a_window_that_is_lost_as_a_whole_is_replaced_from_the_others(data, window):
    os.truncate(data / "train-000001.tar", 0)
    with Stream(data, batch_size=24, shuffle="block", window=window) as stream:
        batches = taken(stream, 20)
        assert set(stream.damaged) == set(range(10, 20))
    assert joined(batches, "replaced").sum() == 100


def test_a_restart_goes_on_with_the_same_substitutes(damaged):
    with Stream(damaged, batch_size=20, seed=2) as stream:
        whole = taken(stream, 6)
    for cut in (1, 3, 4):
        position = whole[cut - 1].position
        with Stream(damaged, batch_size=20, seed=2, position=position) as stream:
            assert torch.equal(
                joined(taken(stream, 6 - cut), "images"), joined(whole[cut:], "images")
            )


def test_an_evaluation_leaves_damaged_samples_out(damaged):
    with Stream(damaged, batch_size=10, crop="center", once=True) as stream:
        batches = list(stream)
    counted = joined(batches, "ids")[joined(batches, "weights") == 1].tolist()
    assert sorted(counted) == sorted(set(range(SAMPLES)) - BAD)


def test_what_dali_alone_finds_is_replaced_too(data, tiny_data, monkeypatch):
    """Scan data that nobody screened: the batch is made again without the sample."""
    monkeypatch.setattr(HeaderCheck, "find_undecodable", lambda self, ids, images: [])

    def cut(jpeg: bytearray) -> None:
        jpeg[len(jpeg) // 2 :] = bytes(len(jpeg) - len(jpeg) // 2)

    undecodable(data, 5, 30, edit=cut)
    with Stream(tiny_data, batch_size=24, seed=1) as stream:
        sound = taken(stream, 4)
    with Stream(data, batch_size=24, seed=1) as stream:
        whole = taken(stream, 4)
        assert set(stream.damaged) == {5, 30}
    replaced = joined(whole, "replaced")
    assert replaced.sum() == 4
    assert torch.equal(joined(whole, "images")[~replaced], joined(sound, "images")[~replaced])
    with Stream(data, batch_size=24, seed=1, strict=True) as stream:
        for _ in range(2):
            with pytest.raises(DataError, match="cannot be decoded"):
                taken(stream, 4)


def test_png_bytes_with_a_good_checksum_are_an_image_too(data):
    def png(jpeg: bytearray) -> None:
        file = io.BytesIO()
        Image.new("RGB", (256, 256), (9, 8, 7)).save(file, "PNG")
        jpeg[:] = file.getvalue().ljust(len(jpeg), b"\0")

    undecodable(data, 3, edit=png)
    with Stream(data, batch_size=8, once=True, crop="center") as stream:
        batch = next(stream)
    assert not batch.replaced.any()
    assert batch.images[3].flatten(1).std(1).max() == 0


def huge(data: bytes, marker: bytes = b"\xff\xc0") -> bytes:
    at = data.index(marker) + 5
    return data[:at] + struct.pack(">HH", 20_000, 20_000) + data[at + 4 :]


def huge_png() -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + crc + bytes(8) + b"IDAT"


def twice_framed() -> bytes:
    data = jpeg(1, 256, 256)
    at = data.index(b"\xff\xc0")
    frame = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
    return data[:at] + huge(frame) + data[at:]


def endless() -> bytes:
    data = jpeg(1, 256, 256, progressive=True)
    return data[:-2] + 200 * data[data.rindex(b"\xff\xda") : -2] + data[-2:]


@pytest.mark.parametrize("make", [lambda: huge(jpeg(1, 256, 256)), huge_png, twice_framed, endless])
def test_a_stored_image_that_would_cost_gigabytes_or_minutes_is_not_even_tried(make, monkeypatch):
    tried = []
    monkeypatch.setattr(
        TrialDecoder, "can_decode", lambda self, image, _: tried.append(image) or True
    )
    check, data = HeaderCheck(2), make()
    images = [np.frombuffer(one, np.uint8) for one in (data, jpeg(2, 256, 256))]
    assert check.find_undecodable(np.array([0, 1]), images) == [0]
    assert len(tried) == 1
    with pytest.raises(Undecodable):
        decode_image(data)


def test_a_progressive_image_is_tried_even_if_its_header_is_known():
    check, data = HeaderCheck(3), jpeg(1, 256, 256, progressive=True)
    bomb = data[:-2] + 200 * data[data.rindex(b"\xff\xda") : -2] + data[-2:]
    images = [np.frombuffer(one, np.uint8) for one in (data, data, bomb)]
    assert check.find_undecodable(np.arange(3), images) == [2]
