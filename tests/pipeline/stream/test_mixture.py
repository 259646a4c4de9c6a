"""Mixtures: shares, orders, classes and keys of several datasets that are read as one."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches import Stream
from pipeline.dataset.index import sample_key
from pipeline.stream.order import FullShuffle, Mixture, WeightedOrder
from pipeline.tools.errors import UsageError
from tests.helpers.images import packed
from tests.helpers.streams import SMALL, labels_of, read_ids


def test_balanced_weights_hold_in_each_set_of_a_mixture(tiny_data, second_data):
    both = np.concatenate([labels_of(tiny_data), labels_of(second_data)])
    first = len(labels_of(tiny_data))
    rare = (both != 1) | (np.arange(len(both)) >= first) | (np.cumsum(both == 1) == 1)
    data = {tiny_data: 0.5, second_data: 0.5}
    ids = read_ids(data, 2400, where=rare, weights="balanced", size=8)
    counts = np.bincount(both[ids], minlength=4)
    assert abs(counts - 600).max() < 4 * np.sqrt(2400 * 3 / 16)
    lacking = (both != 1) | (np.arange(len(both)) >= first)
    with pytest.raises(UsageError, match="cannot balance class 'bird': not every dataset"):
        Stream(data, where=lacking, weights="balanced", **SMALL)


def test_keys_that_two_sets_of_a_mixture_have_are_refused(tiny_data, second_data, tmp_path):
    path = tmp_path / "table.csv"
    keys = [sample_key(number, place) for number in range(5) for place in range(10)]
    path.write_text("key,year\n" + "".join(f"{key},3\n" for key in keys))
    data = {tiny_data: 0.5, second_data: 0.5}
    with pytest.raises(UsageError, match="the mixture has key 000000_00000 more than once"):
        Stream(data, where={"year": 3}, table=path, **SMALL)
    with Stream(data, **SMALL) as stream:
        with pytest.raises(KeyError, match="'000000_00000' more than once; give an id, as"):
            stream["000000_00000"]
        assert stream["000000_00009"].id == 9  # the second set has shards of 4


def test_a_mixture_holds_its_shares_and_each_set_its_own_order(tiny_data, second_data):
    first, second = len(labels_of(tiny_data)), len(labels_of(second_data))
    data = {str(tiny_data): 0.7, str(second_data): 0.3}
    with Stream(data, **SMALL) as stream:
        assert stream.samples == first + second
        batches = list(itertools.islice(stream, 90))
    ids = np.concatenate([batch.ids for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches])
    assert np.count_nonzero(ids[:1000] >= first) == 300
    mine = ids[ids < first]
    assert mine.tolist() == FullShuffle([first], 3).list_slots(0, len(mine)).ids.tolist()
    theirs = ids[ids >= first] - first
    for start in range(0, len(theirs) - second, second):
        assert sorted(theirs[start : start + second]) == list(range(second))
    both = np.concatenate([labels_of(tiny_data), labels_of(second_data)])
    assert (labels == both[ids]).all()
    mean = [_channel_mean(one) for one in (tiny_data, second_data)]
    assert np.allclose(stream.channel_mean, 0.7 * mean[0] + 0.3 * mean[1])
    once = read_ids(data, first + second, once=True)
    assert once == list(range(first + second))


def _channel_mean(data: Path) -> np.ndarray:
    with np.load(data / "stats.npz") as arrays:
        return arrays["channel_mean"]


def test_a_mixture_reads_a_store_through_the_cache(tiny_data, second_data, server, tmp_path):
    settings = {"cache": tmp_path / "cache", "shuffle": "block", "window": 1}
    local = read_ids({second_data: 0.5, tiny_data: 0.5}, 100, **settings)
    assert read_ids({second_data: 0.5, server.address: 0.5}, 100, **settings) == local
    size = sum(path.stat().st_size for path in tiny_data.glob("*.tar")) // 5
    with pytest.raises(UsageError, match="cannot hold the 2 shards"):
        read_ids({second_data: 0.5, server.address: 0.5}, 1, **settings, cache_size=size)


shares = st.lists(st.floats(0.02, 5), min_size=2, max_size=4)


@given(shares, st.integers(0, 2**40), st.lists(st.integers(0, 1500), max_size=5), st.data())
def test_a_mixture_is_a_pure_function_of_the_position(weights, start, cuts, data):
    sizes = [data.draw(st.integers(1, 500)) for _ in weights]
    orders = [FullShuffle([size], number) for number, size in enumerate(sizes)]
    orders[0] = WeightedOrder([sizes[0]], 5, np.arange(1, sizes[0] + 1))
    mixture = Mixture(orders, weights, np.array(sizes))
    whole = mixture.list_slots(start, sum(cuts))
    firsts = [start + sum(cuts[:k]) for k in range(len(cuts))]
    parts = [mixture.list_slots(at, count) for at, count in zip(firsts, cuts, strict=True)]
    assert (
        whole.epochs[whole.ids < sizes[0]] == whole.turns[whole.ids < sizes[0]] // sizes[0]
    ).all()
    for column, pieces in zip(whole, zip(*parts, strict=True), strict=False):
        assert column.tolist() == [x for piece in pieces for x in piece.tolist()]
    # From the start of a block on, counts are never off by more than one.
    block = start // 1000
    owners = np.searchsorted(np.cumsum(sizes), mixture.list_slots(block * 1000, 1000).ids, "right")
    counts = np.bincount(owners, minlength=len(sizes))
    assert np.abs(counts - 1000 * np.array(weights) / sum(weights)).max() < 2


def test_sets_that_do_not_fit_each_other_are_refused(tiny_data, raw_data, image_folder, tmp_path):
    with pytest.raises(UsageError, match="encoding jpeg and raw cannot be mixed"):
        Stream({tiny_data: 1, raw_data: 1}, **SMALL)
    few = tmp_path / "few"
    for name in sorted(path.name for path in (image_folder / "train").iterdir())[:3]:
        (few / name).parent.mkdir(exist_ok=True)
        (few / name).symlink_to(image_folder / "train" / name)
    packed(tmp_path / "three", train=few, holdout=0.2, samples_per_shard=10)
    with pytest.raises(UsageError, match=r"of 4 and 3 classes cannot be mixed: '.*' is a class of"):
        Stream({tiny_data: 1, tmp_path / "three": 1}, **SMALL)
    for shares in ({}, {tiny_data: 0}, {tiny_data: "much"}):
        with pytest.raises(ValueError, match="a mixture takes datasets with shares above 0"):
            Stream(shares, **SMALL)
    with pytest.raises(ValueError, match=r"a share of 0\.0001 is too small"):
        Stream({tiny_data: 1, str(tiny_data): 0.0001}, **SMALL)
