"""The files of an address where a data set is built: whole or not there."""

from __future__ import annotations

import contextlib
import pickle
import tempfile
import uuid

import fsspec
import pytest

import pipeline.remote.target
from pipeline.remote.filesystem import StoreError
from pipeline.remote.target import ByteRange, FolderTarget, StoreTarget, open_target
from pipeline.tools.errors import SetupError, UsageError
from tests.helpers.build_targets import (  # noqa: F401
    QUICK,
    complaint,
    fails,
    memory_address,
    put,
    s3_address,
    target_at_address,
)


def test_files_come_and_go(target):
    assert target.list_files() == set()
    assert target.size("a") is None
    put(target, "a", b"first")
    put(target, "a", b"second")  # in place of the first
    put(target, ".build/chunks/1.bin", bytes(1000))
    put(target, ".build/2", b"")
    put(StoreTarget(target.url + "-other", QUICK), "b", b"a neighbour's")
    assert target.read("a") == b"second"
    assert (target.size(".build/chunks/1.bin"), target.size(".build/2")) == (1000, 0)
    assert target.list_files() == {"a", ".build/chunks/1.bin", ".build/2"}
    assert target.list_files(".build/chunks") == {".build/chunks/1.bin"}
    with pytest.raises(FileNotFoundError, match=r"/b'?$"):
        target.read("b")
    target.remove(["a", "never there"])
    assert target.list_files() == {".build/chunks/1.bin", ".build/2"}
    target.clear(".build")
    target.clear(".build")
    assert target.list_files() == set()


def test_a_file_that_was_not_finished_is_not_there(target, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with contextlib.suppress(RuntimeError), target.create("a") as file:
        file.write(b"half")
        raise RuntimeError
    assert target.list_files() == set()
    put(target, "a", b"whole")
    with target.scratch() as folder:
        assert folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_pieces_in_the_order_asked_for(target, monkeypatch):
    monkeypatch.setattr(pipeline.remote.target, "BATCH", 3)
    files = {f"f{n}": bytes((n * 50 + i) % 251 for i in range(100)) for n in range(4)}
    for name, data in files.items():
        put(target, name, data)
    wanted = [ByteRange(f"f{n % 4}", 7 * n % 90, 5 + n) for n in range(11)]
    expected = [files[name][offset : offset + size] for name, offset, size in wanted]
    assert list(target.read_ranges(wanted)) == expected
    assert list(target.read_ranges([])) == []
    cut = [
        ByteRange("f1", 90, 20),
        ByteRange("f1", 100, 5),
        ByteRange("f1", 300, 5),
        ByteRange("f2", 0, 3),
    ]
    assert list(target.read_ranges(cut)) == [files["f1"][90:], b"", b"", files["f2"][:3]]
    found = target.read_ranges([ByteRange("f0", 0, 2), ByteRange("gone", 0, 2)])
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
    pieces = [ByteRange("f", place, 2) for place in (0, 2, 4, 6)]
    assert list(target.read_ranges(pieces)) == [b"01", b"23", b"45", b"67"]
    assert asked == [[0, 2, 4, 6], [2, 6]]


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
    with pytest.raises(StoreError, match="not there") as raised, target.reserve():
        pass
    complaint(raised)


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("data/x", FolderTarget("data/x")),
        ("file:///data/a%20b", FolderTarget("/data/a b")),
        ("s3://bucket/a/", StoreTarget("s3://bucket/a")),
        ("gs://bucket", StoreTarget("gs://bucket")),
    ],
)
def test_where_out_is(out, expected):
    if out.startswith("gs:"):
        pytest.importorskip("gcsfs", reason="the extra gs is not installed")
    assert open_target(out) == expected
    assert pickle.loads(pickle.dumps(expected)) == expected  # workers are sent it


def test_a_folder_loses_what_a_killed_build_had_half_written(tmp_path):
    target = FolderTarget(str(tmp_path))
    left = [f"{folder}x.ab12.partial" for folder in ("", ".build/", ".build/chunks/")]
    whole = [".build/build.json", ".build/chunks/1.bin"]
    for name in (*left, *whole):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with target.reserve():
        assert target.list_files() == {*whole, ".build/lock"}
        (tmp_path / left[1]).touch()  # a worker of this build was killed
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == {
        *whole, ".build/lock",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("https://user:secret@host/x", "written to folders and to object stores"),
        ("simplecache::s3://bucket/x", "written to folders and to object stores"),
        ("s4://bucket/x", "written to folders and to object stores"),
    ],
)
def test_addresses_where_no_set_can_be_written(out, says):
    with pytest.raises(UsageError, match=says) as raised:
        open_target(out)
    assert "secret" not in complaint(raised)
