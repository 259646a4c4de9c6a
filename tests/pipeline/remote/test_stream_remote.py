"""The stream over a store: the same batches, fetched ahead, healed, or refused in one line."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.batches import Stream
from pipeline.dataset.manifest import identity
from pipeline.remote.filesystem import RetryPolicy, StoreError
from pipeline.tools.errors import UsageError
from tests.helpers.http_servers import Server, shards
from tests.helpers.images import flip_bit


@pytest.mark.parametrize(("shuffle", "window"), [("full", 1), ("block", 1), ("block", 2)])
def test_a_remote_set_gives_the_local_batches(tiny_data, tmp_path, shuffle, window):
    options = {"batch_size": 16, "seed": 4, "shuffle": shuffle, "window": window, "position": 40}
    with (
        Server(tiny_data) as server,
        Stream(tiny_data, **options) as local,
        Stream(server.address, cache=tmp_path, **options) as remote,
    ):
        for _ in range(7):  # over two epoch borders
            a, b = next(local), next(remote)
            assert torch.equal(a.ids, b.ids)
            assert torch.equal(a.images, b.images)
            assert not b.replaced.any()
    assert all(count == 1 for name, count in server.counts.items() if name.endswith(".tar"))


def test_an_evaluation_over_a_store(tiny_data, tmp_path):
    with (
        Server(tiny_data) as server,
        Stream(server.address, cache=tmp_path, split="val", once=True, batch_size=8) as stream,
    ):
        ids = torch.cat([batch.ids[batch.weights > 0] for batch in stream])
    assert ids.tolist() == list(range(20))


def test_a_rotten_cache_is_healed_and_rot_in_the_store_is_replaced(tiny_data, tmp_path):
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    flip_bit(data, "train", 7)
    cache = tmp_path / "cache"
    with Server(data) as server:
        with Stream(server.address, cache=cache, batch_size=48, strict=False) as stream:
            first = next(stream)
            assert set(stream.damaged) == {7}
        (copy,) = cache.glob(f"{identity(data)[:16]}*")
        (link := copy / "train-000003.tar").symlink_to(
            cache / f"sha256/{shards(data)[3].sha256}.tar"
        )
        flip_bit(copy, "train", 33)
        link.unlink()
        with Stream(server.address, cache=cache, batch_size=48) as stream:
            again = next(stream)
            assert set(stream.damaged) == {7}
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.ids, again.ids)
    assert int(first.replaced.sum()) == 1


def test_a_cache_too_small_for_the_order_is_refused(tiny_data, tmp_path):
    shards = [path.stat().st_size for path in tiny_data.glob("train-*.tar")]
    not_fetched = (".names.", "aggregates.npz")
    fetched = [
        path
        for path in tiny_data.glob("*.[nj][ps]*")
        if not any(part in path.name for part in not_fetched)
    ]
    about = sum(path.stat().st_size for path in fetched)
    with Server(tiny_data) as server:
        one = {"cache": tmp_path / "one", "cache_size": about + max(shards) * 3 // 2}
        with Stream(server.address, split="val", once=True, batch_size=4, **one) as stream:
            assert len(list(stream)) == 5  # shard after shard
        small = {"cache": tmp_path, "cache_size": about + sum(shards) - 10}
        with pytest.raises(UsageError, match=r"cannot hold the 5 shards .* --shuffle block"):
            Stream(server.address, **small)
        with Stream(server.address, **small, shuffle="block", window=1, batch_size=8) as stream:
            ids = torch.cat([next(stream).ids for _ in range(6)])
    assert sorted(ids.tolist()) == list(range(48))


def test_a_store_that_goes_away_ends_the_stream_with_its_name(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(RetryPolicy, "delay", lambda self, attempt: 0.01)
    options = {"shuffle": "block", "window": 1, "batch_size": 4, "prefetch": 1}
    with (
        Server(tiny_data) as server,
        Stream(server.address, cache=tmp_path, **options) as stream,
    ):
        for number in range(5):
            server.fail(f"train-{number:06d}.tar", iter(lambda: "503", None))
        with pytest.raises(StoreError, match=r"train-00000\d\.tar .*503"):
            list(itertools.islice(stream, 30))
