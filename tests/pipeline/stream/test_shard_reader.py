"""A flipped bit anywhere is found; a strict stream stops at it, and one without substitutes too."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.batches import Stream
from pipeline.remote.local import LocalDataset
from pipeline.stream.shard_reader import ShardReader
from pipeline.tools.errors import DataError
from tests.helpers.damage import FLIPPED, SAMPLES, change, flip, taken, undecodable
from tests.helpers.images import rows_of


def test_strict_stops_at_the_first_damaged_sample(data):
    change(data, FLIPPED, flip)
    with Stream(data, batch_size=12, once=True, strict=True) as stream:
        assert next(stream).ids.tolist() == list(range(12))  # what is sound is delivered
        message = (
            r"train sample 13 \(train-000001\.tar, key 000001_00003\): CRC-32 differs; .*verify"
        )
        for _ in range(2):
            with pytest.raises(DataError, match=message):
                next(stream)
    undecodable(data, 5)
    with Stream(data, batch_size=12, once=True, strict=True) as stream:
        for _ in range(2):
            with pytest.raises(DataError, match=r"sample 5 .*cannot be decoded"):
                next(stream)


def test_a_missing_shard_stops_with_its_name(data):
    (data / "train-000003.tar").unlink()
    with pytest.raises(DataError, match=r"shard .*train-000003\.tar is missing"):
        Stream(data)


def test_a_shard_that_goes_away_stops_with_its_name(data):
    with Stream(data, batch_size=2, once=True, threads=1) as stream:
        next(stream)
        (data / "train-000004.tar").unlink()
        with pytest.raises(DataError, match=r"train-000004\.tar"):
            list(stream)


def test_a_set_without_a_sound_sample_stops(data):
    for shard in data.glob("train-*.tar"):
        os.truncate(shard, 100)
    with (
        Stream(data, batch_size=8) as stream,
        pytest.raises(DataError, match="100 others that might take its place"),
    ):
        next(stream)


def test_a_sector_that_fails_is_damage_and_not_the_end(data, monkeypatch):
    real = os.preadv
    bad = int(rows_of(data, "train")[FLIPPED]["offset"])
    shards = []

    def preadv(file, buffers, offset):
        if offset == bad and Path(f"/proc/self/fd/{file}").readlink().name == "train-000001.tar":
            shards.append(offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with Stream(data, batch_size=SAMPLES) as stream:
        (batch,) = taken(stream, 1)
    assert shards
    assert batch.replaced.sum() == 1
    assert "Input/output error" in stream.damaged[FLIPPED].reason


def test_every_single_bit_counts(data):
    """240 single bits flipped anywhere in the images: each is found."""
    rng = np.random.default_rng(0)
    original = {path: path.read_bytes() for path in data.glob("train-*.tar")}
    ids, memory = np.arange(SAMPLES), np.empty(2_000_000, np.uint8)

    def one_bit(jpeg: bytearray) -> None:
        jpeg[rng.integers(len(jpeg))] ^= 1 << int(rng.integers(8))

    for _ in range(5):
        for sample in ids:
            change(data, sample, one_bit)
        _, damaged = ShardReader(LocalDataset(data), "train").read(ids, memory)
        assert len(damaged) == SAMPLES
        for path, content in original.items():
            path.write_bytes(content)
    assert ShardReader(LocalDataset(data), "train").read(ids, memory)[1] == {}


def test_statistics_of_another_set_are_refused(data):
    with np.load(data / "stats.npz") as arrays:
        changed = dict(arrays)
    changed["channel_mean"] += 1
    np.savez(data / "stats.npz", **changed)
    with pytest.raises(DataError, match=r"stats\.npz cannot be read \(it is not the one"):
        Stream(data)
