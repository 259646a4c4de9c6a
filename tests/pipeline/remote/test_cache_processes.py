"""Many processes at one cache, some of which are killed or hold what others wait for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipeline.tools.errors import DuetError, UsageError
from pipeline.tools.files import sha256, try_lock, unlock
from tests.helpers.caches import ROOT, size_of, small_size
from tests.helpers.http_servers import ALWAYS, fetch_all, remote, shards, wait_for

SPAWN = multiprocessing.get_context("spawn")


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
    found = {sha256(path) for path in tmp_path.rglob("*.tar")}
    assert found == {shard.sha256 for shard in shards(tiny_data)}


def test_kill_in_the_middle_of_a_fetch(server, tiny_data, tmp_path):
    shard = shards(tiny_data)[0]
    server.fail(shard.name, ["stall"])
    victim = SPAWN.Process(target=fetch_all, args=(server.address, str(tmp_path)))
    victim.start()
    wait_for(lambda: any(map(os.path.getsize, tmp_path.rglob("*.tar.*.partial"))), 20)
    other = remote(server.address, tmp_path, size=small_size(tiny_data, 1))
    found: list[bytes] = []
    waiting = threading.Thread(target=lambda: found.append(other.fetch_shard(shard).read_bytes()))
    waiting.start()
    time.sleep(0.1)
    assert server.counts[shard.name] == 1  # it waits for the one that has begun
    os.kill(victim.pid or 0, signal.SIGKILL)
    waiting.join(10)
    victim.join()
    assert found == [(tiny_data / shard.name).read_bytes()]
    assert server.counts[shard.name] == 2
    other.fetch_shard(shards(tiny_data)[1])
    assert not list(tmp_path.rglob("*.partial"))
    assert size_of(tmp_path) <= small_size(tiny_data, 1)


def test_the_leftovers_of_the_dead_are_removed(server, tiny_data, tmp_path):
    """Partial files count as long as somebody holds their lock, and are rubbish after that."""
    folder = remote(server.address, tmp_path).folder
    for name in ("train-000003.tar.999999999.room.partial", "train-000003.tar.0123abcd.partial"):
        (folder / name).write_bytes(b"x")
    lock = try_lock(folder / "locks" / "train-000003.tar.lock")
    assert lock is not None
    data = remote(server.address, tmp_path, timeout=0.2)
    words = f"has no room for shard train-00000[0-9].tar of {server.address}"
    with pytest.raises(UsageError, match=words):  # it is promised to the one that fetches
        data.fetch_shard(shards(tiny_data)[0])
    unlock(lock)
    data.fetch_shard(shards(tiny_data)[0])
    assert not list(tmp_path.rglob("*.partial"))


def test_one_that_holds_a_lock_and_does_nothing(server, tiny_data, tmp_path):
    data = remote(server.address, tmp_path, timeout=0.3)
    shard = shards(tiny_data)[0]
    path = data.locate_shard(shard)
    lock = try_lock(path.parent / "locks" / f"{path.name}.lock")
    assert lock is not None
    with pytest.raises(DuetError, match=f"another process has held .*{path.name}"):
        data.fetch_shard(shard)
    unlock(lock)
    data.fetch_shard(shard)


def test_a_forked_child_does_not_keep_the_locks_of_its_parent(tmp_path):
    script = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "from pipeline.tools.files import *\n"
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
