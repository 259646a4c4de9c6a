"""Parts of the profiler: clocks, waits, bounds, queues, comparisons, plans, the search."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stream.timing import Spent
from pipeline.throughput import stages
from pipeline.throughput.capacity import plan_capacity
from pipeline.throughput.clock import MOST, CpuLoad, Rate, make_row, measure, measure_in_turn
from pipeline.throughput.diagnosis import list_thread_counts
from pipeline.throughput.model import interpolate_pixels, list_bounds, predict_rate, simulate_queue
from pipeline.throughput.report import compare_reports, has_regressed, list_differences
from pipeline.throughput.stages import Setting, open_parts
from tests.helpers.fake_costs import costs
from tests.helpers.images import packed

TIMES = st.floats(1e-6, 1e-2)


def test_a_rate_is_a_median_with_its_spread():
    rate = Rate((90.0, 100.0, 110.0, 100.0, 1000.0), 1.0, 0.0)
    assert rate.median == 100
    low, _, high = np.quantile(rate.windows, [0.25, 0.5, 0.75])
    assert rate.spread == pytest.approx((high - low) / 2 / 100)
    assert rate.is_steady
    assert not Rate((1.0, 2.0, 3.0), 0, 0).is_steady


@given(st.lists(st.floats(1, 1e9), min_size=1, max_size=5), st.floats(1, 1e9))
def test_no_share_of_a_limit_is_above_one(windows, limit):
    row = make_row("checksum", Rate(tuple(windows), 1.0, 0.0), 1.0, limit=limit, against="CRC-32")
    assert row.share <= 1
    assert row.share == pytest.approx(row.img_s / row.limit_img_s)
    assert row.limit_img_s == max(limit, row.img_s)
    assert ("slower when" in row.against) == (row.img_s > limit)


def test_the_first_call_is_not_counted_and_unsteady_windows_are_repeated():
    times = itertools.chain([0.2], itertools.cycle([0.012, 0.03]))

    def work() -> int:
        time.sleep(next(times))
        return 1

    rate = measure(work, 0.05)
    assert len(rate.windows) == MOST  # they never agree
    assert rate.median > 10  # the warm-up alone would make it 5


def test_things_measured_in_turn_keep_their_order():
    def takes(seconds: float):
        return lambda: time.sleep(seconds) or 1

    rates = measure_in_turn({1: takes(0.002), 2: takes(0.006)}, 0.1)
    assert 2 < rates[1].median / rates[2].median < 4


def test_what_lay_ready_before_a_window_is_not_counted():
    def ahead(seconds: float):
        """Two items are made while nobody asks, as by a decoder that is left alone."""
        state = {"ready": 2, "asked": time.perf_counter()}

        def work() -> int:
            if time.perf_counter() - state["asked"] > 0.05:
                state["ready"] = 2
            if state["ready"]:
                state["ready"] -= 1
            else:
                time.sleep(seconds)
            state["asked"] = time.perf_counter()
            return 1

        return work

    rates = measure_in_turn({1: ahead(0.02), 2: ahead(0.02)}, 0.5)
    assert all(rate.median < 1.1 / 0.02 for rate in rates.values())


def test_own_work_is_not_others():
    load, start, until = CpuLoad(), time.perf_counter(), time.process_time() + 0.3
    while time.process_time() < until:
        pass
    cores = load.cores()
    assert cores * (time.perf_counter() - start) == pytest.approx(0.3, rel=0.2)
    assert 0 <= load.others() <= 1


def test_the_lowest_bound_holds_the_stream_back():
    found = {bound.name: bound.img_s for bound in list_bounds(costs())}
    assert found["the pixels"] == 4000
    assert found["the reading thread"] == pytest.approx(1 / 2.1e-5)
    assert found["the processors"] == pytest.approx(4 / (2.1e-5 + 1e-6 + 1e-3))
    assert predict_rate(costs()) == min(found.values()) == found["the processors"]
    assert predict_rate(costs(threads=1)) == 1000
    assert predict_rate(costs(store=500.0)) == 500
    busy = costs(store=1e6, fetch_cpu=2e-3)  # fetching and checking takes of the same processors
    assert predict_rate(busy) == pytest.approx(4 / (2.1e-5 + 1e-6 + 1e-3 + 2e-3))
    assert predict_rate(costs(reader=Spent(0, 0.01))) == pytest.approx(100)
    assert interpolate_pixels(costs(), 2).median == pytest.approx(2000)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.2, 5), st.integers(1, 5))
def test_queues_even_out_but_lift_no_bound(seed, ratio, depth):
    draws = np.random.default_rng(seed)
    read, pixels = draws.exponential(0.01, 600), draws.exponential(0.01 * ratio, 600)
    rates = [simulate_queue(read, pixels, length) for length in (1, depth, depth + 1, 600)]
    assert rates[0] <= rates[1] * 1.02
    assert rates[1] <= rates[2] * 1.02  # a longer queue evens out more
    assert rates[2] <= rates[3] * 1.1
    slower = max(read.mean(), pixels.mean())
    assert rates[1] <= 1.25 / slower  # of 600 draws; what lay ready at the clock's start
    assert rates[0] >= 0.9 / (read.mean() + pixels.mean())  # never worse than one after the other


def test_steady_queues_run_at_the_slower_side():
    assert simulate_queue([0.02] * 100, [0.01] * 100, 2) == pytest.approx(50)
    assert simulate_queue([0.01] * 100, [0.02] * 100, 1) == pytest.approx(50)
    bursts = [0.0, 0.0, 0.0, 0.08] * 100  # 0.02 on average
    assert simulate_queue(bursts, [0.02] * 400, 1) < 0.8 * simulate_queue(bursts, [0.02] * 400, 6)
    assert simulate_queue(bursts, [0.02] * 400, 6) == pytest.approx(50, rel=0.03)


def report(img_s, error=0.0):
    row = {"name": "decode", "img_s": img_s, "error": error}
    return {
        "stages": [row], "whole": row | {"name": "the whole stream"},
        "machine": {"cores": 2}, "setting": {"threads": 2}, "data": {"where": "x"},
    }  # fmt: skip


def test_a_difference_counts_beyond_the_noise_only():
    def whole(old, new):
        return compare_reports(old, new)[-1].verdict

    assert whole(report(100), report(102)) == "same"
    assert whole(report(100), report(110)) == "faster"
    assert whole(report(100), report(90)) == "slower"
    assert whole(report(100, 0.05), report(90, 0.05)) == "same"
    assert has_regressed(compare_reports(report(100), report(90)))
    assert not has_regressed(compare_reports(report(90), report(100)))
    other = report(100) | {"machine": {"cores": 8}}
    assert list_differences(report(100), other) == ["cores: 2 -> 8"]
    later = report(100) | {"setting": {"threads": 2, "seed": 0}}  # a setting that is told since
    assert list_differences(report(100), later) == []


def test_a_plan_is_arithmetic_on_marked_figures():
    plan = plan_capacity(None, gpus=16, img_s=20_000, store="s3")
    needs = {need.name: need.value for need in plan.needs}
    assert needs["nodes"] == 2
    assert needs["cores, all nodes"] == pytest.approx(20_000 * 6e-4 * 1.1)
    assert needs["read, all nodes"] == pytest.approx(20_000 * 37_300 * 1.1 / 1e9)
    assert needs["first epoch"] == pytest.approx(1_281_167 / 20_000 / 60)
    slow = plan_capacity(None, gpus=2, img_s=20_000, store="http")
    answer = {need.name: need for need in slow.needs}
    assert answer["first epoch"].value == pytest.approx(1_281_167 * 37_300 / 250e6 / 60)
    assert answer["read, all nodes"].enough is False


def test_threads_from_one_to_more_than_there_are_cores_are_tried():
    assert list_thread_counts(Setting(data="x", threads=2, cores=2)) == [1, 2, 3]
    assert list_thread_counts(Setting(data="x", threads=16, cores=16)) == [1, 4, 8, 16, 24]
    assert 5 in list_thread_counts(Setting(data="x", threads=5, cores=16))
    most = list_thread_counts(Setting(data="x", threads=8, cores=1000))
    assert most == [1, 8, 250, 500, 1000, 1024]  # no stream takes more


def test_raw_images_are_first_read_by_the_checksum(image_folder, tmp_path):
    packed(tmp_path / "raw", train=image_folder / "train", encoding="raw", samples_per_shard=10)
    setting = Setting(data=str(tmp_path / "raw"), batch_size=8, threads=1)
    with open_parts(setting) as parts:
        found = stages.measure_stages(parts, 0.05, 4)
    rows = {row.name: row.img_s for row in found.stages}
    assert {"checksum", "feed", "normalise", "hand-over"} <= set(rows)
    assert not {"storage, page cache", "decode"} & set(rows)
    assert all(1 < rate < 1e9 for rate in rows.values())
