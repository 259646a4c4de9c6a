"""Damaged samples: found, replaced in the same way by everyone, listed once; or refused."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from isal import isal_zlib
from PIL import Image

from pipeline.batches import Stream
from pipeline.dataset import LocalSet
from pipeline.errors import DataError, UsageError
from pipeline.index import save_index
from pipeline.manifest import Manifest
from pipeline.screen import Screen
from pipeline.storage import Storage
from tests.drawn import rows_of

SAMPLES = 48  # in shards of 10
FLIPPED, ZEROED, CUT, UNDECODABLE = 13, 27, (45, 46, 47), 31
BATCHES = 6  # of 24: three epochs


def change(data: Path, sample: int, edit) -> None:
    """Let `edit` change the stored bytes of a sample in place."""
    row = rows_of(data, "train")[sample]
    start, size = int(row["offset"]), int(row["size"])
    shard = data / f"train-{row['shard']:06d}.tar"
    content = bytearray(shard.read_bytes())
    jpeg = content[start : start + size]
    edit(jpeg)
    content[start : start + size] = jpeg
    shard.write_bytes(content)


def flip(jpeg: bytearray) -> None:
    jpeg[700] ^= 1


def zero(jpeg: bytearray) -> None:
    jpeg[800:1000] = bytes(200)


def spoil(jpeg: bytearray) -> None:
    jpeg[:] = b"not a JPEG".ljust(len(jpeg))


def end_early(jpeg: bytearray) -> None:
    jpeg[-len(jpeg) // 12 :] = bytes(len(jpeg) // 12 + 1)


def undecodable(data: Path, *samples: int, edit=spoil) -> None:
    """Put bytes into the set that were never a JPEG, index and manifest in agreement with them."""
    rows = rows_of(data, "train").copy()
    for sample in samples:
        change(data, sample, edit)
        content = (data / f"train-{rows[sample]['shard']:06d}.tar").read_bytes()
        start, size = int(rows[sample]["offset"]), int(rows[sample]["size"])
        rows[sample]["crc"] = isal_zlib.crc32(content[start : start + size])
    manifest = Manifest.load(data)
    split = replace(manifest.splits["train"], index_sha256=save_index(data, "train", rows))
    replace(manifest, splits=manifest.splits | {"train": split}).save(data)


@pytest.fixture
def data(tiny_data, tmp_path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


@pytest.fixture
def damaged(data) -> Path:
    """Six of 48 samples are damaged, in each of the ways there are."""
    undecodable(data, UNDECODABLE)
    change(data, FLIPPED, flip)
    change(data, ZEROED, zero)
    cut = int(rows_of(data, "train")[CUT[0]]["offset"]) + 100
    os.truncate(data / "train-000004.tar", cut)
    return data


BAD = {FLIPPED, ZEROED, *CUT, UNDECODABLE}


def taken(stream: Stream, batches: int) -> list:
    return [next(stream) for _ in range(batches)]


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


def test_a_picture_that_ends_early_is_damaged_in_every_crop_or_in_none(data):
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


def test_strict_stops_at_what_an_earlier_run_has_listed(data, tmp_path):
    undecodable(data, 5)
    for strict in (False, True):
        options = {"quarantine": tmp_path / "q.jsonl", "strict": strict}
        with Stream(data, batch_size=SAMPLES, **options) as stream:
            if strict:
                with pytest.raises(DataError, match="sample 5 "):
                    next(stream)
            else:
                assert next(stream).replaced.sum() == 1


def test_a_list_moved_away_is_begun_anew_and_a_wrong_place_refused(damaged, tmp_path):
    path = tmp_path / "q.jsonl"
    with Stream(damaged, batch_size=1, once=True, quarantine=path, threads=1) as stream:
        while not path.exists():
            next(stream)
        path.unlink()
        list(stream)
    assert all(json.loads(row)["split"] == "train" for row in path.read_text().splitlines())
    for wrong in (tmp_path, tmp_path / "none" / "q.jsonl"):
        with pytest.raises(UsageError, match="another"):
            Stream(damaged, quarantine=wrong)


def test_a_restart_goes_on_with_the_same_substitutes(damaged):
    with Stream(damaged, batch_size=20, seed=2) as stream:
        whole = taken(stream, 6)
    for cut in (1, 3, 4):
        position = whole[cut - 1].position
        with Stream(damaged, batch_size=20, seed=2, position=position) as stream:
            assert torch.equal(
                joined(taken(stream, 6 - cut), "images"), joined(whole[cut:], "images")
            )


def test_each_damaged_sample_is_listed_once_with_its_reason(damaged, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    for _ in range(2):  # a restart
        streams = [
            Stream(damaged, batch_size=24, rank=rank, world_size=2, quarantine=path)
            for rank in range(2)
        ]
        for stream in streams:
            with stream:
                taken(stream, BATCHES)
    rows = {row["sample"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert len(path.read_text().splitlines()) == len(rows)
    assert set(rows) == BAD
    assert {row["split"] for row in rows.values()} == {"train"}
    assert rows[FLIPPED]["shard"] == "train-000001.tar"
    assert rows[FLIPPED]["key"] == "000001_00003"
    assert rows[FLIPPED]["reason"] == rows[ZEROED]["reason"] == "CRC-32 differs"
    assert rows[CUT[1]]["reason"] == "the shard ends before it does"
    assert "cannot be decoded" in rows[UNDECODABLE]["reason"]


def test_a_list_cut_short_by_a_kill_is_mended_and_a_strange_one_refused(damaged, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"split": "train", "sam')
    with Stream(damaged, batch_size=SAMPLES, quarantine=path) as stream:
        taken(stream, 1)
    assert {json.loads(row)["sample"] for row in path.read_text().splitlines()} == BAD
    path.write_text("hello\n")
    with pytest.raises(UsageError, match=r"quarantine\.jsonl is no list of damaged samples"):
        Stream(damaged, quarantine=path)


def test_damage_that_was_mended_is_no_damage(damaged, tiny_data, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    with Stream(damaged, batch_size=SAMPLES, quarantine=path) as stream:
        taken(stream, 1)
    for shard in ("train-000001.tar", "train-000002.tar", "train-000004.tar"):
        shutil.copy(tiny_data / shard, damaged)
    with Stream(damaged, batch_size=SAMPLES, quarantine=path) as stream:
        (batch,) = taken(stream, 1)
    assert batch.replaced.sum() == 1
    assert set(stream.damaged) == {UNDECODABLE}


def test_an_evaluation_leaves_damaged_samples_out(damaged):
    with Stream(damaged, batch_size=10, view="centre", once=True) as stream:
        batches = list(stream)
    counted = joined(batches, "ids")[joined(batches, "weights") == 1].tolist()
    assert sorted(counted) == sorted(set(range(SAMPLES)) - BAD)


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
    """240 single bits flipped anywhere in the pictures: each is found."""
    rng = np.random.default_rng(0)
    original = {path: path.read_bytes() for path in data.glob("train-*.tar")}
    ids, memory = np.arange(SAMPLES), np.empty(2_000_000, np.uint8)

    def one_bit(jpeg: bytearray) -> None:
        jpeg[rng.integers(len(jpeg))] ^= 1 << int(rng.integers(8))

    for _ in range(5):
        for sample in ids:
            change(data, sample, one_bit)
        _, damaged = Storage(LocalSet(data), "train").read(ids, memory)
        assert len(damaged) == SAMPLES
        for path, content in original.items():
            path.write_bytes(content)
    assert Storage(LocalSet(data), "train").read(ids, memory)[1] == {}


def test_what_dali_alone_finds_is_replaced_too(data, tiny_data, monkeypatch):
    """Scan data that nobody screened: the batch is made again without the sample."""
    monkeypatch.setattr(Screen, "refused", lambda self, ids, pictures: [])

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


def test_png_bytes_with_a_good_checksum_are_a_picture_too(data):
    def png(jpeg: bytearray) -> None:
        file = io.BytesIO()
        Image.new("RGB", (256, 256), (9, 8, 7)).save(file, "PNG")
        jpeg[:] = file.getvalue().ljust(len(jpeg), b"\0")

    undecodable(data, 3, edit=png)
    with Stream(data, batch_size=8, once=True, view="centre") as stream:
        batch = next(stream)
    assert not batch.replaced.any()
    assert batch.images[3].flatten(1).std(1).max() == 0


def test_statistics_of_another_set_are_refused(data):
    with np.load(data / "stats.npz") as arrays:
        changed = dict(arrays)
    changed["channel_mean"] += 1
    np.savez(data / "stats.npz", **changed)
    with pytest.raises(DataError, match=r"stats\.npz cannot be read \(it is not the one"):
        Stream(data)
