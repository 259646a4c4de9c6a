"""Data sets behind HTTP and S3 on loopback: what comes through, and what is said when it does not.

The oracle is the local folder that the server serves: the bytes must be its bytes.
"""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import aiohttp
import fsspec
import pytest
from aiohttp.client_reqrep import ConnectionKey

from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.index import load_index
from pipeline.dataset.manifest import Manifest, identity
from pipeline.remote.answers import describe_error
from pipeline.remote.filesystem import (
    RetryPolicy,
    StoreError,
    open_filesystem,
)
from tests.helpers.http_servers import (
    ALWAYS,
    HASTY,
    QUICK,
    STUCK,
    complain,
    remote,
    shards,
    wait_for,
)


def test_remote_set_is_the_local_one_and_fetched_once(server, tiny_data, tmp_path):
    for _ in range(2):  # the second finds everything but the manifest in the cache
        data = remote(server.address, tmp_path)
        for split in ("train", "val"):
            for shard in shards(data.folder, split):
                expected = (tiny_data / shard.name).read_bytes()
                assert data.fetch_shard(shard).read_bytes() == expected
                assert data.open(shard).read() == expected
        manifest = Manifest.load(data.folder)
        assert identity(data.folder) == identity(tiny_data)
        assert manifest == Manifest.load(tiny_data)
        assert len(load_index(data.folder, "val", manifest)) == 20
        assert Statistics.load(data.folder).mean_picture.shape == (256, 256, 3)
        data.close()
    assert server.counts.pop("manifest.json") == 2
    assert set(server.counts.values()) == {1}


@pytest.mark.parametrize(
    "fault",
    [
        *("503", "500", "429", "404", "flip", "short", "cut", "cut-unnoticed", "lie-short"),
        *("lie-long", "too-long", "empty", "reset", "stall", "trickle", "mute"),
    ],
)
def test_a_fault_that_passes_is_tried_again(server, tiny_data, tmp_path, fault):
    shard = shards(tiny_data)[1]
    server.fail(shard.name, [fault])
    data = remote(server.address, tmp_path, policy=HASTY if fault in STUCK else QUICK)
    assert data.fetch_shard(shard).read_bytes() == (tiny_data / shard.name).read_bytes()
    tries = server.counts[shard.name]
    assert tries >= 2 if fault in STUCK else tries == 2
    assert not list(tmp_path.rglob("*.partial"))


def test_no_length_is_no_fault(server, tiny_data, tmp_path):
    shard = shards(tiny_data)[0]
    server.fail(shard.name, ["no-length"])
    data = remote(server.address, tmp_path)
    assert data.fetch_shard(shard).read_bytes() == (tiny_data / shard.name).read_bytes()
    assert server.counts[shard.name] == 1


@pytest.mark.parametrize(
    ("fault", "tries", "says"),
    [
        ("503", 4, "HTTP 503"),
        ("404", 2, "it is not there; check the address"),
        ("403", 2, "HTTP 403"),
        ("cut", 4, "Payload"),
        ("stall", 4, "no bytes for 0.25 s"),
        ("mute", 4, "no bytes for 0.25 s, after 0"),
        ("too-long", 4, "more bytes than the"),
    ],
)
def test_a_failing_store_is_one_line_after_the_tries(
    server, tiny_data, tmp_path, fault, tries, says
):
    shard = shards(tiny_data)[0]
    data = remote(server.address, tmp_path, policy=HASTY if fault in STUCK else QUICK)
    server.fail(shard.name, ALWAYS(fault))
    began = time.monotonic()
    with pytest.raises(StoreError) as raised:
        data.fetch_shard(shard)
    assert time.monotonic() - began < 4
    text = complain(raised)
    assert shard.name in text
    assert server.address in text
    assert f"tried {tries} times" in text
    assert says in text
    assert raised.value.exit_code == 1
    assert server.counts[shard.name] == tries
    assert not list(tmp_path.rglob("*.partial"))


def test_a_store_that_is_not_there(tmp_path):
    with pytest.raises(StoreError, match=r"manifest\.json could not be fetched from http"):
        remote("http://127.0.0.1:1/set", tmp_path, policy=RetryPolicy(2, 0.01, 0.5))


def test_a_file_system_without_timeouts_cannot_hang_us(tmp_path):
    class Stuck(fsspec.AbstractFileSystem):
        protocol = "stuck"

        def get_file(self, *_, **__) -> None:
            time.sleep(30)

    fsspec.register_implementation("stuck", Stuck, clobber=True)
    began = time.monotonic()
    with pytest.raises(StoreError, match="no bytes"):
        remote("stuck://anywhere", tmp_path, policy=RetryPolicy(2, 0.01, 0.2))
    assert time.monotonic() - began < 2


def test_a_try_that_was_given_up_writes_nothing_when_it_wakes(tiny_data, tmp_path):
    asleep, woken = threading.Event(), threading.Event()
    late: list[Path] = []

    class Drowsy(fsspec.AbstractFileSystem):
        """The first shard that is asked for comes long after anybody waits for it."""

        protocol = "drowsy"

        def get_file(self, rpath, lpath, callback=None, **__) -> None:
            source, first = tiny_data / rpath.rsplit("/", 1)[-1], not asleep.is_set()
            if source.suffix == ".tar" and first:
                asleep.set()
                woken.wait(10)
                late.append(Path(lpath))
            callback.set_size(source.stat().st_size)
            shutil.copyfile(source, lpath)

    fsspec.register_implementation("drowsy", Drowsy, clobber=True)
    data = remote("drowsy://set", tmp_path, policy=HASTY)
    shard = shards(tiny_data)[0]
    assert data.fetch_shard(shard).read_bytes() == (tiny_data / shard.name).read_bytes()
    woken.set()
    wait_for(lambda: late and all(t.name != f"fetch {shard.name}" for t in threading.enumerate()))
    assert not late[0].exists()


def test_passwords_are_not_told(server, tmp_path):
    address = server.address.replace("http://", "http://me:secret@")
    server.fail("manifest.json", ALWAYS("500"))
    with pytest.raises(StoreError) as raised:
        remote(address, tmp_path)
    assert "secret" not in complain(raised)
    assert "http://***@127.0.0.1" in str(raised.value)


@pytest.fixture
def bucket(tiny_data: Path, s3_bucket: str) -> str:
    """The set in a bucket of an S3 server on loopback."""
    client = pytest.importorskip("boto3").client("s3")
    for path in tiny_data.iterdir():
        client.upload_file(str(path), s3_bucket.removeprefix("s3://"), f"sets/tiny/{path.name}")
    return f"{s3_bucket}/sets/tiny"


def test_s3(bucket, tiny_data, tmp_path, monkeypatch):
    data = remote(bucket, tmp_path)
    data.prefetch(shards(tiny_data)[2:])
    for shard in shards(tiny_data):
        assert data.fetch_shard(shard).read_bytes() == (tiny_data / shard.name).read_bytes()
    data.close()
    for address, says in (
        (bucket.replace("sets", "nothing"), "not there"),
        ("s3://other/x", "not there"),
    ):
        with pytest.raises(StoreError, match=says) as raised:
            remote(address, tmp_path)
        assert "tried 2 times" in complain(raised)
    client = pytest.importorskip("boto3").client("s3")
    shard = shards(tiny_data)[0]
    body = bytearray((tiny_data / shard.name).read_bytes())
    body[900] ^= 1
    client.put_object(Bucket=bucket.split("/")[2], Key=f"sets/tiny/{shard.name}", Body=bytes(body))
    fresh = remote(bucket, tmp_path / "fresh")
    assert fresh.fetch_shard(shard).read_bytes() == body
    assert fresh.recheck(shard) is False
    fresh.close()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(StoreError, match="Credentials") as raised:
        remote(bucket, tmp_path / "none", policy=QUICK)
    complain(raised)


@pytest.mark.parametrize(("reports_bytes", "stalls"), [(False, 1), (True, 2)])
def test_http_gives_up_a_silent_server_behind_the_watch_of_a_download(reports_bytes, stalls):
    system, _ = open_filesystem(
        "http://host/a.tar", RetryPolicy(stall=7), reports_bytes=reports_bytes
    )
    timeout = system.client_kwargs["timeout"]
    assert (timeout.total, timeout.sock_connect, timeout.sock_read) == (
        None,
        7 * stalls,
        7 * stalls,
    )


def test_an_error_of_the_connection_names_the_host():
    """The address of a file may lack it: `gs://bucket/x` is read from storage.googleapis.com."""
    key = ConnectionKey("storage.googleapis.com", 443, True, None, None, None, None)
    error = aiohttp.ClientConnectorError(key, OSError(-2, "Name or service not known"))
    assert "storage.googleapis.com:443" in describe_error(error)
    assert describe_error(TimeoutError()) == "TimeoutError: no reason given"
