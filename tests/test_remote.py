"""Data sets behind HTTP and S3 on loopback: what comes through, and what is said when it does not.

The oracle is the local folder that the server serves: the bytes must be its bytes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from pipeline.dataset import LocalSet, is_remote, open_dataset, parse_size
from pipeline.errors import DataError, DuetError, SetupError, UsageError
from pipeline.index import load_index
from pipeline.manifest import Manifest, identity
from pipeline.pixel_stats import Statistics
from pipeline.stores.errors import StoreError
from pipeline.stores.fetch import Policy, Store
from tests.servers import HASTY, QUICK, STUCK, Server, remote, shards

ROOT = Path(__file__).parent.parent
ALWAYS = itertools.repeat


@pytest.fixture
def server(tiny_data: Path) -> Iterator[Server]:
    with Server(tiny_data) as running:
        yield running


def wait_for(what, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def complain(raised: pytest.ExceptionInfo[DuetError]) -> str:
    """The message, which must be one line."""
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_remote_set_is_the_local_one_and_fetched_once(server, tiny_data, tmp_path):
    for _ in range(2):  # the second finds everything but the manifest in the cache
        data = remote(server.address, tmp_path)
        for split in ("train", "val"):
            for shard in shards(data.folder, split):
                expected = (tiny_data / shard.name).read_bytes()
                assert data.shard(shard).read_bytes() == expected
                assert data.open(shard).read() == expected
        manifest = Manifest.load(data.folder)
        assert identity(data.folder) == identity(tiny_data)
        assert manifest == Manifest.load(tiny_data)
        assert len(load_index(data.folder, "val", manifest.splits["val"])) == 20
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
    assert data.shard(shard).read_bytes() == (tiny_data / shard.name).read_bytes()
    tries = server.counts[shard.name]
    assert tries >= 2 if fault in STUCK else tries == 2
    assert not list(tmp_path.rglob("*.partial"))


def test_no_length_is_no_fault(server, tiny_data, tmp_path):
    shard = shards(tiny_data)[0]
    server.fail(shard.name, ["no-length"])
    data = remote(server.address, tmp_path)
    assert data.shard(shard).read_bytes() == (tiny_data / shard.name).read_bytes()
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
        data.shard(shard)
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
        remote("http://127.0.0.1:1/set", tmp_path, policy=Policy(2, 0.01, 0.5))


def test_a_file_system_without_timeouts_cannot_hang_us(tmp_path):
    class Stuck(fsspec.AbstractFileSystem):
        protocol = "stuck"

        def get_file(self, *_, **__) -> None:
            time.sleep(30)

    fsspec.register_implementation("stuck", Stuck, clobber=True)
    began = time.monotonic()
    with pytest.raises(StoreError, match="no bytes"):
        remote("stuck://anywhere", tmp_path, policy=Policy(2, 0.01, 0.2))
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
    assert data.shard(shard).read_bytes() == (tiny_data / shard.name).read_bytes()
    woken.set()
    wait_for(lambda: late and all(t.name != f"fetch {shard.name}" for t in threading.enumerate()))
    assert not late[0].exists()


@pytest.mark.parametrize("fault", ["flip", "short"])
def test_damage_of_the_store_itself_is_kept_and_known(server, tiny_data, tmp_path, fault):
    shard = shards(tiny_data)[2]
    server.fail(shard.name, ALWAYS(fault))
    good = (tiny_data / shard.name).read_bytes()
    data = remote(server.address, tmp_path)
    kept = data.shard(shard).read_bytes()
    assert kept != good
    assert kept[: len(good) // 2] == good[: len(good) // 2]
    assert server.counts[shard.name] == 2
    for again in (data, remote(server.address, tmp_path)):
        assert again.shard(shard).read_bytes() == kept
        assert again.recheck(shard) is False
    assert server.counts[shard.name] == 2


def test_nothing_at_all_is_never_kept(server, tiny_data, tmp_path):
    shard = shards(tiny_data)[2]
    server.fail(shard.name, ALWAYS("empty"))
    with pytest.raises(DataError, match="it has 0 bytes"):
        remote(server.address, tmp_path).shard(shard)


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
            data.shard(shard)


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
    path = one.shard(shard)
    assert one.recheck(shard) is False  # it is sound
    assert other.shard(shard) == path
    rot(path)
    with path.open("rb") as held:  # a reader keeps the file it has
        assert one.recheck(shard) is True
        assert one.shard(shard).read_bytes() == (tiny_data / shard.name).read_bytes()
        assert held.read() != path.read_bytes()
        assert one.recheck(shard) is False
        # The other process finds that the first has mended it.
        assert other.recheck(shard) is True
        other.shard(shard)
        assert other.recheck(shard) is False
    assert server.counts[shard.name] == 2


def test_recheck_of_rot_over_damage_ends(server, tiny_data, tmp_path):
    shard = shards(tiny_data)[0]
    server.fail(shard.name, ALWAYS("flip"))
    data = remote(server.address, tmp_path)
    damaged = data.shard(shard).read_bytes()
    rot(data.shard(shard))
    assert data.recheck(shard) is True
    assert data.shard(shard).read_bytes() == damaged
    assert data.recheck(shard) is False
    assert server.counts[shard.name] == 4


def test_recheck_says_when_the_store_fails(server, tiny_data, tmp_path):
    shard = shards(tiny_data)[0]
    data = remote(server.address, tmp_path)
    path = data.shard(shard)
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
        ('"train-000000.tar"', '"../../train-000000.tar"', "names a file"),
    ],
)
def test_a_manifest_that_cannot_be_used(tiny_data, tmp_path, old, new, says):
    store = tmp_path / "store"
    store.mkdir()
    text = (tiny_data / "manifest.json").read_text()
    (store / "manifest.json").write_text(text.replace(old, new))
    assert new in (store / "manifest.json").read_text()
    with Server(store) as server, pytest.raises(DataError, match=says) as raised:
        remote(server.address, tmp_path / "cache")
    assert server.address in complain(raised)


def test_fetching_ahead(server, tiny_data, tmp_path):
    wanted = shards(tiny_data)
    data = remote(server.address, tmp_path)
    began = time.monotonic()
    data.ahead(wanted)
    assert time.monotonic() - began < 0.5
    wait_for(lambda: all((data.folder / shard.name).is_file() for shard in wanted))
    data.ahead(wanted)
    for shard in wanted:
        assert data.shard(shard).read_bytes() == (tiny_data / shard.name).read_bytes()
        assert server.counts[shard.name] == 1
    data.close()


def test_new_wishes_replace_those_not_begun(server, tiny_data, tmp_path):
    first, *dropped, last = shards(tiny_data)
    server.fail(first.name, ["slow"])
    data = remote(server.address, tmp_path, threads=1)
    data.ahead([first, *dropped])
    wait_for(lambda: server.counts[first.name] == 1)
    data.ahead([last])
    wait_for(lambda: (data.folder / last.name).is_file())
    assert (data.folder / first.name).is_file()
    assert not any(server.counts[shard.name] for shard in dropped)
    data.close()


def test_what_fails_in_the_background_is_raised_where_it_is_needed(server, tiny_data, tmp_path):
    bad, good = shards(tiny_data)[:2]
    server.fail(bad.name, ALWAYS("503"))
    data = remote(server.address, tmp_path, threads=1)
    data.ahead([bad, good])
    wait_for(lambda: (data.folder / good.name).is_file())
    with pytest.raises(StoreError, match=bad.name):
        data.shard(bad)
    server.fail(bad.name, [])
    assert data.shard(bad).read_bytes() == (tiny_data / bad.name).read_bytes()
    data.close()


def test_close_does_not_wait_for_the_store(server, tiny_data, tmp_path):
    slow = Policy(attempts=4, first_delay=20, stall=20)
    data = remote(server.address, tmp_path, policy=slow)
    for shard, fault in zip(shards(tiny_data), ["stall", "503"], strict=False):
        server.fail(shard.name, ALWAYS(fault))
    data.ahead(shards(tiny_data)[:2])
    wait_for(lambda: len(list(tmp_path.rglob("*.partial"))) >= 3)
    began = time.monotonic()
    data.close()
    assert time.monotonic() - began < 1.5
    assert not list(tmp_path.rglob("*.partial"))
    with pytest.raises(DuetError, match="stopped"):
        data.shard(shards(tiny_data)[0])


def test_interpreter_ends_while_a_fetch_is_stuck(server, tiny_data, tmp_path):
    for shard in shards(tiny_data):
        server.fail(shard.name, ALWAYS("stall"))
    script = (
        "import sys, time; from pathlib import Path; from tests.servers import *\n"
        "data = remote(sys.argv[1], Path(sys.argv[2]), policy=Policy(4, 1, 30))\n"
        "data.ahead(shards(data.folder))\n"
        "while not list(data.folder.glob('*.tar.*')): time.sleep(.01)\n"
        "time.sleep(.2); print('end', time.time())\n"
    )
    command = [sys.executable, "-c", script, server.address, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.time() - float(done.stdout.split()[1]) < 3


def test_a_forked_child_goes_on(server, tiny_data, tmp_path):
    wanted = shards(tiny_data)
    data = remote(server.address, tmp_path)
    data.ahead(wanted[:2])  # threads of the parent, which the child does not have

    def child() -> None:
        data.ahead(wanted[3:])
        for shard in wanted:
            assert data.shard(shard).read_bytes() == (tiny_data / shard.name).read_bytes()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(10)
    assert process.exitcode == 0
    data.close()


def test_passwords_are_not_told(server, tmp_path):
    address = server.address.replace("http://", "http://me:secret@")
    server.fail("manifest.json", ALWAYS("500"))
    with pytest.raises(StoreError) as raised:
        remote(address, tmp_path)
    assert "secret" not in complain(raised)
    assert "http://***@127.0.0.1" in str(raised.value)


def test_addresses_that_cannot_be_spoken_to(monkeypatch):
    with pytest.raises(UsageError, match=r"unknown scheme 'nonsense'.*s3://bucket"):
        Store("nonsense://bucket/folder")
    with pytest.raises(UsageError, match="query"):
        Store("https://host/folder?token=1")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr(sys.modules["fsspec.registry"], "registry", {})  # nothing is loaded yet
    with pytest.raises(SetupError, match=r"pip install 'duet\[s3\]'") as raised:
        Store("s3://bucket/folder")
    complain(raised)


def test_local_sets(tiny_data, tmp_path):
    for data in (tiny_data, str(tiny_data), f"file://{tiny_data}"):
        found = open_dataset(data)
        assert isinstance(found, LocalSet)
        assert found.folder == tiny_data
        shard = shards(tiny_data)[0]
        assert found.shard(shard) == tiny_data / shard.name
        found.ahead([shard])
        assert found.recheck(shard) is False
        found.close()
    with pytest.raises(UsageError, match="not a folder"):
        open_dataset(tmp_path / "nothing")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny_data / "manifest.json", bare)
    with pytest.raises(DataError, match=r"train-000000\.tar is missing"):
        open_dataset(bare).shard(shards(tiny_data)[0])


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


@pytest.fixture
def bucket(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server on loopback with the set in a bucket; the client is told by the environment."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    client = pytest.importorskip("boto3").client("s3")
    client.create_bucket(Bucket="bucket")
    for path in tiny_data.iterdir():
        client.upload_file(str(path), "bucket", f"sets/tiny/{path.name}")
    yield "s3://bucket/sets/tiny"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


def test_s3(bucket, tiny_data, tmp_path, monkeypatch):
    data = remote(bucket, tmp_path)
    data.ahead(shards(tiny_data)[2:])
    for shard in shards(tiny_data):
        assert data.shard(shard).read_bytes() == (tiny_data / shard.name).read_bytes()
    data.close()
    for address, says in (("s3://bucket/nothing", "not there"), ("s3://other/x", "not there")):
        with pytest.raises(StoreError, match=says) as raised:
            remote(address, tmp_path)
        assert "tried 2 times" in complain(raised)
    client = pytest.importorskip("boto3").client("s3")
    shard = shards(tiny_data)[0]
    body = bytearray((tiny_data / shard.name).read_bytes())
    body[900] ^= 1
    client.put_object(Bucket="bucket", Key=f"sets/tiny/{shard.name}", Body=bytes(body))
    fresh = remote(bucket, tmp_path / "fresh")
    assert fresh.shard(shard).read_bytes() == body
    assert fresh.recheck(shard) is False
    fresh.close()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(StoreError, match="Credentials") as raised:
        remote(bucket, tmp_path / "none", policy=QUICK)
    complain(raised)
