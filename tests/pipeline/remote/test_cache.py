"""The room of a cache: its size holds, and the least recently used leaves first."""

from __future__ import annotations

import threading
import time

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.remote.filesystem import RetryPolicy
from pipeline.tools.errors import UsageError
from pipeline.tools.files import sha256
from tests.helpers.caches import here, size_of, small_size
from tests.helpers.http_servers import HASTY, QUICK, Server, remote, shards, wait_for


def test_least_recently_used_leaves_first(server, tiny_data, tmp_path):
    known = shards(tiny_data)
    data = remote(server.address, tmp_path, size=small_size(tiny_data, 3))
    for number in (0, 1, 2, 0):
        data.fetch_shard(known[number])
    held = data.locate_shard(known[1]).open("rb")
    data.fetch_shard(known[3])
    assert here(data) == {0, 2, 3}
    data.fetch_shard(known[4])
    assert here(data) == {0, 3, 4}
    with held:
        assert held.read() == (tiny_data / known[1].name).read_bytes()
    data.fetch_shard(known[0])
    assert server.counts[known[0].name] == 1
    data.fetch_shard(known[1])
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
        one.fetch_shard(known[0])
        one.fetch_shard(known[1])
        two.fetch_shard(known[2])
        assert here(one) == here(two) == {1, 2}
        assert two.fetch_shard(known[1]) == one.fetch_shard(known[1])
        assert not other.counts[known[1].name]
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
                sets[which].prefetch(known[number:])
            elif call == "s":
                sets[which].fetch_shard(known[number])
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
        assert sha256(path) == path.stem


def test_fetching_ahead_does_not_remove_what_is_wished_for(server, tiny_data, tmp_path):
    known = shards(tiny_data)
    data = remote(server.address, tmp_path, size=small_size(tiny_data, 3))
    data.fetch_shard(known[4])
    data.prefetch(known[:4])
    wait_for(lambda: here(data) == {0, 1, 2})
    time.sleep(0.1)
    assert here(data) == {0, 1, 2}
    assert not server.counts[known[3].name]
    data.prefetch(known[1:4])  # the reader has gone on
    wait_for(lambda: here(data) == {1, 2, 3})
    data.close()
    assert max(server.counts.values()) == 1


def test_threads_that_need_the_same_room_all_get_it(server, tiny_data, tmp_path):
    """Five threads that each want another shard take turns where there is room for one."""
    known = shards(tiny_data)
    data = remote(server.address, tmp_path, size=small_size(tiny_data, 1), timeout=20)
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
    data = remote(server.address, tmp_path, size=small_size(tiny_data, 1) - 1, timeout=0.2)
    with pytest.raises(UsageError, match="no room"):
        data.fetch_shard(max(shards(tiny_data), key=lambda shard: shard.bytes))


def test_files_of_others_are_not_touched(server, tiny_data, tmp_path):
    for place in (
        "mine.tar",
        "set/mine.tar",
        "set/x.partial",
        "0123456789abcdef/mine.tar",
        "sha256/x.tar",
    ):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(bytes(10**6))
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    data = remote(server.address, tmp_path, size=small_size(tiny_data, 1))
    for shard in shards(tiny_data):
        data.fetch_shard(shard)
    assert len(here(data)) == 1
    assert all(path.stat().st_size == 10**6 for path in before)


def test_the_lock_timeout_outlasts_every_pause():
    for policy in (RetryPolicy(), QUICK, HASTY):
        longest = policy.stall + policy.delay(policy.attempts - 1) * 1.25
        assert policy.lock_timeout > longest
