"""The order of a run whose data set grows: exactly once an epoch in any world, cut anywhere."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.segments import Segment, Segments, append_version, find_segment
from pipeline.stream.config import split_batch
from pipeline.stream.order import BlockShuffle, FullShuffle, Order, SegmentedOrder, StoredOrder
from tests.helpers.versions import make_identity

shards = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


class Start(NamedTuple):
    """One start of a job, and what came of it."""

    shards: list[int] | None
    """Samples in each shard of the newest version; None: no version came since the last start."""
    world: int
    batch: int
    batches: int
    kept: int
    """Batches that the last checkpoint knows of."""


starts = st.lists(
    st.builds(
        Start, st.none() | shards, st.integers(1, 3), st.integers(3, 20), st.integers(0, 8),
        st.integers(0, 8),
    ),
    min_size=1, max_size=5,
)  # fmt: skip


def make_order(kind: type[Order], sizes: list[int], seed: int) -> Order:
    return BlockShuffle(sizes, seed, 2) if kind is BlockShuffle else kind(sizes, seed)


def combine(kind: type[Order], seed: int, segments: Segments, sizes: dict) -> SegmentedOrder:
    orders = [make_order(kind, sizes[segment.version], seed) for segment in segments]
    return SegmentedOrder(orders, segments)


kinds = st.sampled_from([FullShuffle, BlockShuffle, StoredOrder])


@given(kinds, st.integers(0, 99), shards, starts)
def test_each_epoch_of_each_version_is_delivered_exactly_once(kind, seed, first, attempts):
    position, segments, sizes = 0, (), {make_identity(0): first}
    newest = make_identity(0)
    delivered: dict[int, int] = {}
    for number, start in enumerate(attempts, 1):
        if start.shards is not None:
            newest = make_identity(number)
            sizes[newest] = start.shards
        segments = append_version(segments, position, newest, sum(sizes[newest]))
        order = combine(kind, seed, segments, sizes)
        # What a killed attempt has delivered beyond its checkpoint is made again.
        delivered = {at: sample for at, sample in delivered.items() if at < position}
        for step in range(start.batches):
            for rank in range(start.world):
                low, high = split_batch(start.batch, rank, start.world)
                at = position + step * start.batch + low
                for place, sample in enumerate(order.list_slots(at, high - low).ids.tolist()):
                    assert at + place not in delivered
                    delivered[at + place] = sample
        position += min(start.kept, start.batches) * start.batch
    end = len(delivered)
    assert sorted(delivered) == list(range(end))
    offsets = np.cumsum([0, *(segment.samples for segment in segments)])
    ends = [following.position for following in segments[1:]] + [10**9]
    for segment, offset, last in zip(segments, offsets, ends, strict=False):
        n = segment.samples
        for border in range(segment.position, min(last, end - n + 1), n):
            ids = [delivered[at] - offset for at in range(border, border + n)]
            assert sorted(ids) == list(range(n))


@given(kinds, st.integers(0, 99), starts, st.integers(0, 200), st.integers(0, 60))
def test_in_its_segment_an_order_is_what_it_is_alone(kind, seed, attempts, start, count):
    segments, sizes, position = (), {}, 0
    for number, one in enumerate(attempts):
        identity = make_identity(number)
        sizes[identity] = one.shards or [4, 3]
        segments = append_version(segments, position, identity, sum(sizes[identity]))
        position += one.batch * one.kept
    order = combine(kind, seed, segments, sizes)
    slots = order.list_slots(start, count)
    offsets = np.cumsum([0, *(segment.samples for segment in segments)])
    alone = [make_order(kind, sizes[segment.version], seed) for segment in segments]
    for at, epoch, sample, turn in zip(range(start, start + count), *slots, strict=True):
        number = find_segment(segments, at)
        segment, offset = segments[number], offsets[number]
        place = at - segment.position + segment.epoch * segment.samples
        (expected,) = alone[number].list_slots(place, 1).ids
        assert sample == offset + expected
        assert epoch == turn == place // segment.samples
        substitute = alone[number].choose_substitute(place, int(expected), 1)
        assert order.choose_substitute(at, int(sample), 1) == offset + substitute


def test_the_shards_behind_a_border_are_named_before_they_are_read():
    one, two = Segment("a", 40), Segment("b", 60, 80, 2)
    orders = [BlockShuffle([10] * 4, 3, 2), BlockShuffle([10] * 6, 3, 2)]
    order = SegmentedOrder(orders, (one, two))
    for position in range(200):
        named = order.list_shards(position)
        (sample,) = order.list_slots(position, 1).ids
        shard = sample // 10
        assert shard in named[:2]
        assert order.list_shards(position) is named
        assert all(0 <= shard < 10 for shard in named)
    assert set(order.list_shards(80)[:2]) <= set(order.list_shards(79))


def test_positions_before_the_first_are_refused():
    order = SegmentedOrder([FullShuffle([5])], (Segment("a", 5),))
    with pytest.raises(ValueError, match="position=-1"):
        order.list_slots(-1, 3)
    assert order.list_slots(7, 0).ids.tolist() == []
