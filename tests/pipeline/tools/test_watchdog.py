"""Files on a mount that hangs: told, given up, and left behind; locks that never come."""

from __future__ import annotations

import fcntl
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.batches import Stream
from pipeline.remote.lease import lock_folder
from pipeline.stream.quarantine import Quarantine
from pipeline.stream.shard_reader import Damage
from pipeline.tools import files, watchdog
from pipeline.tools.errors import SetupError
from pipeline.tools.files import HashedFile, is_network_mount, try_lock, unlock
from pipeline.tools.watchdog import LIMIT, NOTICE, FileAccess, Hang, find_hang, look
from tests.helpers.http_servers import wait_for


def is_read(path: Path) -> bool:
    return path in [access.path for access in watchdog._accesses.values()]


@pytest.fixture(autouse=True)
def _no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the tests count seconds; tests before may have left the signal handler of a command."""
    monkeypatch.setattr(watchdog, "look", lambda passed: None)  # for the watchdog's own thread
    monkeypatch.setattr(watchdog, "_may_end_process", lambda: False)


@pytest.fixture
def hung(tmp_path: Path) -> Iterator[tuple[Path, threading.Thread]]:
    """A pipe that nobody writes to, and the thread that hangs in it."""
    path = tmp_path / "train-000003.tar"
    os.mkfifo(path)
    thread = threading.Thread(target=lambda: HashedFile(path), daemon=True)
    thread.start()
    wait_for(lambda: is_read(path))
    yield path, thread
    os.close(os.open(path, os.O_WRONLY))
    thread.join(5)
    assert not thread.is_alive()


def test_a_line_says_who_waits_for_which_file_and_how_long(hung, capsys):
    path, thread = hung
    look(NOTICE - 1)
    assert capsys.readouterr().err == ""
    look(1)
    who = f"process {os.getpid()} on {platform.node()} has waited"
    end = "its disk or mount does not answer; it is given up after 300 s\n"
    assert capsys.readouterr().err == f"{who} 30 s for {path}: {end}"
    look(NOTICE - 1)
    assert capsys.readouterr().err == ""  # again when the time has doubled
    look(1)
    assert capsys.readouterr().err == f"{who} 60 s for {path}: {end}"
    assert find_hang(thread) is None
    look(LIMIT)
    assert f"360 s for {path}" in str(find_hang(thread))


def test_a_command_ends_where_nobody_waits_for_the_thread(hung, capsys, monkeypatch):
    ends = list[int]()
    monkeypatch.setattr(os, "_exit", ends.append)
    look(LIMIT)
    assert ends == []  # a program of somebody else, with Duet as its library
    monkeypatch.setattr(watchdog, "_may_end_process", lambda: True)
    capsys.readouterr()
    look(1)
    assert ends == [1]
    assert capsys.readouterr().err.startswith(f"error: process {os.getpid()} on ")


def test_accesses_that_return_are_forgotten(tmp_path):
    with FileAccess(tmp_path):
        look(LIMIT)
        assert find_hang(threading.current_thread())
    assert find_hang(threading.current_thread()) is None
    assert not is_read(tmp_path)


def hang_at(monkeypatch: pytest.MonkeyPatch, held: threading.Event, reads: int) -> None:
    """Have the stream's read number `reads` hang until `held` is set."""
    read, count = os.preadv, iter(range(10**9))

    def preadv(file: int, buffers: list[memoryview], offset: int) -> int:
        if next(count) == reads:
            held.wait(60)
        return read(file, buffers, offset)

    monkeypatch.setattr("pipeline.stream.shard_reader.os.preadv", preadv)


def count_down(look_when: Callable[[], bool]) -> threading.Thread:
    """Let `LIMIT` seconds pass for the watchdog once a condition holds."""

    def run() -> None:
        wait_for(look_when)
        look(LIMIT)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_a_stream_gives_what_it_has_read_then_one_line(tiny_data, monkeypatch, capsys):
    held = threading.Event()
    hang_at(monkeypatch, held, 20)
    stream = Stream(tiny_data, batch_size=4, threads=1)
    watched = count_down(
        lambda: (
            any(f"{tiny_data}/train-" in str(one.path) for one in watchdog._accesses.values())
            and not any(one.ready for one in [stream._loader._prefetcher])
        )
    )
    for _ in range(5):  # those before the read that hangs
        next(stream)
    with pytest.raises(Hang, match=rf"waited 300 s for {tiny_data}/train-.*does not answer; mend"):
        next(stream)
    before = time.monotonic()
    stream.close()
    assert time.monotonic() - before < 4  # its thread is left behind
    held.set()
    watched.join(5)
    assert "does not answer" in capsys.readouterr().err


def test_a_read_that_returns_late_changes_nothing(tiny_data, monkeypatch):
    with Stream(tiny_data, batch_size=16, threads=1) as stream:
        expected = [next(stream).ids.tolist() for _ in range(3)]
    held = threading.Event()
    hang_at(monkeypatch, held, 20)
    threading.Timer(0.3, held.set).start()
    with Stream(tiny_data, batch_size=16, threads=1) as stream:
        assert [next(stream).ids.tolist() for _ in range(3)] == expected


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 {device} / /mnt/set rw,relatime shared:9 - {kind} server:/set rw
"""


@pytest.mark.parametrize(
    ("kind", "is_network"),
    [("nfs4", True), ("lustre", True), ("fuse.sshfs", True), ("ext4", False), ("tmpfs", False)],
)
def test_mounts_of_other_machines_are_told_from_disks(tmp_path, monkeypatch, kind, is_network):
    number = tmp_path.stat().st_dev
    text = MOUNTS.format(device=f"{os.major(number)}:{os.minor(number)}", kind=kind)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert is_network_mount(tmp_path) is is_network


def test_raw_images_of_a_network_mount_are_read_and_not_mapped(raw_data, monkeypatch):
    monkeypatch.setattr("pipeline.stream.shard_reader.is_network_mount", lambda path: True)
    monkeypatch.delattr("pipeline.stream.shard_reader._ShardFile.mapped")
    with Stream(raw_data, batch_size=24) as stream:
        for _ in range(5):  # images come a second time
            assert not next(stream).replaced.any()


@pytest.fixture
def hanging_locks(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """`flock` does not return before the event is set."""
    answered, flock = threading.Event(), fcntl.flock

    def hang(file: int, flags: int) -> None:
        answered.wait(60)
        flock(file, flags)

    monkeypatch.setattr("fcntl.flock", hang)
    monkeypatch.setattr(files, "LOCK_TIMEOUT", 0.1)
    yield answered
    answered.set()


def test_a_lock_that_does_not_come_ends_in_one_line(tmp_path, hanging_locks):
    with (
        pytest.raises(SetupError, match=rf"^{tmp_path}/lock cannot be locked \(flock has not .*"),
        lock_folder(tmp_path, "lock", "training"),
    ):
        pass
    assert not list(tmp_path.glob("*.lease"))  # another process may hold the lock
    hanging_locks.set()
    wait_for(lambda: not files._held_locks)  # what came too late holds nothing
    lock = try_lock(tmp_path / "lock")
    assert lock is not None
    unlock(lock)


def test_a_list_of_damage_goes_on_without_its_lock(tmp_path, hanging_locks):
    path = tmp_path / "quarantine.jsonl"
    path.write_bytes(b"")
    Quarantine("train", path).add([Damage("train", 1, "a.tar", "k", "CRC-32 differs")])
    assert path.read_text().count("CRC-32 differs") == 1


def test_a_thread_with_the_number_of_one_that_was_awaited_is_not(hung, monkeypatch):
    _, thread = hung
    ended = threading.Thread(target=watchdog.await_thread)
    ended.start()
    ended.join()
    ended._ident = thread.ident  # the kernel gives it again
    ends = list[int]()
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(watchdog, "_may_end_process", lambda: True)
    look(LIMIT)
    assert ends == [1]
