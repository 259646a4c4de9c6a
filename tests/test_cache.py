"""The cache of a node: its size, who leaves first, many processes at once, and bad disks."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import DuetError, SetupError, UsageError
from pipeline.manifest import Manifest
from pipeline.stores.cache import Cache
from pipeline.stores.fetch import Policy
from pipeline.stores.locks import try_lock, unlock
from pipeline.stores.remote import RemoteSet
from tests.servers import HASTY, QUICK, Server, fetch_all, remote, shards
from tests.test_remote import wait_for

ROOT = Path(__file__).parent.parent
ALWAYS = itertools.repeat
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def server(tiny_data: Path) -> Iterator[Server]:
    with Server(tiny_data) as running:
        yield running


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def small_size(data: Path, count: int) -> int:
    """Room for the metadata of a set and its `count` largest shards."""
    known = sorted((shard.bytes for shard in shards(data)), reverse=True)
    names = ("manifest.json", "stats.npz", *(f"{s}.index.npy" for s in Manifest.load(data).splits))
    return sum((data / name).stat().st_size for name in names) + sum(known[:count])


def here(data: RemoteSet) -> set[int]:
    """The numbers of the training shards that are in the cache."""
    return {int(path.name[6:12]) for path in data.folder.glob("train-*.tar")}


def test_least_recently_used_leaves_first(server, tiny_data, tmp_path):
    known = shards(tiny_data)
    data = remote(server.address, tmp_path, size=small_size(tiny_data, 3))
    for number in (0, 1, 2, 0):
        data.shard(known[number])
    held = (data.folder / known[1].name).open("rb")
    data.shard(known[3])
    assert here(data) == {0, 2, 3}
    data.shard(known[4])
    assert here(data) == {0, 3, 4}
    with held:
        assert held.read() == (tiny_data / known[1].name).read_bytes()
    data.shard(known[0])
    assert server.counts[known[0].name] == 1
    data.shard(known[1])
    assert here(data) == {0, 1, 4}
    assert server.counts[known[1].name] == 2


def test_all_sets_share_the_room(server, tiny_data, tmp_path):
    known = shards(tiny_data)
    twin = tmp_path / "twin"
    twin.mkdir()
    for path in tiny_data.iterdir():
        (twin / path.name).symlink_to(path)
    (twin / "manifest.json").unlink()
    (twin / "manifest.json").write_text((tiny_data / "manifest.json").read_text() + " ")
    cache, room = tmp_path / "cache", small_size(tiny_data, 2) + small_size(tiny_data, 0) + 1
    with Server(twin) as other:
        one = remote(server.address, cache, size=room)
        same = remote(server.address.replace("/set", "/elsewhere"), cache, size=room)
        two = remote(other.address, cache, size=room)
        assert one.folder == same.folder != two.folder
        one.shard(known[0])
        one.shard(known[1])
        two.shard(known[2])
        assert (here(one), here(two)) == ({1}, {2})
        assert size_of(cache) <= room


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rooms=st.integers(1, 4),
    calls=st.lists(st.tuples(st.integers(0, 4), st.sampled_from("soa"), st.integers(0, 1))),
)
def test_never_larger_than_it_may_be(tiny_data, tmp_path_factory, rooms, calls):
    """Whatever is called, in two processes' worth of sets: the size holds, the bytes are right."""
    cache, known = tmp_path_factory.mktemp("cache"), shards(tiny_data)
    memory = fsspec.filesystem("memory")
    if not memory.exists("/tiny/manifest.json"):
        memory.put(str(tiny_data), "/tiny", recursive=True)
    limit, over, done = small_size(tiny_data, rooms), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            try:
                over.extend(size for size in [size_of(cache)] if size > limit)
            except FileNotFoundError:
                continue  # evicted while it was counted

    thread = threading.Thread(target=watch)
    sets = [remote("memory://tiny", cache, size=limit) for _ in range(2)]
    thread.start()
    try:
        for number, call, which in calls:
            if call == "a":
                sets[which].ahead(known[number:])
            elif call == "s":
                sets[which].shard(known[number])
            else:
                with sets[which].open(known[number]) as file:
                    assert file.read() == (tiny_data / known[number].name).read_bytes()
    finally:
        for data in sets:
            data.close()
        done.set()
        thread.join()
    assert not over
    assert size_of(cache) <= limit
    for path in cache.rglob("*.tar"):
        assert path.read_bytes() == (tiny_data / path.name).read_bytes()


def test_fetching_ahead_does_not_remove_what_is_wished_for(server, tiny_data, tmp_path):
    known = shards(tiny_data)
    data = remote(server.address, tmp_path, size=small_size(tiny_data, 3))
    data.shard(known[4])
    data.ahead(known[:4])
    wait_for(lambda: here(data) == {0, 1, 2})
    time.sleep(0.1)
    assert here(data) == {0, 1, 2}
    assert not server.counts[known[3].name]
    data.ahead(known[1:4])  # the reader has gone on
    wait_for(lambda: here(data) == {1, 2, 3})
    data.close()
    assert max(server.counts.values()) == 1


def test_threads_that_need_the_same_room_all_get_it(server, tiny_data, tmp_path):
    """With room for one shard, five threads that each want another one take turns."""
    known = shards(tiny_data)
    data = remote(server.address, tmp_path, size=small_size(tiny_data, 1), patience=20)
    wrong = []

    def read(place: int) -> None:
        with data.open(known[place]) as file:
            if file.read() != (tiny_data / known[place].name).read_bytes():
                wrong.append(place)

    threads = [threading.Thread(target=read, args=(place,)) for place in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not wrong


def test_a_cache_that_is_too_small(server, tiny_data, tmp_path):
    with pytest.raises(UsageError, match=r"train-00000\d\.tar .* --cache-size") as raised:
        remote(server.address, tmp_path, size=1000)
    assert "\n" not in str(raised.value)
    data = remote(server.address, tmp_path, size=small_size(tiny_data, 1) - 1, patience=0.2)
    with pytest.raises(UsageError, match="no room"):
        data.shard(max(shards(tiny_data), key=lambda shard: shard.bytes))


def test_files_of_others_are_not_touched(server, tiny_data, tmp_path):
    for place in ("mine.tar", "set/mine.tar", "set/x.partial", "0123456789abcdef/mine.tar"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(bytes(10**6))
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    data = remote(server.address, tmp_path, size=small_size(tiny_data, 1))
    for shard in shards(tiny_data):
        data.shard(shard)
    assert len(here(data)) == 1
    assert all(path.stat().st_size == 10**6 for path in before)


def test_processes_fetch_each_shard_once(server, tiny_data, tmp_path):
    for shard in shards(tiny_data):
        server.fail(shard.name, ALWAYS("slow"))  # so that they do meet
    workers = [
        SPAWN.Process(target=fetch_all, args=(server.address, str(tmp_path), order))
        for order in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (0, 1, 2, 3, 4))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert server.counts.pop("manifest.json") == 3
    assert set(server.counts.values()) == {1}
    for path in tmp_path.rglob("*.tar"):
        assert path.read_bytes() == (tiny_data / path.name).read_bytes()


def test_kill_in_the_middle_of_a_fetch(server, tiny_data, tmp_path):
    shard = shards(tiny_data)[0]
    server.fail(shard.name, ["stall"])
    victim = SPAWN.Process(target=fetch_all, args=(server.address, str(tmp_path)))
    victim.start()
    wait_for(lambda: any(map(os.path.getsize, tmp_path.rglob("*.tar.*.partial"))), 20)
    other = remote(server.address, tmp_path, size=small_size(tiny_data, 1))
    found: list[bytes] = []
    waiting = threading.Thread(target=lambda: found.append(other.shard(shard).read_bytes()))
    waiting.start()
    time.sleep(0.1)
    assert server.counts[shard.name] == 1  # it waits for the one that has begun
    os.kill(victim.pid or 0, signal.SIGKILL)
    waiting.join(10)
    victim.join()
    assert found == [(tiny_data / shard.name).read_bytes()]
    assert server.counts[shard.name] == 2
    other.shard(shards(tiny_data)[1])
    assert not list(tmp_path.rglob("*.partial"))
    assert size_of(tmp_path) <= small_size(tiny_data, 1)


def test_the_leftovers_of_the_dead_are_removed(server, tiny_data, tmp_path):
    """Partial files count as long as somebody holds their lock, and are rubbish after that."""
    folder = remote(server.address, tmp_path).folder
    for name in ("train-000003.tar.999999999.room.partial", "train-000003.tar.0123abcd.partial"):
        (folder / name).write_bytes(b"x")
    lock = try_lock(folder / "locks" / "train-000003.tar.lock")
    assert lock is not None
    data = remote(server.address, tmp_path, patience=0.2)
    with pytest.raises(UsageError, match="no room"):  # it is promised to the one that fetches
        data.shard(shards(tiny_data)[0])
    unlock(lock)
    data.shard(shards(tiny_data)[0])
    assert not list(tmp_path.rglob("*.partial"))


def test_one_that_holds_a_lock_and_does_nothing(server, tiny_data, tmp_path):
    data = remote(server.address, tmp_path, patience=0.3)
    shard = shards(tiny_data)[0]
    lock = try_lock(data.folder / "locks" / f"{shard.name}.lock")
    assert lock is not None
    with pytest.raises(DuetError, match=f"another process has held .*{shard.name}"):
        data.shard(shard)
    unlock(lock)
    data.shard(shard)


def test_a_forked_child_does_not_keep_the_locks_of_its_parent(tmp_path):
    script = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "from pipeline.stores.locks import *\n"
        "lock = try_lock(Path(sys.argv[1]))\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    unlock(lock)\n"  # as a `finally` in the child would
        "    print(os.getpid(), flush=True); time.sleep(20); os._exit(0)\n"
        "time.sleep(20)\n"
    )
    path = tmp_path / "lock"
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        assert try_lock(path) is None
        parent.kill()
        parent.wait()
        lock = try_lock(path)
        os.kill(child, signal.SIGKILL)
    assert lock is not None
    unlock(lock)


def in_namespace(options: str, folder: Path, script: str, *arguments: str) -> str:
    """Run Python with a tmpfs of its own on `folder`, which nobody else sees; return its output."""
    inner = f'mount -t tmpfs {options} tmpfs "$1" && shift && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", inner, "sh", str(folder), sys.executable, "-c", script]
    probe = [*command[:6], str(folder), "true"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no mount in a namespace of its own is allowed here")
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BAD_DISK = (
    "import sys; from pathlib import Path; from tests.servers import *\n"
    "from pipeline.errors import DuetError\n"
    "cache = Path(sys.argv[2])\n"
    "try:\n"
    "    data = remote(sys.argv[1], cache)\n"
    "    for shard in shards(data.folder): data.shard(shard)\n"
    "except DuetError as error:\n"
    "    print(error.exit_code, error)\n"
    "    print(len(list(cache.rglob('*.partial'))))\n"
)


def test_a_disk_that_is_really_full(server, tiny_data, tmp_path):
    full = (small_size(tiny_data, 2) // 4096 + 20) * 4096
    said = in_namespace(f"-o size={full}", tmp_path, BAD_DISK, server.address, str(tmp_path))
    error, partials = said.splitlines()
    assert error.startswith(f"3 cache {tmp_path}")
    assert "no space left" in error
    assert "--cache-size" in error
    assert partials == "0"
    # Found at once, and not taken for the store's failure.
    assert max(server.counts.values()) == 1


def test_a_disk_that_is_really_read_only(server, tmp_path):
    said = in_namespace("-o ro", tmp_path, BAD_DISK, server.address, str(tmp_path))
    assert said.startswith(f"2 cache {tmp_path} cannot be written (Read-only file system)")


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, SetupError), (errno.EROFS, UsageError)]
)
def test_a_disk_that_fails_in_the_middle(
    server, tiny_data, tmp_path, monkeypatch: pytest.MonkeyPatch, number, kind
):
    """The same without a mount: the file system of the store fails as the disk would."""
    data = remote(server.address, tmp_path)

    async def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fsspec.get_filesystem_class("http"), "_get_file", fail)
    fsspec.get_filesystem_class("http").clear_instance_cache()
    with pytest.raises(kind, match=f"cache {tmp_path}.* --cache") as raised:
        data.shard(shards(tiny_data)[0])
    assert "\n" not in str(raised.value)
    monkeypatch.undo()
    fsspec.get_filesystem_class("http").clear_instance_cache()


def test_a_file_in_the_place_of_the_cache(server, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=r"cache .*file.* cannot be written .* --cache"):
            Cache(folder, 10**9, 1)


def test_a_cache_that_vanishes(server, tiny_data, tmp_path):
    data = remote(server.address, tmp_path / "cache", policy=HASTY)
    (tmp_path / "cache").rename(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"cache .* cannot be written"):
        data.shard(shards(tiny_data)[0])


def test_patience_outlasts_every_pause():
    for policy in (Policy(), QUICK, HASTY):
        longest = policy.stall + policy.delay(policy.attempts - 1) * 1.25
        assert policy.patience > longest
