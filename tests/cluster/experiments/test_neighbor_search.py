"""Exact neighbours: against brute force in float64, ties and adverse numbers included."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.experiments.neighbors.search import LEAST_MEMORY, SearchBase, find_nearest
from pipeline.tools.errors import UsageError


def brute_force(queries, base, k, own=None, sound=None):
    """float64 loop over queries; ties go to the earlier row."""
    ids, far = [], []
    for number, query in enumerate(queries.astype(np.float64)):
        distances = ((base.astype(np.float64) - query) ** 2).sum(1)
        if sound is not None:
            distances[~sound] = np.inf
        if own is not None:
            distances[own[number]] = np.inf
        order = sorted(range(len(base)), key=lambda row: (distances[row], row))[:k]
        ids.append(order)
        far.append(distances[order])
    return np.array(ids), np.array(far)


def all_of(rows):
    return SearchBase(rows, np.ones(len(rows), bool))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("k", [1, 6, 40])
def test_neighbours_are_those_of_brute_force(dtype, k):
    rng = np.random.default_rng(k)
    base = rng.gamma(0.3, 2.0, (500, 96)).astype(dtype)
    queries = rng.gamma(0.3, 2.0, (37, 96)).astype(dtype)
    found = find_nearest(queries, all_of(base), k)
    ids, far = brute_force(queries, base, k)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.distances, far, rtol=1e-12)


def test_small_memory_gives_the_same_neighbours():
    rng = np.random.default_rng(3)
    base = rng.normal(size=(3000, 4096)).astype(np.float32)
    queries = rng.normal(size=(700, 4096)).astype(np.float32)
    one = find_nearest(queries, all_of(base), 5)
    told = []
    other = find_nearest(queries, all_of(base), 5, memory=LEAST_MEMORY, advance=told.append)
    np.testing.assert_array_equal(one.ids, other.ids)
    assert len(told) > 1
    assert sum(told) == 700


def test_distances_below_the_rounding_of_float32_are_told_apart():
    # Far from the origin: in float32 |x|^2 - 2 x y + |y|^2 has no correct digit left.
    rng = np.random.default_rng(5)
    base = (1000 + rng.normal(size=(400, 64)) * 1e-2).astype(np.float32)
    queries = (1000 + rng.normal(size=(9, 64)) * 1e-2).astype(np.float32)
    found = find_nearest(queries, all_of(base), 6)
    np.testing.assert_array_equal(found.ids, brute_force(queries, base, 6)[0])
    assert found.again == 9


def test_ties_go_to_the_earlier_image_however_many_there_are():
    base = np.zeros((2000, 8), np.float16)
    base[5] = 1
    queries = np.zeros((3, 8), np.float16)
    found = find_nearest(queries, all_of(base), 7)
    assert found.ids.tolist() == [[0, 1, 2, 3, 4, 6, 7]] * 3
    assert not found.distances.any()


def test_an_image_is_not_its_own_neighbour_and_damaged_ones_are_none():
    rng = np.random.default_rng(7)
    rows = rng.integers(0, 3, (300, 5)).astype(np.float16)  # many equal ones
    sound = rng.random(300) > 0.2
    own = np.flatnonzero(sound)
    found = find_nearest(
        rows, SearchBase(rows, sound), 4, picked=own, itself=True, memory=LEAST_MEMORY
    )
    ids, _ = brute_force(rows[own], rows, 4, own, sound)
    np.testing.assert_array_equal(found.ids, ids)
    assert not (found.ids == own[:, None]).any()
    assert sound[found.ids].all()


def test_every_image_can_be_asked_for_but_not_one_more():
    rows = np.eye(5, dtype=np.float32)
    assert find_nearest(rows[:1], all_of(rows), 5).ids.tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(UsageError, match="6 neighbours asked for, and there are 5"):
        find_nearest(rows[:1], all_of(rows), 6)
    with pytest.raises(UsageError, match="5 neighbours asked for, and there are 4"):
        find_nearest(rows, all_of(rows), 5, itself=True)
