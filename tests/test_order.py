from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.order import permutation, share, shuffled

samples = st.integers(1, 300)
seeds = st.integers(0, 2**63 - 1)


@given(samples, seeds, st.integers(0, 5))
def test_an_epoch_holds_each_sample_once(n, seed, epoch):
    slots = shuffled(n, seed, epoch * n, n)
    assert sorted(slots.ids) == list(range(n))
    assert set(slots.epochs) == {epoch}


@given(samples, seeds, st.lists(st.integers(0, 200), max_size=8))
def test_cutting_the_stream_anywhere_changes_nothing(n, seed, cuts):
    whole = shuffled(n, seed, 7, sum(cuts))
    position, parts = 7, []
    for count in cuts:
        parts.append(shuffled(n, seed, position, count))
        position += count
    assert whole.ids.tolist() == [i for part in parts for i in part.ids]
    assert whole.epochs.tolist() == [e for part in parts for e in part.epochs]


@given(st.integers(0, 500), st.integers(1, 16))
def test_shares_are_disjoint_in_order_and_cover_the_batch(count, world):
    ranges = [share(count, rank, world) for rank in range(world)]
    assert [i for first, last in ranges for i in range(first, last)] == list(range(count))
    sizes = [last - first for first, last in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_the_order_is_the_one_runs_were_made_with():
    """A change of these numbers (ours or NumPy's) makes every saved position mean another order."""
    assert permutation(0, 0, 10).tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]
    assert permutation(1, 0, 10).tolist() != permutation(0, 1, 10).tolist()


def test_neighbouring_seeds_and_epochs_are_unrelated():
    orders = [permutation(seed, epoch, 2000) for seed in range(3) for epoch in range(3)]
    for a in range(len(orders)):
        for b in range(a):
            assert abs(np.corrcoef(orders[a], orders[b])[0, 1]) < 0.1


def test_the_shuffle_is_a_full_one():
    moved = np.abs(permutation(5, 0, 10_000) - np.arange(10_000)).mean() / 10_000
    assert moved == pytest.approx(1 / 3, abs=0.01)  # the ideal's mean displacement


def test_the_cached_order_cannot_be_spoilt():
    with pytest.raises(ValueError, match="read-only"):
        permutation(0, 0, 10)[0] = 3


@pytest.mark.parametrize("bad", [(0, 0, 0, 1), (5, -1, 0, 1), (5, 0, -1, 1), (5, 0, 0, -1)])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="no order for"):
        shuffled(*bad)
    with pytest.raises(ValueError, match="rank 2"):
        share(8, 2, 2)
