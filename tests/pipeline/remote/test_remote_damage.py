"""A store or a cache that holds other bytes than the manifest says: kept, mended or refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.remote.filesystem import StoreError
from pipeline.tools.errors import DataError
from tests.helpers.http_servers import ALWAYS, Server, complain, remote, shards
from tests.helpers.resealed_data import edit_manifest


@pytest.mark.parametrize("fault", ["flip", "short"])
def test_damage_of_the_store_itself_is_kept_and_known(server, tiny_data, tmp_path, fault):
    shard = shards(tiny_data)[2]
    server.fail(shard.name, ALWAYS(fault))
    good = (tiny_data / shard.name).read_bytes()
    data = remote(server.address, tmp_path)
    kept = data.fetch_shard(shard).read_bytes()
    assert kept != good
    assert kept[: len(good) // 2] == good[: len(good) // 2]
    assert server.counts[shard.name] == 2
    for again in (data, remote(server.address, tmp_path)):
        assert again.fetch_shard(shard).read_bytes() == kept
        assert again.recheck(shard) is False
    assert server.counts[shard.name] == 2


def test_nothing_at_all_is_never_kept(server, tiny_data, tmp_path):
    shard = shards(tiny_data)[2]
    server.fail(shard.name, ALWAYS("empty"))
    with pytest.raises(DataError, match="it has 0 bytes"):
        remote(server.address, tmp_path).fetch_shard(shard)


def test_a_set_that_was_rebuilt_under_us_is_not_called_damaged(tiny_data, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(tiny_data, store)
    shard = shards(store)[0]
    with Server(store) as server:
        data = remote(server.address, tmp_path / "cache")
        server.fail(shard.name, ALWAYS("flip"))
        with (store / "manifest.json").open("a") as file:
            file.write(" ")
        with pytest.raises(DataError, match="replaced by another"):
            data.fetch_shard(shard)


def rot(path: Path) -> None:
    """Change a byte on the disk, in place, as a bad sector would."""
    with path.open("r+b") as file:
        file.seek(700)
        byte = file.read(1)[0]
        file.seek(700)
        file.write(bytes([byte ^ 255]))


def test_recheck_replaces_a_copy_that_has_rotted(server, tiny_data, tmp_path):
    shard = shards(tiny_data)[0]
    one, other = (remote(server.address, tmp_path) for _ in range(2))
    path = one.fetch_shard(shard)
    assert one.recheck(shard) is False  # it is sound
    assert other.fetch_shard(shard) == path
    rot(path)
    with path.open("rb") as held:  # a reader keeps the file it has
        assert one.recheck(shard) is True
        assert one.fetch_shard(shard).read_bytes() == (tiny_data / shard.name).read_bytes()
        assert held.read() != path.read_bytes()
        assert one.recheck(shard) is False
        # The other process finds that the first has mended it.
        assert other.recheck(shard) is True
        other.fetch_shard(shard)
        assert other.recheck(shard) is False
    assert server.counts[shard.name] == 2


def test_recheck_of_rot_over_damage_ends(server, tiny_data, tmp_path):
    shard = shards(tiny_data)[0]
    server.fail(shard.name, ALWAYS("flip"))
    data = remote(server.address, tmp_path)
    damaged = data.fetch_shard(shard).read_bytes()
    rot(data.fetch_shard(shard))
    assert data.recheck(shard) is True
    assert data.fetch_shard(shard).read_bytes() == damaged
    assert data.recheck(shard) is False
    assert server.counts[shard.name] == 4


def test_recheck_says_when_the_store_fails(server, tiny_data, tmp_path):
    shard = shards(tiny_data)[0]
    data = remote(server.address, tmp_path)
    path = data.fetch_shard(shard)
    rot(path)
    server.fail(shard.name, ALWAYS("503"))
    with pytest.raises(StoreError):
        data.recheck(shard)
    assert path.is_file()  # the samples that are sound can still be read


@pytest.mark.parametrize("name", ["stats.npz", "val.index.npy", "manifest.json"])
def test_damaged_metadata_is_refused(server, tmp_path, name):
    server.fail(name, ["flip"])
    remote(server.address, tmp_path / "a").close()
    server.fail(name, ALWAYS("short"))
    with pytest.raises(DataError, match=name) as raised:
        remote(server.address, tmp_path / "b")
    complain(raised)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"version": 1', '"version": 7', "version 7"),
        ('"train-000000.tar"', '"../../train-000000.tar"', "leaves the folder"),
    ],
)
def test_a_manifest_that_cannot_be_used(tiny_data, tmp_path, old, new, says):
    store = tmp_path / "store"
    store.mkdir()
    shutil.copy(tiny_data / "manifest.json", store)
    edit_manifest(store, lambda table: None)
    text = (store / "manifest.json").read_text()
    (store / "manifest.json").write_text(text.replace(old, new))
    assert new in (store / "manifest.json").read_text()
    with Server(store) as server, pytest.raises(DataError, match=says) as raised:
        remote(server.address, tmp_path / "cache")
    assert server.address in complain(raised)
