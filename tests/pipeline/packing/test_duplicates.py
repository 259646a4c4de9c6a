"""Duplicates: the search finds what comparing all pairs finds, in little time whatever the set."""

import io
import json
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.packing import hamming
from pipeline.packing.duplicates import (
    LISTED,
    NEAR,
    DuplicateGroup,
    DuplicateMember,
    find_duplicates,
    write_duplicates,
)
from pipeline.packing.hamming import BitBlock, NearPairSearch, UnionFind, choose_cut, find_clusters


def brute_force(hashes: np.ndarray, threshold: int) -> list[list[int]]:
    """Connected components by comparing all pairs, bit by bit."""
    bits = np.unpackbits(hashes, axis=1).astype(np.int32)
    near = (bits[:, None] != bits[None]).sum(2) <= threshold
    open_, found = set(range(len(hashes))), []
    while open_:
        reached, ends = set(), [min(open_)]
        while ends:
            row = ends.pop()
            if row not in reached:
                reached.add(row)
                ends.extend(np.flatnonzero(near[row]).tolist())
        open_ -= reached
        if len(reached) > 1:
            found.append(sorted(reached))
    return found


def flipped(hashes: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each hash with so many of its bits turned over."""
    bits = np.unpackbits(hashes, axis=1)
    for row, count in zip(bits, counts, strict=True):
        row[rng.choice(256, count, replace=False)] ^= 1
    return np.packbits(bits, axis=1)


def family(seed: int, rows: int, parents: int, most: int, shared: int = 0) -> np.ndarray:
    """Hashes scattered around a few, the first `shared` bytes of all of them the same."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 256, (parents, 32), np.uint8)
    hashes = flipped(first[rng.integers(0, parents, rows)], rng.integers(0, most + 1, rows), rng)
    hashes[:, :shared] = 7
    return hashes


families = st.builds(
    family,
    st.integers(0, 2**32),
    st.integers(2, 90),
    st.integers(1, 30),
    st.integers(0, 40),
    st.integers(0, 24),
)


@settings(max_examples=60, deadline=None)
@given(families, st.integers(0, 40))
def test_finds_what_comparing_all_pairs_finds(hashes: np.ndarray, threshold: int) -> None:
    found = [rows.tolist() for rows in find_clusters(hashes, threshold, workers=1)]
    assert found == brute_force(hashes, threshold)


@settings(max_examples=40, deadline=None)
@given(families, st.integers(1, 40), st.sampled_from([1, 2, 5]))
def test_so_does_the_way_for_crowded_keys(hashes: np.ndarray, threshold: int, long: int) -> None:
    """Runs count as long at once, and any gain is worth sifting bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hamming, "LONG_RUN", long)
        patch.setattr(hamming, "LEAST_SELECTED", 30)
        patch.setattr(hamming, "COMPARE", 1e4)
        found = [rows.tolist() for rows in find_clusters(hashes, threshold, workers=1)]
    assert found == brute_force(hashes, threshold)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 40), st.integers(2, 2**32), st.integers(130, 256), st.data())
def test_enough_blocks_of_a_group_are_equal(
    threshold: int, rows: int, bits: int, data: st.DataObject
) -> None:
    """Any `threshold` bits may differ; an enemy spends them best on one block each."""
    equal, groups, tables, width = choose_cut(threshold, rows, bits)
    places = [
        set(range(block.start, block.start + block.width)) for group in groups for block in group
    ]
    assert sum(map(len, places)) == len(set().union(*places)), "blocks overlap"
    assert set().union(*places) <= set(range(bits))
    assert all(1 <= len(place) <= min(16, 32 // equal) for place in places)
    assert tables == sum(len(list(combinations(group, equal))) for group in groups)
    assert width == equal * min(map(len, places))
    assert (
        sum(len(group) - equal + 1 for group in groups) == threshold + 1
    )  # what the enemy would need
    spoiled = data.draw(
        st.sets(st.integers(0, len(places) - 1), max_size=min(threshold, len(places)))
    )
    whole = iter([number not in spoiled for number in range(len(places))])
    assert any(sum(next(whole) for _ in group) >= equal for group in groups)


@settings(max_examples=100, deadline=None)
@given(families, st.integers(1, 40))
def test_leaders_join_what_comparing_all_pairs_joins(hashes: np.ndarray, threshold: int) -> None:
    """One run alone: in a whole search another table makes up for what this one would miss."""
    joined = UnionFind(len(hashes))
    rows = np.arange(len(hashes))
    NearPairSearch(hashes.view("<u8"), rows, threshold, joined)._around_leaders(rows)
    assert [some.tolist() for some in joined.find_groups()] == brute_force(hashes, threshold)


def test_blocks_are_cut_where_they_say() -> None:
    hashes = np.random.default_rng(5).integers(0, 256, (6, 32), np.uint8)
    bits = np.unpackbits(hashes, axis=1, bitorder="little")
    rows = np.array([1, 4, 5])
    search = NearPairSearch(hashes.view("<u8"), rows, 16, UnionFind(6))
    for start, width in [(0, 16), (55, 9), (60, 13), (127, 2), (191, 16), (243, 13)]:
        expected = bits[rows, start : start + width] @ (1 << np.arange(width))
        np.testing.assert_array_equal(search.column(BitBlock(start, width)).values, expected)


def test_threads_and_memory_maps_change_nothing(tmp_path: Path) -> None:
    hashes = family(3, 4000, 900, 12)
    hashes.tofile(tmp_path / "hashes")
    mapped = np.memmap(tmp_path / "hashes", np.uint8, "r", shape=hashes.shape)
    expected = [rows.tolist() for rows in find_clusters(hashes, 16, workers=1)]
    assert len(expected) > 500
    assert [rows.tolist() for rows in find_clusters(mapped, 16, workers=4)] == expected


@pytest.mark.parametrize(("around", "shared"), [(0, 0), (2, 0), (10, 0), (None, 8), (None, 4)])
def test_a_crowd_is_not_compared_pair_by_pair(around: int | None, shared: int) -> None:
    """20,000 rows: all the same, a bit apart, far apart with much in common. Pairs are 200 million,
    and a sort brings all of them together: one by one they would take minutes."""
    rng = np.random.default_rng(0)
    count = 20_000
    hashes = rng.integers(0, 256, (count, 32), np.uint8)
    if around is not None:
        hashes = flipped(np.repeat(hashes[:1], count, 0), np.full(count, around), rng)
    hashes[:, :shared] = 0
    start = time.process_time()
    found = find_clusters(hashes, 16, workers=1)
    assert time.process_time() - start < 5
    assert [len(rows) for rows in found] == ([count] if around is not None else [])


def test_planted_copies_are_found_among_many() -> None:
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 256, (100_000, 32), np.uint8)
    rows = rng.permutation(100_000)[:1700].reshape(2, 850)
    hashes[rows[1]] = flipped(hashes[rows[0]], np.arange(850) % 17, rng)
    found = {tuple(some.tolist()) for some in find_clusters(hashes, 16)}
    assert found == {tuple(sorted(pair)) for pair in rows.T.tolist()}


def test_distances_of_one_bit_more_stay_apart() -> None:
    hashes = np.zeros((2, 32), np.uint8)
    hashes[1, :2] = 255
    assert len(find_clusters(hashes, 16)) == 1
    hashes[1, 31] = 1
    assert find_clusters(hashes, 16) == []
    assert find_clusters(hashes[:1], 16) == find_clusters(hashes[:0], 16) == []


def telling(seed: int, rows: int) -> np.ndarray:
    """Random hashes with as many ones as zeros."""
    rng = np.random.default_rng(seed)
    bits = np.repeat(np.arange(256) < 128, rows).reshape(256, rows).T
    return np.packbits(rng.permuted(bits, axis=1), axis=1)


def test_same_bytes_are_exact_others_near() -> None:
    rng = np.random.default_rng(2)
    hashes = telling(0, 10)
    hashes[3], hashes[7] = hashes[0], hashes[1]
    hashes[8] = flipped(hashes[2:3], np.array([9]), rng)[0]
    hashes[9] = flipped(hashes[2:3], np.array([NEAR + 1]), rng)[0]
    sizes = np.arange(10, dtype=np.uint32)
    crcs = np.full(10, 5, np.uint32)
    sizes[3] = sizes[0]
    groups = [
        (one.kind, one.distance, one.rows.tolist()) for one in find_duplicates(hashes, sizes, crcs)
    ]
    assert groups == [("exact", 0, [0, 3]), ("near", 0, [1, 7]), ("near", 9, [2, 8])]
    crcs[3] = 6
    assert find_duplicates(hashes, sizes, crcs)[0].kind == "near"
    sizes[8] = sizes[2]  # to the same size and CRC-32 by chance: the hashes tell
    assert find_duplicates(hashes, sizes, crcs)[2].kind == "near"


def test_flat_images_are_duplicates_only_to_the_byte() -> None:
    """Rows 0, 2, 4 have (nearly) no ones and 1, 3 no zeros; of 0, 2, 4 the first two are equal."""
    hashes = np.zeros((6, 32), np.uint8)
    hashes[[1, 3]] = 255
    hashes[5] = telling(0, 1)
    sizes = np.array([9, 8, 9, 8, 9, 9], np.uint32)
    crcs = np.array([1, 2, 1, 2, 7, 1], np.uint32)
    groups = [(one.kind, one.rows.tolist()) for one in find_duplicates(hashes, sizes, crcs)]
    assert groups == [("exact", [0, 2]), ("exact", [1, 3])]
    hashes[2, 0], crcs[3] = 1, 3
    assert find_duplicates(hashes, sizes, crcs) == []


def written(
    groups: list[DuplicateGroup], splits: list[int], labels: list[int]
) -> tuple[list[dict], tuple]:
    def member(row: int) -> DuplicateMember:
        return DuplicateMember(
            "train" if splits[row] == 0 else "val", 100 + row, labels[row], f"é{row}.jpg"
        )

    file = io.BytesIO()
    counts = write_duplicates(file, groups, np.array(splits, np.uint8), np.array(labels), member)
    return [json.loads(line) for line in file.getvalue().splitlines()], counts


def test_rows_of_the_file() -> None:
    groups = [
        DuplicateGroup("exact", 0, np.array([0, 2])),
        DuplicateGroup("near", 5, np.array([1, 3, 4])),
    ]
    rows, counts = written(groups, [0, 0, 0, 1, 0], [7, 8, 7, 8, 9])
    assert rows[0] == {
        "kind": "exact",
        "distance": 0,
        "count": 2,
        "leak": False,
        "labels_differ": False,
        "members": [
            {"split": "train", "sample": 100, "label": 7, "name": "é0.jpg"},
            {"split": "train", "sample": 102, "label": 7, "name": "é2.jpg"},
        ],
    }
    assert (rows[1]["leak"], rows[1]["labels_differ"], rows[1]["distance"]) == (True, True, 5)
    assert counts == (2, 5, 1, 1)


def test_a_huge_group_lists_some_of_each_split() -> None:
    size = 5 * LISTED
    rows, counts = written(
        [DuplicateGroup("exact", 0, np.arange(size))], [0] * (size - 3) + [1] * 3, [1] * size
    )
    members = rows[0]["members"]
    assert (rows[0]["count"], len(members), counts.images) == (size, LISTED, size)
    assert [one["split"] for one in members[-3:]] == ["val"] * 3
    assert all(a["sample"] < b["sample"] for a, b in combinations(members, 2))
