from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.stream import order as order_module
from pipeline.stream.augment import draw_below
from pipeline.stream.config import split_batch
from pipeline.stream.order import BlockShuffle, FullShuffle, Order, StoredOrder, WeightedOrder

seeds = st.integers(0, 2**63 - 1)
shards = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
windows = st.integers(1, 5)


def epoch_of(seed: int, epoch: int, samples: int) -> np.ndarray:
    return FullShuffle([samples], seed).list_slots(epoch * samples, samples).ids


@st.composite
def orders(draw) -> Order:
    sizes, seed = draw(shards), draw(seeds)
    return draw(
        st.sampled_from(
            [
                FullShuffle(sizes, seed),
                BlockShuffle(sizes, seed, draw(windows)),
                StoredOrder(sizes, seed),
            ]
        )
    )


@given(orders(), st.integers(0, 5))
def test_an_epoch_holds_each_sample_once(order, epoch):
    n = order.samples
    slots = order.list_slots(epoch * n, n)
    assert sorted(slots.ids) == list(range(n))
    assert set(slots.epochs) == {epoch}


@given(orders(), st.integers(0, 300), st.lists(st.integers(0, 200), max_size=8))
def test_cutting_the_stream_anywhere_changes_nothing(order, start, cuts):
    whole = order.list_slots(start, sum(cuts))
    position, parts = start, []
    for count in cuts:
        parts.append(order.list_slots(position, count))
        position += count
    assert whole.ids.tolist() == [i for part in parts for i in part.ids]
    assert whole.epochs.tolist() == [e for part in parts for e in part.epochs]


@given(
    orders(),
    st.integers(0, 200),
    st.lists(st.tuples(st.integers(1, 8), st.integers(8, 60), st.integers(0, 4)), max_size=6),
)
def test_exactly_once_over_restarts_in_other_worlds(order, start, attempts):
    """Each attempt: a world, a batch size, batches until it is cut. No sample lost, none twice."""
    delivered: list[int] = []
    position = start
    for world, batch, batches in attempts:
        for _ in range(batches):
            for rank in range(world):
                first, last = split_batch(batch, rank, world)
                delivered += order.list_slots(position + first, last - first).ids.tolist()
            position += batch
    assert delivered == order.list_slots(start, position - start).ids.tolist()
    n = order.samples
    ends = [min((start // n + 1) * n, position), *range((start // n + 2) * n, position + 1, n)]
    for a, b in zip([start, *ends], [*ends, position], strict=True):
        assert len(set(delivered[a - start : b - start])) == b - a


@given(shards, seeds, windows, st.integers(0, 3))
def test_a_block_shuffle_reads_only_the_shards_it_named(sizes, seed, window, epoch):
    order = BlockShuffle(sizes, seed, window)
    for place in range(order.samples):
        position = epoch * order.samples + place
        named = order.list_shards(position)
        shard = (
            int(np.searchsorted(order.starts, order.list_slots(position, 1).ids[0], "right")) - 1
        )
        assert shard in named[:window]
        assert len(named) <= 2 * window
    assert order.list_shards(position) is order.list_shards(position)


def test_the_next_window_is_named_before_it_is_read():
    order = BlockShuffle([10] * 6, seed=3, window=2)
    for window in range(9):  # over epoch borders
        following = order.list_shards((window + 1) * 20)[:2]
        assert set(following) <= set(order.list_shards(window * 20))


def test_a_stored_order_names_the_shard_it_reads_and_the_next():
    order = StoredOrder([3, 0, 2, 4])
    assert order.list_slots(0, 9).ids.tolist() == list(range(9))
    assert [order.list_shards(position)[0] for position in range(9)] == [0, 0, 0, 2, 2, 3, 3, 3, 3]


@given(orders(), st.integers(0, 500), st.integers(0, 20))
def test_a_substitute_is_a_sample_and_follows_from_its_place_in_the_epoch(order, position, turn):
    due = int(order.list_slots(position, 1).ids[0])
    found = order.choose_substitute(position, due, turn)
    assert 0 <= found < order.samples
    if isinstance(order, BlockShuffle):
        near = [order.starts[s : s + 2] for s in order.list_shards(position)[: order.window]]
        assert any(start <= found < end for start, end in near)
    again = type(order)(
        np.diff(order.starts).tolist(),
        order.seed,
        *([order.window] if isinstance(order, BlockShuffle) else []),
    )
    assert again.choose_substitute(position, due, turn) == found


def test_substitutes_are_spread():
    order = FullShuffle([1000], seed=1)
    found = {order.choose_substitute(0, due, turn) for due in range(100) for turn in range(10)}
    assert len(found) > 600  # 632 of 1000 draws with return


@given(st.integers(0, 500), st.integers(1, 16))
def test_shares_are_disjoint_in_order_and_cover_the_batch(count, world):
    ranges = [split_batch(count, rank, world) for rank in range(world)]
    assert [i for first, last in ranges for i in range(first, last)] == list(range(count))
    sizes = [last - first for first, last in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_the_order_is_the_one_runs_were_made_with():
    """A change of these numbers (ours or NumPy's) makes every saved position mean another order."""
    assert epoch_of(0, 0, 10).tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]
    assert epoch_of(1, 0, 10).tolist() != epoch_of(0, 1, 10).tolist()
    block = BlockShuffle([3, 3, 3, 2], seed=0, window=2)
    assert block.list_slots(0, 11).ids.tolist() == [7, 1, 2, 0, 8, 6, 4, 5, 10, 9, 3]
    assert [FullShuffle([10]).choose_substitute(0, 3, turn) for turn in range(3)] == [3, 7, 6]


def test_neighbouring_seeds_epochs_and_windows_are_unrelated():
    orders = [epoch_of(seed, epoch, 2000) for seed in range(3) for epoch in range(3)]
    block = BlockShuffle([1000] * 4, seed=5, window=2)
    windows = [block.list_slots(start, 2000).ids for start in range(0, 16000, 2000)]
    orders += [np.argsort(window) for window in windows]
    for a in range(len(orders)):
        for b in range(a):
            assert abs(np.corrcoef(orders[a], orders[b])[0, 1]) < 0.1


def test_the_shuffle_is_a_full_one():
    moved = np.abs(epoch_of(5, 0, 10_000) - np.arange(10_000)).mean() / 10_000
    assert moved == pytest.approx(1 / 3, abs=0.01)  # the ideal's mean displacement


def test_a_shuffle_in_parts_is_as_good(monkeypatch):
    """Every sample is as likely at every place: 24 samples in 4 parts, 4,000 epochs."""
    monkeypatch.setattr(order_module, "PART", 8)
    counts = np.zeros((24, 24))
    together = 0
    for epoch in range(4000):
        ids = epoch_of(9, epoch, 24)
        assert sorted(ids) == list(range(24))
        counts[ids, np.arange(24)] += 1
        together += abs(int(np.flatnonzero(ids == 0)[0]) - int(np.flatnonzero(ids == 1)[0])) == 1
    expected = 4000 / 24
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert 23 * 23 - 5 * 32.5 < chi2 < 23 * 23 + 5 * 32.5  # 529 degrees of freedom, 5 deviations
    assert together / 4000 == pytest.approx(2 / 24, abs=0.022)
    whole = FullShuffle([24], 9).list_slots(0, 240).ids
    parts = [FullShuffle([24], 9).list_slots(start, 7).ids for start in range(0, 238, 7)]
    assert whole[:238].tolist() == np.concatenate(parts).tolist()


@pytest.mark.parametrize("limit", [2, 3, 7, 477, 40_000, 65_535])
def test_parts_are_drawn_in_blocks_as_numpy_draws_them_at_once(limit):
    def generator() -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([limit, 3])))

    for count in (1, 5, 300_001):
        expected = generator().integers(0, limit, count, dtype=np.uint16)
        blocks = list(draw_below(generator(), limit, count))
        assert np.array_equal(np.concatenate(blocks), expected)
    assert len(blocks) >= 2


def test_an_order_of_many_samples_takes_memory_for_two_parts():
    """Nothing is kept for each sample: 2 bytes would be 60 MB here, and 2 GB at a billion."""
    order = FullShuffle([10_000] * 3_000, seed=4)
    tracemalloc.start()
    order.list_slots(31_000_000, 128)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 3 * 8 * order_module.PART


def test_the_cached_order_cannot_be_spoilt():
    with pytest.raises(ValueError, match="read-only"):
        FullShuffle([10]).list_places(0, 0, 10)[0] = 3


@pytest.mark.parametrize(("position", "count"), [(-1, 1), (0, -1)])
def test_numbers_out_of_range_are_refused(position, count):
    with pytest.raises(ValueError, match="no order for"):
        FullShuffle([5]).list_slots(position, count)
    for bad in ([], [0]):
        with pytest.raises(ValueError, match="samples=0"):
            FullShuffle(bad)
    with pytest.raises(ValueError, match="seed=-1"):
        FullShuffle([5], -1)
    with pytest.raises(ValueError, match="window=0"):
        BlockShuffle([5], 0, 0)
    with pytest.raises(ValueError, match="rank 2"):
        split_batch(8, 2, 2)


def test_a_full_shuffle_names_all_shards_soonest_first():
    order = FullShuffle([4] * 10, seed=2)
    named = order.list_shards(20)
    read = np.searchsorted(order.starts, order.list_slots(20, 20).ids, "right") - 1
    assert list(named)[: len(set(read))] == list(dict.fromkeys(read.tolist()))
    assert sorted(named) == list(range(10))
    assert order.list_shards(35) is named


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 2**62), st.data())
def test_orders_of_a_selection_are_those_of_its_samples(sizes, seed, data):
    total = sum(sizes)
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)), bool)
    if not kept.any():
        return
    selected = np.flatnonzero(kept)
    orders = [
        FullShuffle(sizes, seed, selected=selected),
        BlockShuffle(sizes, seed, 2, selected=selected),
        StoredOrder(sizes, seed, selected=selected),
    ]
    for order in orders:
        n = len(selected)
        assert order.samples == n
        for epoch in range(2):
            assert sorted(order.list_slots(epoch * n, n).ids) == selected.tolist()
        starts = np.concatenate(([0], np.cumsum(sizes)))
        shard = int(np.searchsorted(starts, order.list_slots(n // 2, 1).ids[0], "right")) - 1
        assert shard in order.list_shards(n // 2)
        assert all(kept[starts[s] : starts[s + 1]].any() for s in order.list_shards(0))
        assert order.choose_substitute(1, int(selected[0]), 3) in selected
    weights = np.arange(len(selected)) % 2 + (len(selected) == 1)
    drawn = WeightedOrder(sizes, seed, weights, selected=selected)
    slots = drawn.list_slots(5, 200)
    heavy = set(selected[weights > 0].tolist())
    assert set(slots.ids.tolist()) <= heavy
    assert {drawn.choose_substitute(7, int(selected[0]), turn) for turn in range(9)} <= heavy
    assert slots.turns.tolist() == list(range(5, 205))
