"""Names of a data set: folders, addresses, sizes of caches."""

from __future__ import annotations

import shutil
import sys
from contextlib import closing, nullcontext

import pytest

from pipeline.remote import dataset as remote
from pipeline.remote import local
from pipeline.remote.dataset import open_dataset
from pipeline.remote.download import Store
from pipeline.remote.filesystem import is_remote
from pipeline.remote.local import LocalDataset
from pipeline.tools.errors import DataError, SetupError, UsageError
from pipeline.tools.units import parse_size
from tests.helpers.http_servers import complain, shards


def test_addresses_that_cannot_be_spoken_to(monkeypatch):
    with pytest.raises(UsageError, match=r"unknown scheme 'nonsense'.*s3://bucket"):
        Store("nonsense://bucket/folder")
    with pytest.raises(UsageError, match="query"):
        Store("https://host/folder?token=1")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr(sys.modules["fsspec.registry"], "registry", {})  # nothing is loaded yet
    with pytest.raises(SetupError, match=r"pip install '.*\[s3\]'|-e '\.\[s3\]'") as raised:
        Store("s3://bucket/folder")
    complain(raised)


def test_local_sets(tiny_data, tmp_path):
    for data in (tiny_data, str(tiny_data), f"file://{tiny_data}"):
        found = open_dataset(data)
        assert isinstance(found, LocalDataset)
        assert found.folder == tiny_data
        shard = shards(tiny_data)[0]
        assert found.fetch_shard(shard) == tiny_data / shard.name
        found.prefetch([shard])
        assert found.recheck(shard) is False
        found.close()
    with pytest.raises(UsageError, match="not a folder"):
        open_dataset(tmp_path / "nothing")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny_data / "manifest.json", bare)
    with pytest.raises(DataError, match=r"train-000000\.tar is missing"):
        open_dataset(bare).fetch_shard(shards(tiny_data)[0])


def test_a_shard_is_opened_under_the_watchdog_wherever_it_lies(
    tiny_data, server, tmp_path, monkeypatch
):
    """A cache may lie on a mount that hangs, too."""
    watched = []
    for module in (local, remote):
        monkeypatch.setattr(module, "FileAccess", lambda path: nullcontext(watched.append(path)))
    shard = shards(tiny_data)[0]
    for data in (tiny_data, server.address):
        with closing(open_dataset(data, cache=tmp_path)) as found:
            found.open(shard).close()
            kept = tmp_path / "sha256" / f"{shard.sha256}.tar"
            assert watched[-1] == (tiny_data / shard.name if data is tiny_data else kept)


def test_open_dataset_uses_the_default_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = open_dataset(server.address)
    assert data.folder.parent == tmp_path / "duet"
    data.close()


@pytest.mark.parametrize(
    ("text", "remote_"),
    [
        ("s3://bucket/x", True),
        ("HTTPS://host/x", True),
        ("simplecache::s3://bucket/x", True),
        ("file:///data", False),
        ("/data/x", False),
        ("data/a:b", False),
        ("C:/x", False),
    ],
)
def test_is_remote(text, remote_):
    assert is_remote(text) is remote_


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("100GB", 100 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("500 mb", 500 * 10**6),
        ("2K", 2000),
        ("1234", 1234),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1.2.3MB", "10 apples", "1iB", "1e9"])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match="size"):
        parse_size(text)
