"""Data sets built at an address have the bytes of a local build, however often it was cut."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import torch

from pipeline.batches import Stream
from pipeline.options import BuildConfig
from pipeline.packing import plan
from pipeline.packing.build import build
from pipeline.remote.filesystem import RetryPolicy
from pipeline.remote.target import StoreTarget
from pipeline.tools.errors import DuetError, UsageError
from tests.helpers.build_targets import (  # noqa: F401
    CLAIM,
    Here,
    complaint,
    fails,
    memory_address,
    options,
    put,
    s3_address,
)


def same(target: StoreTarget, folder: Path) -> None:
    expected = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert target.list_files() == set(expected)
    for name, data in expected.items():
        assert target.read(name) == data, name


def test_a_build_onto_s3_has_the_bytes_of_a_local_one_and_streams(
    bucket, image_folder, tiny_data, tmp_path
):
    manifest = build(options(bucket, image_folder), pool=Here())
    same(StoreTarget(bucket), tiny_data)
    assert (
        build(options(bucket, image_folder), pool=Here(0)) == manifest
    )  # finished: nothing is done
    with pytest.raises(UsageError, match="finished data set of other"):
        build(BuildConfig(out=bucket, train=str(image_folder / "train"), samples_per_shard=10))
    with (
        Stream(tiny_data, batch_size=16, seed=2) as local,
        Stream(bucket, cache=tmp_path / "cache", batch_size=16, seed=2) as remote,
    ):
        for _ in range(4):
            ours, theirs = next(remote), next(local)
            assert torch.equal(ours.ids, theirs.ids)
            assert torch.equal(ours.images, theirs.images)


def test_a_build_at_an_address_goes_on_where_it_was_interrupted(
    memory, image_folder, tiny_data, monkeypatch
):
    monkeypatch.setattr(plan, "SMALLEST_CHUNK", 8)
    for results in (3, 4, 5):  # amid the chunks, then amid the shards
        with pytest.raises(KeyboardInterrupt):
            build(options(memory, image_folder), pool=Here(results))
        assert CLAIM not in StoreTarget(memory).list_files()
    build(options(memory, image_folder), pool=Here())
    same(StoreTarget(memory), tiny_data)


def test_a_damaged_chunk_in_a_store_is_packed_again(memory, image_folder, tiny_data):
    target = StoreTarget(memory)
    with pytest.raises(KeyboardInterrupt):
        build(options(memory, image_folder), pool=Here(2))  # all chunks, no shard
    (name, *_) = sorted(name for name in target.list_files() if name.endswith(".bin"))
    data = target.read(name)
    put(target, name, data[: len(data) // 2])
    build(options(memory, image_folder), pool=Here())
    same(target, tiny_data)


def test_an_error_of_the_store_ends_a_build_in_one_line(memory, image_folder, monkeypatch):
    system = fsspec.filesystem("memory")
    log: list = []
    monkeypatch.setattr(RetryPolicy, "delay", lambda self, attempt: 0.01)
    monkeypatch.setattr(type(system), "put_file", staticmethod(fails(999, system.put_file, log)))
    with pytest.raises(DuetError, match="could not be written") as raised:
        build(options(memory, image_folder), pool=Here())
    assert complaint(raised).count("could not be") == 1
