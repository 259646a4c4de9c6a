"""Shards fetched before they are needed, by threads that nobody has to wait for."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.remote.filesystem import RetryPolicy, StoreError
from pipeline.tools.errors import DuetError
from tests.helpers.http_servers import ALWAYS, remote, shards, wait_for

ROOT = Path(__file__).resolve().parents[3]


def test_fetching_ahead(server, tiny_data, tmp_path):
    wanted = shards(tiny_data)
    data = remote(server.address, tmp_path)
    began = time.monotonic()
    data.prefetch(wanted)
    assert time.monotonic() - began < 0.5
    wait_for(lambda: all(data.locate_shard(shard).is_file() for shard in wanted))
    data.prefetch(wanted)
    for shard in wanted:
        assert data.fetch_shard(shard).read_bytes() == (tiny_data / shard.name).read_bytes()
        assert server.counts[shard.name] == 1
    data.close()


def test_new_wishes_replace_those_not_begun(server, tiny_data, tmp_path):
    first, *dropped, last = shards(tiny_data)
    server.fail(first.name, ["slow"])
    data = remote(server.address, tmp_path, threads=1)
    data.prefetch([first, *dropped])
    wait_for(lambda: server.counts[first.name] == 1)
    data.prefetch([last])
    wait_for(lambda: data.locate_shard(last).is_file())
    assert data.locate_shard(first).is_file()
    assert not any(server.counts[shard.name] for shard in dropped)
    data.close()


def test_what_fails_in_the_background_is_raised_where_it_is_needed(server, tiny_data, tmp_path):
    bad, good = shards(tiny_data)[:2]
    server.fail(bad.name, ALWAYS("503"))
    data = remote(server.address, tmp_path, threads=1)
    data.prefetch([bad, good])
    wait_for(lambda: data.locate_shard(good).is_file())
    with pytest.raises(StoreError, match=bad.name):
        data.fetch_shard(bad)
    server.fail(bad.name, [])
    assert data.fetch_shard(bad).read_bytes() == (tiny_data / bad.name).read_bytes()
    data.close()


def test_close_does_not_wait_for_the_store(server, tiny_data, tmp_path):
    slow = RetryPolicy(attempts=4, first_delay=20, stall=20)
    data = remote(server.address, tmp_path, policy=slow)
    for shard, fault in zip(shards(tiny_data), ["stall", "503"], strict=False):
        server.fail(shard.name, ALWAYS(fault))
    data.prefetch(shards(tiny_data)[:2])
    wait_for(lambda: len(list(tmp_path.rglob("*.partial"))) >= 3)
    began = time.monotonic()
    data.close()
    assert time.monotonic() - began < 1.5
    assert not list(tmp_path.rglob("*.partial"))
    with pytest.raises(DuetError, match="stopped"):
        data.fetch_shard(shards(tiny_data)[0])


def test_interpreter_ends_while_a_fetch_is_stuck(server, tiny_data, tmp_path):
    for shard in shards(tiny_data):
        server.fail(shard.name, ALWAYS("stall"))
    script = (
        "import sys, time; from pathlib import Path; from tests.helpers.http_servers import *\n"
        "data = remote(sys.argv[1], Path(sys.argv[2]), policy=RetryPolicy(4, 1, 30))\n"
        "data.prefetch(shards(data.folder))\n"
        "while not list(data.folder.parent.glob('*/*.tar.*')): time.sleep(.01)\n"
        "time.sleep(.2); print('end', time.time())\n"
    )
    command = [sys.executable, "-c", script, server.address, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.time() - float(done.stdout.split()[1]) < 3


def test_a_forked_child_goes_on(server, tiny_data, tmp_path):
    wanted = shards(tiny_data)
    data = remote(server.address, tmp_path)
    data.prefetch(wanted[:2])  # threads of the parent, which the child does not have

    def child() -> None:
        data.prefetch(wanted[3:])
        for shard in wanted:
            assert data.fetch_shard(shard).read_bytes() == (tiny_data / shard.name).read_bytes()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(10)
    assert process.exitcode == 0
    data.close()
