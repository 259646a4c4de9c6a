"""Seconds that `next` waits are counted under the stage that was not ready."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches import Stream
from pipeline.stream.shard_reader import ShardReader
from pipeline.stream.timing import Spent, WaitTimes


@given(st.lists(st.floats(1e-6, 1e-2), min_size=4, max_size=4), st.floats(0, 10))
def test_waiting_for_a_reader_is_shared_out_by_what_it_did(parts, seconds):
    waits, spent = WaitTimes(), Spent(*parts)
    waits.add_read_wait(seconds, spent)
    assert waits.total == pytest.approx(seconds)
    assert waits.storage == pytest.approx(seconds * spent.storage / spent.total)


def test_waits_add_up_to_the_wall_and_name_what_is_slow(tiny_data, monkeypatch):
    read = ShardReader.read

    def slow(self, ids, into):
        time.sleep(0.05)
        self._reading += 0.05
        return read(self, ids, into)

    monkeypatch.setattr(ShardReader, "read", slow)
    with Stream(tiny_data, batch_size=8, threads=1) as stream:
        for _ in range(6):
            next(stream)
        before, start = stream.waits.copy(), time.perf_counter()
        for _ in range(10):
            next(stream)
        wall, waits = time.perf_counter() - start, stream.waits.since(before)
        assert stream.read_ahead == 0
    assert waits.total == pytest.approx(wall, rel=0.03)
    assert waits.storage > 0.8 * wall


def test_a_stream_that_is_ahead_is_hardly_waited_for(tiny_data):
    with Stream(tiny_data, batch_size=8, threads=1) as stream:
        for _ in range(4):
            next(stream)
        before = stream.waits.copy()
        for _ in range(5):
            time.sleep(0.1)  # a trainer's step
            next(stream)
        assert stream.read_ahead == 2
        assert stream.waits.since(before).total < 0.1
