"""Data sets built at an address: whole files, one build at a time, the bytes of a local build."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from pipeline.batches import Stream
from pipeline.errors import DuetError, SetupError, UsageError
from pipeline.packing import plan, store_claim, store_target
from pipeline.packing.build import build
from pipeline.packing.options import Build
from pipeline.packing.store_target import StoreTarget, target_for
from pipeline.packing.target import WORK, Folder, Piece
from pipeline.stores.errors import StoreError
from pipeline.stores.fetch import Policy

CLAIM = f"{WORK}/claim"
QUICK = Policy(attempts=3, first_delay=0.01, stall=5)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3 server on loopback."""
    moto = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    yield "http://{}:{}".format(*moto.get_host_and_port())
    moto.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address in a bucket of it, which the environment leads to."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{uuid.uuid4()}"
    pytest.importorskip("boto3").client("s3").create_bucket(Bucket=name)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield f"s3://{name}/sets/mine"
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def memory() -> str:
    return f"memory://{uuid.uuid4()}/set"


@pytest.fixture(params=["memory", "bucket"])
def target(request: pytest.FixtureRequest) -> StoreTarget:
    return StoreTarget(request.getfixturevalue(request.param), QUICK)


def put(target: StoreTarget, name: str, data: bytes) -> None:
    with target.create(name) as file:
        file.write(data)


def complaint(raised: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_files_come_and_go(target):
    assert target.names() == set()
    assert target.size("a") is None
    put(target, "a", b"first")
    put(target, "a", b"second")  # in place of the first
    put(target, ".build/chunks/1.bin", bytes(1000))
    put(target, ".build/2", b"")
    put(StoreTarget(target.url + "-other", QUICK), "b", b"a neighbour's")
    assert target.read("a") == b"second"
    assert (target.size(".build/chunks/1.bin"), target.size(".build/2")) == (1000, 0)
    assert target.names() == {"a", ".build/chunks/1.bin", ".build/2"}
    assert target.names(".build/chunks") == {".build/chunks/1.bin"}
    with pytest.raises(FileNotFoundError, match=r"/b'?$"):
        target.read("b")
    target.remove(["a", "never there"])
    assert target.names() == {".build/chunks/1.bin", ".build/2"}
    target.clear(".build")
    target.clear(".build")
    assert target.names() == set()


def test_a_file_that_was_not_finished_is_not_there(target, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with contextlib.suppress(RuntimeError), target.create("a") as file:
        file.write(b"half")
        raise RuntimeError
    assert target.names() == set()
    put(target, "a", b"whole")
    with target.scratch() as folder:
        assert folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_pieces_in_the_order_asked_for(target, monkeypatch):
    monkeypatch.setattr(store_target, "BATCH", 3)
    files = {f"f{n}": bytes((n * 50 + i) % 251 for i in range(100)) for n in range(4)}
    for name, data in files.items():
        put(target, name, data)
    wanted = [Piece(f"f{n % 4}", 7 * n % 90, 5 + n) for n in range(11)]
    expected = [files[name][offset : offset + size] for name, offset, size in wanted]
    assert list(target.pieces(wanted)) == expected
    assert list(target.pieces([])) == []
    cut = [Piece("f1", 90, 20), Piece("f1", 100, 5), Piece("f1", 300, 5), Piece("f2", 0, 3)]
    assert list(target.pieces(cut)) == [files["f1"][90:], b"", b"", files["f2"][:3]]
    found = target.pieces([Piece("f0", 0, 2), Piece("gone", 0, 2)])
    assert next(found) == files["f0"][:2]
    with pytest.raises(FileNotFoundError, match="gone"):
        next(found)


def test_pieces_that_did_not_come_are_asked_for_again_alone(memory, monkeypatch):
    target = StoreTarget(memory, QUICK)
    put(target, "f", b"0123456789")
    system = fsspec.filesystem("memory")
    asked: list[list[int]] = []

    def flaky(paths, starts, ends, **options):
        asked.append(starts)
        first = len(asked) == 1
        return [
            OSError("reset") if first and start in (2, 6) else system.cat_file(path, start, end)
            for path, start, end in zip(paths, starts, ends, strict=True)
        ]

    monkeypatch.setattr(type(system), "cat_ranges", staticmethod(flaky))
    pieces = [Piece("f", place, 2) for place in (0, 2, 4, 6)]
    assert list(target.pieces(pieces)) == [b"01", b"23", b"45", b"67"]
    assert asked == [[0, 2, 4, 6], [2, 6]]


def fails(times: int, then: Callable, log: list) -> Callable:
    def call(*arguments, **options):
        log.append(arguments)
        if len(log) <= times:
            raise OSError("connection reset")
        return then(*arguments, **options)

    return call


def test_a_store_that_fails_is_asked_again_and_then_named(memory, monkeypatch):
    target = StoreTarget(memory.replace("memory://", "memory://user:secret@"), QUICK)
    system = fsspec.filesystem("memory")
    log: list = []
    monkeypatch.setattr(type(system), "put_file", fails(2, system.put_file, log))
    # a plain function, not bound: it is given to the class
    monkeypatch.setattr(type(system), "put_file", staticmethod(type(system).put_file))
    put(target, "a", b"data")
    assert len(log) == 3
    assert target.read("a") == b"data"
    log.clear()
    monkeypatch.setattr(type(system), "put_file", staticmethod(fails(99, system.put_file, log)))
    with pytest.raises(StoreError) as raised:
        put(target, "a", b"data")
    assert "a could not be written, tried 3 times" in complaint(raised)
    assert "connection reset" in complaint(raised)
    assert "secret" not in complaint(raised)
    assert not isinstance(raised.value, OSError)  # that would be a damaged file to the build


def test_a_full_temporary_folder_is_named(memory, monkeypatch):
    with pytest.raises(SetupError, match="TMPDIR") as raised, StoreTarget(memory).create("a"):
        raise OSError(28, "No space left on device")
    assert tempfile.gettempdir() in complaint(raised)


def test_no_bucket_is_one_line(bucket):
    target = StoreTarget(f"s3://nowhere-{uuid.uuid4()}/set", QUICK)
    with pytest.raises(StoreError, match="not there") as raised, target.claimed():
        pass
    complaint(raised)


def test_one_build_at_a_time(target):
    with target.claimed():
        with pytest.raises(UsageError) as raised, target.claimed():
            pass
        assert f"process {os.getpid()} on {platform.node()}" in complaint(raised)
        assert target.names() == {CLAIM}
    assert target.names() == set()
    with target.claimed():
        put(target, f"{WORK}/build.json", b"{}")
    assert target.names() == {f"{WORK}/build.json"}
    with target.claimed():
        pass


def claim_of(target: StoreTarget, **changes: object) -> dict[str, object]:
    """Write what another process would have written."""
    claim = store_claim.Claim(target.ask, CLAIM, target.address)
    mine = {**claim._mine, **changes}
    put(target, CLAIM, json.dumps(mine).encode())
    return mine


@pytest.fixture
def quick_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_claim, "SETTLE", 0.01)
    monkeypatch.setattr(store_claim, "BEAT", 0.05)


def test_the_claim_of_a_killed_build_of_this_machine_is_taken_over_at_once(target, quick_claims):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    claim_of(target, pid=ended.pid)
    with target.claimed():
        assert json.loads(target.read(CLAIM))["pid"] == os.getpid()


def test_the_claim_of_another_machine_is_taken_over_when_it_is_stale(
    target, quick_claims, monkeypatch
):
    claim_of(target, machine="other", host="far", pid=4)
    with pytest.raises(UsageError) as raised, target.claimed():
        pass
    assert "process 4 on far" in complaint(raised)
    assert "run this again in 1" in complaint(raised)
    assert target.names() == {CLAIM}
    monkeypatch.setattr(store_claim, "STALE", 0.9)  # S3 tells whole seconds
    time.sleep(1)
    with target.claimed():
        assert json.loads(target.read(CLAIM))["pid"] == os.getpid()
    assert target.names() == set()


def test_a_claim_is_kept_fresh_and_its_loss_ends_the_build(memory, quick_claims):
    target = StoreTarget(memory, QUICK)
    system = fsspec.filesystem("memory")
    path = f"/{memory.removeprefix('memory://')}/{CLAIM}"

    def hold() -> None:
        with target.claimed():
            before = system.modified(path)
            deadline = time.monotonic() + 5
            while system.modified(path) == before and time.monotonic() < deadline:
                time.sleep(0.01)
            assert system.modified(path) > before
            claim_of(target, host="far")
            time.sleep(5)
            pytest.fail("the loss was not noticed")

    with pytest.raises(UsageError, match="taken over") as raised:
        hold()
    complaint(raised)
    assert json.loads(target.read(CLAIM))["host"] == "far"  # it is not ours to remove


def test_strangers_files_are_left_alone(target):
    put(target, "thesis.doc", b"years of work")
    with pytest.raises(UsageError, match=r"holds thesis\.doc, which is no part"), target.claimed():
        pass
    assert target.names() == {"thesis.doc"}


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("data/x", Folder("data/x")),
        ("file:///data/a%20b", Folder("/data/a b")),
        ("s3://bucket/a/", StoreTarget("s3://bucket/a")),
        ("gs://bucket", StoreTarget("gs://bucket")),
    ],
)
def test_where_out_is(out, expected):
    assert target_for(out) == expected
    assert pickle.loads(pickle.dumps(expected)) == expected  # workers are sent it


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("https://user:secret@host/x", "written to folders and to object stores"),
        ("simplecache::s3://bucket/x", "written to folders and to object stores"),
        ("s4://bucket/x", "unknown scheme 's4'"),
    ],
)
def test_addresses_where_no_set_can_be_written(out, says):
    with pytest.raises(UsageError, match=says) as raised:
        target_for(out)
    assert "secret" not in complaint(raised)


class Here:
    """A pool without processes, that may be interrupted."""

    def __init__(self, results: int = 10**9) -> None:
        self.left = results

    def run(self, task: Callable, jobs: Iterable) -> Iterator:
        for job in jobs:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield task(job)


def options(out: str, pictures: Path) -> Build:
    return Build(
        out=out,
        train=str(pictures / "train"),
        val=str(pictures / "val"),
        samples_per_shard=10,
        workers=1,
    )


def same(target: StoreTarget, folder: Path) -> None:
    expected = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert target.names() == set(expected)
    for name, data in expected.items():
        assert target.read(name) == data, name


def test_a_build_onto_s3_has_the_bytes_of_a_local_one_and_streams(
    bucket, pictures, tiny_data, tmp_path
):
    manifest = build(options(bucket, pictures), pool=Here())
    same(StoreTarget(bucket), tiny_data)
    assert build(options(bucket, pictures), pool=Here(0)) == manifest  # finished: nothing is done
    with pytest.raises(UsageError, match="finished data set of other"):
        build(Build(out=bucket, train=str(pictures / "train"), samples_per_shard=10))
    with (
        Stream(tiny_data, batch_size=16, seed=2) as local,
        Stream(bucket, cache=tmp_path / "cache", batch_size=16, seed=2) as remote,
    ):
        for _ in range(4):
            ours, theirs = next(remote), next(local)
            assert torch.equal(ours.ids, theirs.ids)
            assert torch.equal(ours.images, theirs.images)


def test_a_build_at_an_address_goes_on_where_it_was_interrupted(
    memory, pictures, tiny_data, monkeypatch
):
    monkeypatch.setattr(plan, "SMALLEST_CHUNK", 8)
    for results in (3, 4, 5):  # amid the chunks, then amid the shards
        with pytest.raises(KeyboardInterrupt):
            build(options(memory, pictures), pool=Here(results))
        assert CLAIM not in StoreTarget(memory).names()
    build(options(memory, pictures), pool=Here())
    same(StoreTarget(memory), tiny_data)


def test_a_damaged_chunk_in_a_store_is_packed_again(memory, pictures, tiny_data):
    target = StoreTarget(memory)
    with pytest.raises(KeyboardInterrupt):
        build(options(memory, pictures), pool=Here(2))  # all chunks, no shard
    (name, *_) = sorted(name for name in target.names() if name.endswith(".bin"))
    data = target.read(name)
    put(target, name, data[: len(data) // 2])
    build(options(memory, pictures), pool=Here())
    same(target, tiny_data)


def test_an_error_of_the_store_ends_a_build_in_one_line(memory, pictures, monkeypatch):
    system = fsspec.filesystem("memory")
    log: list = []
    monkeypatch.setattr(Policy, "delay", lambda self, attempt: 0.01)
    monkeypatch.setattr(type(system), "put_file", staticmethod(fails(999, system.put_file, log)))
    with pytest.raises(DuetError, match="could not be written") as raised:
        build(options(memory, pictures), pool=Here())
    assert complaint(raised).count("could not be") == 1
