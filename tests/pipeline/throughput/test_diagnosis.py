"""A set is read from memory, from the disk or from a store, and other changes help then."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.stream.timing import Spent
from pipeline.throughput import model as remedies_of
from pipeline.throughput.clock import Rate
from pipeline.throughput.diagnosis import find_state, write_verdict
from pipeline.throughput.model import predict_rate
from pipeline.throughput.stages import ReaderRate, Setting, StageRates, open_parts
from pipeline.throughput.stream_rate import FetchRate, StreamRate
from tests.helpers.fake_costs import costs

READ = Spent(0, 1e-5, 1e-6, 1e-5)
SLOW = Spent(0, 1e-3, 1e-6, 1e-5)


def reading_of(spent):
    return ReaderRate(windows=(spent,), cpu=0.1, others=0.0, each=(128 * spent.total,))


@pytest.fixture
def states(tiny_data, monkeypatch):
    """Return a function that diagnoses the stream of a set with some memory, or behind a store."""
    with open_parts(Setting(data=str(tiny_data), batch_size=8)) as parts:

        def of(memory: float, fetched=None, cold=SLOW):
            monkeypatch.setattr("pipeline.throughput.diagnosis.available_memory", lambda: memory)
            alone = StageRates(stages=(), warm=reading_of(READ), loaded=(), disk=1e9,
                          cold=reading_of(cold) if cold else None)  # fmt: skip
            rate = Rate((3000.0,), 4.0, 0.0)
            found = StreamRate(rate=rate, batches=(), prefetch=2)
            return find_state(parts, alone, costs(), found, fetched)

        yield of


def test_a_set_that_fits_is_in_memory_and_one_that_does_not_is_on_the_disk(states):
    now = states(1e12)
    assert (now.state, now.img_s, now.fits) == ("From the page cache", 3000, True)
    assert now.reading.seconds == READ
    block = remedies_of._change_shuffle(now)
    assert (block.gain, block.note) == (1.0, "the set is in memory after its first epoch")
    now = states(0)
    assert "larger than memory" in now.state
    assert now.reading.seconds == now.costs.reader == SLOW
    assert now.img_s == pytest.approx(3000 * predict_rate(costs(reader=SLOW, reader_cpu=0.1))
                                      / predict_rate(costs()))  # fmt: skip
    now = states(0, cold=None)  # nobody can tell the disk from memory
    assert now.state == "From the page cache"


def test_a_set_in_a_store_is_first_bound_by_it_and_then_by_the_cache(states):
    fetched = FetchRate(alone=1e6, together=4e6, shards=9, cpu=0.5, others=0.0)
    now = states(1e12, fetched)
    size = now.parts.bytes_each
    assert now.state == "In its first epoch, from the store,"
    assert now.costs.store == pytest.approx(4e6 / size)
    assert now.costs.fetch_cpu == pytest.approx(0.5 * size / 4e6)
    assert now.img_s == pytest.approx(3000 * predict_rate(now.costs) / predict_rate(costs()))
    cache = remedies_of._change_cache(now)
    assert cache.img_s == pytest.approx(3000)
    assert cache.gain == pytest.approx(predict_rate(costs()) / predict_rate(now.costs))
    assert remedies_of._change_cache(states(1e12)).gain is None


STEADY, WILD = Rate((3000.0,) * 5, 4.0, 0.0), Rate((1500.0, 4500.0, 3000.0, 2000.0, 4000.0), 4.0, 0)


def faster(rate: Rate, factor: float) -> Rate:
    return Rate(tuple(factor * each for each in rate.windows), rate.cpu, rate.others)


def test_no_thread_beyond_the_cores_is_promised(states):
    now = states(1e12)
    pixels = {1: STEADY, 2: faster(STEADY, 1.9), 3: faster(STEADY, 2.6)}
    for cores, change in ((2, "2 -> 1"), (3, "2 -> 3")):
        few = costs(pixels=pixels, cores=cores, threads=2, reader=Spent(0, 1e-7))
        found = remedies_of._change_threads(replace(now, costs=few))
        assert found.change == change
        assert remedies_of.find_knee(few) <= cores
    alone = costs(pixels={1: STEADY, 2: STEADY}, cores=1, threads=1)
    assert remedies_of._change_threads(replace(now, costs=alone)) is None


@pytest.mark.parametrize(
    ("before", "factor", "whole", "sure"),
    [
        (STEADY, 1.33, STEADY, True),
        (WILD, 1.33, STEADY, False),
        (STEADY, 1.33, WILD, False),
        (Rate((2900.0, 3000.0, 3100.0, 2800.0, 3200.0), 4.0, 0), 1.05, STEADY, False),  # noise
        (WILD, 1.0, STEADY, True),  # promises nothing
    ],
)
def test_a_gain_is_a_fact_only_if_what_it_is_from_was_steady(states, before, factor, whole, sure):
    pixels = {1: before, 2: faster(before, factor)}
    now = replace(
        states(1e12), costs=costs(pixels=pixels, cores=8, threads=1, reader=Spent(0, 1e-7)),
        rate=whole,
    )  # fmt: skip
    found = remedies_of._change_threads(now)
    assert found.gain == pytest.approx(factor)
    assert found.sure == sure
    bounds = remedies_of.list_bounds(now.costs)
    text = write_verdict(state="x", img_s=3000.0, bounds=bounds, stages=[], remedies=[found],
                         needed=None)  # fmt: skip
    assert ("What helps most: threads" in text) == (sure and factor > 1)
    assert ("cannot be told" in text) == (not sure)
