"""Shards at an address train from there: `python -m pipeline.index_shards ADDRESS --out DATA`."""

from __future__ import annotations

import shutil

import fsspec
import pytest
import torch

from pipeline.batches import Stream
from pipeline.dataset.manifest import Manifest
from pipeline.describe.__main__ import main as describe
from pipeline.options import ThroughputOptions, WithdrawOptions
from pipeline.remote.filesystem import RetryPolicy, StoreError
from pipeline.throughput.__main__ import make_setting
from pipeline.tools.errors import DamagedFile, UsageError
from pipeline.verify import check
from pipeline.withdraw import make_version
from tests.helpers.build_targets import Here, memory_address  # noqa: F401 - a fixture
from tests.helpers.foreign_shards import (  # noqa: F401 - fixtures
    copy_of_made,
    index,
    made_by_webdataset,
    names,
)
from tests.helpers.http_servers import ALWAYS, Server, complain
from tests.helpers.hub_servers import NAME, serve_hub
from tests.helpers.resealed_data import edit_manifest

SET = f"hf://datasets/{NAME}"
STREAM = {"batch_size": 20, "threads": 1, "device": "cpu"}


def test_shards_of_the_hub_train_from_there(made, folder, tmp_path, monkeypatch, capsys):
    """The files are those beside local shards, and the manifest has the address."""
    out, near = tmp_path / "out", index(folder).manifest
    with serve_hub(monkeypatch, token="secret", main=made):
        monkeypatch.setenv("HF_TOKEN", "secret")
        far = index(SET, out=str(out), workers=1).manifest
        assert far.shards_at == SET
        assert (far.splits, far.stats_sha256) == (near.splits, near.stats_sha256)
        assert names(folder) - names(made) == names(out)
        with (
            Stream(folder, **STREAM) as local,
            Stream(out, cache=tmp_path / "cache", **STREAM) as remote,
        ):
            one, other = next(local), next(remote)
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.images, other.images)
    assert make_setting(ThroughputOptions(data=str(out))).shuffle == "block"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert describe([str(out), "--json", "--out", str(tmp_path / "page.html")]) == 0
    assert '"rejected": 0' in capsys.readouterr().out
    with pytest.raises(UsageError, match=f"verify reads local shards, and those of .* {SET}"):
        check(out)


def test_shards_of_a_web_server_are_named_one_by_one(made, tmp_path):
    out, validation = tmp_path / "out", "in1k-validation-{00..00}.tar"
    with Server(made) as server:
        ranges = {"train": "in1k-train-{00..02}.tar", "val": validation}
        found = index(server.address, out=str(out), **ranges).manifest
        with Stream(out, cache=tmp_path / "cache", split="val", once=True, **STREAM) as stream:
            assert len(next(stream).ids) == 20
    assert {name: len(split.shards) for name, split in found.splits.items()} == {
        "train": 3,
        "val": 1,
    }


def test_names_on_a_web_server_are_those_of_files(made, tmp_path):
    """A name may need quotes in an address and be given twice, and is of one folder."""
    folder, out = tmp_path / "served", tmp_path / "out"
    folder.mkdir()
    shutil.copy(made / "in1k-train-00.tar", folder / "train%20%2300.tar")  # as the server sees it
    with Server(folder) as server:
        found = index(server.address, out=str(out), train="train #{00,00}.tar", workers=1).manifest
        assert [shard.name for shard in found.splits["train"].shards] == ["train #00.tar"]
        with Stream(out, cache=tmp_path / "cache", once=True, **STREAM) as stream:
            assert len(set(next(stream).ids.tolist())) == 8
        for name in ("sub/train-00.tar", "../train-00.tar"):
            with pytest.raises(
                UsageError, match=f"{name} is no name of a file in {server.address}"
            ):
                index(server.address, out=str(tmp_path / "no"), train=name)


def test_a_web_server_that_sends_no_parts_is_named(made, tmp_path):
    """An image is a part of its shard; the shard is not called damaged."""
    out, keys = tmp_path / "out", tmp_path / "keys"
    keys.write_text("train/n00003\n")
    with Server(made) as server:
        index(server.address, out=str(out), train="in1k-train-{00..02}.tar", workers=1)
        with pytest.raises(UsageError, match=r"train-0\d.tar: the web server sends all of it"):
            make_version(WithdrawOptions(data=str(out), keys=keys), pool=Here())
    assert Manifest.load(out).number == 1


def test_a_bucket_is_indexed_where_it_is(made, memory, tmp_path):
    """The files of another tool stay, an `.idx` among them."""
    store = fsspec.filesystem("memory")
    store.put(f"{made}/", memory, recursive=True)
    done = index(memory, workers=1)
    assert done.manifest.shards_at is None
    assert store.exists(f"{memory}/in1k-train-02.idx")
    with Stream(memory, cache=tmp_path, **STREAM) as stream:
        assert len(next(stream).ids) == 20
    with pytest.raises(UsageError, match="is a data set already"):
        index(memory)
    store.rm(f"{memory}/manifest.json")
    store.pipe(f"{memory}/in1k-train-00.idx", b"v1.2 0\n")
    (bad,) = index(memory, workers=1).bad
    assert "in1k-train-00.idx: is not of in1k-train-00.tar" in str(bad)
    assert not store.exists(f"{memory}/manifest.json")


def test_images_are_withdrawn_from_the_index(made, tmp_path, monkeypatch):
    """No shard is changed: what is withdrawn is not delivered."""
    out, keys = tmp_path / "out", tmp_path / "keys"
    keys.write_text("train/n00003\ntrain/n00011\n")
    with serve_hub(monkeypatch, main=made):
        index(SET, out=str(out))
        manifest = make_version(WithdrawOptions(data=str(out), keys=keys, workers=1))
        assert (manifest.number, manifest.shards_at) == (2, SET)
        for version, ids in ((1, {*range(20)} - {3, 11}), (2, {*range(18)})):
            with Stream(out, version=version, cache=tmp_path / "cache", **STREAM) as stream:
                assert set(next(stream).ids.tolist()) == ids
        with pytest.raises(UsageError, match=f"{SET}, which is not written to; leave --purge out"):
            make_version(WithdrawOptions(data=str(out), purge=True))


def test_what_cannot_be_read_leaves_nothing(made, tmp_path, monkeypatch):
    monkeypatch.setattr(RetryPolicy, "delay", lambda self, attempt: 0.01)
    out = tmp_path / "out"
    with Server(made) as server:
        server.fail("in1k-train-01.tar", ALWAYS("503"))
        with pytest.raises(StoreError) as raised:
            index(server.address, out=str(out), train="in1k-train-{00..02}.tar", workers=1)
        assert "in1k-train-01.tar could not be read" in complain(raised)
    assert names(out) == set()


def test_a_manifest_names_a_store_or_nothing(folder):
    index(folder)
    for place in ("/etc", "file:///etc", "memory::file:///etc", "s3://a b", "", 3):
        edit_manifest(folder, lambda table, place=place: table.update(shards_at=place))
        with pytest.raises(DamagedFile, match=r"shards_at is .*, not the address of a store"):
            Manifest.load(folder)
