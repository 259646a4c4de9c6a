"""Images out of folders and tars, of this machine or of a store."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset.tar import read_members
from pipeline.remote import file as remote_file
from pipeline.remote.file import RemoteFile
from pipeline.remote.filesystem import StoreError, Unreachable
from pipeline.sources import listing
from pipeline.sources.listing import Container, Unreadable
from pipeline.sources.paths import open_file
from pipeline.sources.readers import open_reader
from pipeline.tools.errors import SetupError, UsageError
from tests.helpers.http_servers import HASTY, QUICK, Server
from tests.helpers.processes import start
from tests.helpers.range_servers import RangeServer
from tests.helpers.tars import tar_of

FILES = {f"{place:04d}.jpg": np.random.default_rng(place).bytes(20_000) for place in range(300)}


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tar_of(tmp_path_factory.mktemp("tar") / "a.tar", FILES)


def test_files_of_a_folder_one_by_one(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "real").write_bytes(b"real")
    (tmp_path / "in/link.jpg").symlink_to(tmp_path / "real")
    (tmp_path / "in/gone.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "in/folder.jpg").mkdir()
    os.mkfifo(tmp_path / "in/pipe.jpg")
    (tmp_path / "in/null.jpg").symlink_to("/dev/zero")
    (tmp_path / "in/empty.jpg").write_bytes(b"")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/\xff.jpg")).write_bytes(b"odd")
    reader = open_reader(Container("folder", str(tmp_path / "in")))
    assert reader.read("link.jpg", 0, -1) == b"real"
    assert reader.read("empty.jpg", 0, -1) == b""
    assert reader.read("\udcff.jpg", 0, -1) == b"odd"
    for name, says in {
        "gone.jpg": "cannot be read: No such file",
        "folder.jpg": "folder",
        "pipe.jpg": "pipe",
        "null.jpg": "device",
        "a\0b.jpg": "embedded null",
    }.items():
        with pytest.raises(Unreadable, match=says):
            reader.read(name, 0, -1)
    reader.close()


def test_a_file_that_does_not_know_its_size():
    reader = open_reader(Container("folder", "/proc/self"))
    assert b"VmRSS" in reader.read("status", 0, -1)


def test_an_image_beyond_the_limit_is_not_read(tmp_path, tar, monkeypatch):
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(listing.MOST_IMAGE_BYTES + 1)  # takes no room
    with pytest.raises(Unreadable, match="too large: 268,435,457 bytes"):
        open_reader(Container("folder", str(tmp_path))).read("huge.jpg", 0, -1)
    with pytest.raises(Unreadable, match="too large"):
        open_reader(Container("tar", str(tar))).read("x", 512, listing.MOST_IMAGE_BYTES + 1)
    monkeypatch.setattr(listing, "MOST_IMAGE_BYTES", 100)
    with pytest.raises(Unreadable, match="too large: 4,"):
        open_reader(Container("folder", "/proc/self")).read("smaps", 0, -1)


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
@pytest.mark.parametrize("address", ["/nowhere/at/all", "memory://nowhere/at/all"])
def test_what_is_gone_is_an_error_of_the_container(kind, address):
    with pytest.raises(OSError, match=r"No such file|not there"):
        open_reader(Container(kind, address), QUICK).read("x.jpg", 0, 5)


def test_a_folder_that_went_away_is_not_a_bad_image(tmp_path):
    (tmp_path / "in").mkdir()
    reader = open_reader(Container("folder", str(tmp_path / "in")))
    (tmp_path / "in").rmdir()
    with pytest.raises(FileNotFoundError):
        reader.read("x.jpg", 0, -1)


def every_member(address: str, policy=QUICK) -> dict[str, bytes]:
    with open_file(address, policy) as file:
        found = list(read_members(file, address))
    reader = open_reader(Container("tar", address), policy)
    result = {item.name: reader.read(item.name, item.offset, item.size) for item in found}
    reader.close()
    return result


def test_members_of_a_tar(tar, tmp_path):
    assert every_member(str(tar)) == FILES
    cut = tmp_path / "cut.tar"
    cut.write_bytes(tar.read_bytes()[:5000])
    reader = open_reader(Container("tar", str(cut)))
    with pytest.raises(OSError, match=r"cut\.tar ends inside 0000\.jpg"):
        reader.read("0000.jpg", 512, 20_000)
    reader.close()


def test_a_remote_tar_is_read_in_few_requests(tar):
    with RangeServer(tar.parent) as server:
        reader = open_reader(Container("tar", f"{server.address}/a.tar"), QUICK)
        with tarfile.open(tar) as file:
            found = file.getmembers()
        for item in found:
            assert reader.read(item.name, item.offset_data, item.size) == FILES[item.name]
        reader.close()
        # 6 MB: one request for the size, then 64 KiB, 128 KiB, ... 4 MiB.
        assert len(server.requests) <= 9, server.requests
        assert sum(end - start for _, start, end in server.requests) < 1.05 * tar.stat().st_size


def test_reading_here_and_there_takes_only_what_is_asked(tar):
    with RangeServer(tar.parent) as server:
        reader = open_reader(Container("tar", f"{server.address}/a.tar"), QUICK)
        server.requests.clear()
        with tarfile.open(tar) as file:
            found = file.getmembers()
        for place in (290, 3, 200, 100):
            item = found[place]
            assert reader.read(item.name, item.offset_data, item.size) == FILES[item.name]
        assert sum(end - start for _, start, end in server.requests) <= 4 * (1 << 16)
        reader.close()


def read_in_forks(address: str) -> None:
    assert every_member(address) == FILES  # a scan before the workers start
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(every_member, [address] * 4, 1).get(60) == 4 * [FILES]


def test_forked_workers_read_from_a_store(tar):
    """The process that forks is one of its own: this one has threads of all tests before."""
    with RangeServer(tar.parent) as server:
        process = start(read_in_forks, f"{server.address}/a.tar")
        process.join(90)
        process.kill()
        assert process.exitcode == 0


def test_a_remote_tar_survives_faults(tar):
    with RangeServer(tar.parent) as server:
        server.fail("a.tar", ["", *3 * ["503", "cut", "", "short", "429", ""]])
        assert every_member(f"{server.address}/a.tar") == FILES


def test_a_store_that_fails_for_good_is_one_line(tar):
    with RangeServer(tar.parent) as server:
        server.fail("a.tar", itertools.chain([""], itertools.repeat("short")))
        reader = open_reader(Container("tar", f"{server.address}/a.tar"), QUICK)
        with pytest.raises(Unreachable, match="32768 bytes came, not 65536"):
            reader.read("0000.jpg", 512, 20_000)
        server.fail("a.tar", itertools.chain([""], itertools.repeat("503")))
        reader = open_reader(Container("tar", f"{server.address}/a.tar"), QUICK)
        with pytest.raises(Unreachable, match=r"tried 4 times .* try again later") as raised:
            reader.read("0000.jpg", 512, 20_000)
        assert isinstance(raised.value, StoreError)
        assert isinstance(raised.value, OSError)
        assert "\n" not in str(raised.value)
        with pytest.raises(Unreachable, match=r"b\.tar could not be read, tried 2 times.*404"):
            open_reader(Container("tar", f"{server.address}/b.tar"), QUICK)
    with pytest.raises(Unreachable, match="tried 4 times"):
        open_reader(Container("tar", "http://127.0.0.1:1/a.tar"), QUICK)


def test_a_server_without_ranges_gives_the_file_once(tar):
    with Server(tar.parent) as server:
        with RemoteFile(f"{server.address}/a.tar", QUICK) as file:
            before = server.counts["a.tar"]
            file.seek(-1024, os.SEEK_END)
            assert file.read() == tar.read_bytes()[-1024:]
            file.seek(512)
            assert file.read(20_000) == FILES["0000.jpg"]
            assert server.counts["a.tar"] == before
        server.fail("a.tar", ["", "", "", "cut"])
        assert every_member(f"{server.address}/a.tar", HASTY) == FILES


@pytest.mark.parametrize(
    ("address", "error", "says"),
    [
        ("nonsense://x/a.tar", UsageError, "unknown scheme 'nonsense'"),
        ("https://host/a.tar?key=secret", UsageError, "query"),
        ("memory://a.tar::memory://b.tar", UsageError, "one set at a time"),
        ("hdfs3a://x", UsageError, "unknown scheme"),
    ],
)
def test_addresses_that_are_none(address, error, says):
    with pytest.raises((error, SetupError), match=says) as raised:
        open_reader(Container("tar", address))
    assert "secret" not in str(raised.value)


FORWARD = st.tuples(st.just(io.SEEK_CUR), st.integers(0, 90), st.integers(0, 90))
ANYWHERE = st.tuples(st.just(io.SEEK_SET), st.integers(0, 3500), st.integers(-1, 3500))


@settings(max_examples=100, deadline=None)
@given(size=st.integers(0, 3000), steps=st.lists(FORWARD | FORWARD | ANYWHERE, max_size=40))
def test_a_remote_file_reads_as_a_local_one(size, steps):
    """Blocks of a few bytes, so that all their borders are met."""
    data = np.random.default_rng(size).bytes(size)
    fsspec.filesystem("memory").pipe_file("/readers/any", data)
    old = remote_file.SMALLEST, remote_file.LARGEST, remote_file.NEAR, remote_file.READ_AHEAD
    remote_file.SMALLEST, remote_file.LARGEST = 16, 256
    remote_file.NEAR, remote_file.READ_AHEAD = 64, 32
    try:
        local = io.BytesIO(data)
        with RemoteFile("memory://readers/any", QUICK) as file:
            for whence, place, count in steps:
                assert file.seek(place, whence) == local.seek(place, whence)
                assert file.read(count) == local.read(count)
                assert file.tell() == local.tell()
    finally:
        remote_file.SMALLEST, remote_file.LARGEST, remote_file.NEAR, remote_file.READ_AHEAD = old
