"""Selections of samples: filters, drawn parts, weights, mixtures, and their proof."""

from __future__ import annotations

import itertools
import json
import zlib
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches import Stream
from pipeline.dataset.index import load_index, sample_key
from pipeline.dataset.manifest import Manifest
from pipeline.stream.config import StreamConfig
from pipeline.stream.ledger.format import FRAME, scan_ledger
from pipeline.stream.ledger.proof import prove
from pipeline.stream.order import BlockShuffle, FullShuffle, Mixture, StoredOrder, WeightedOrder
from pipeline.stream.selection.filters import match_keys
from pipeline.stream.selection.record import Selection, make_order
from pipeline.tools.errors import DuetError, UsageError
from pipeline.tools.tables import read_table
from tests.helpers.images import CLASSES, packed

SMALL = {"batch_size": 12, "seed": 3, "threads": 1, "size": 32}


@pytest.fixture(scope="module")
def second_data(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of other images of the same classes: the validation images of `tiny_data`."""
    out = tmp_path_factory.mktemp("second") / "data"
    packed(out, train=image_folder / "val", holdout=0.2, seed=5, samples_per_shard=4)
    return out


def labels_of(data: Path, split: str = "train") -> np.ndarray:
    return load_index(data, split, Manifest.load(data))["label"].astype(np.int64)


def read_ids(data, count: int, **settings) -> list[int]:
    """Ids of the first `count` samples."""
    with Stream(data, **SMALL | settings) as stream:
        batches = itertools.islice(stream, -(-count // SMALL["batch_size"]))
        return [i for batch in batches for i in batch.ids.tolist()][:count]


def expected_kept(data: Path) -> list[tuple[dict, np.ndarray]]:
    labels, classes = labels_of(data), Manifest.load(data).classes
    keys = [sample_key(i // 10, i % 10) for i in range(len(labels))]
    mask = np.arange(len(labels)) % 3 == 1
    return [
        ({"class": classes[2]}, labels == 2),
        ({"class": [classes[0], classes[3]]}, (labels == 0) | (labels == 3)),
        ({"label": 1}, labels == 1),
        ({"label": lambda column: column > 1}, labels > 1),
        ({"key": "000002*"}, np.array([key.startswith("000002") for key in keys])),
        ({"key": ["*_00003", keys[7]], "label": range(3)},
         np.array([k.endswith("_00003") or k == keys[7] for k in keys]) & (labels < 3)),
        (mask, mask),
    ]  # fmt: skip


def test_a_filter_keeps_what_it_names_and_each_once_an_epoch(tiny_data):
    for where, kept in expected_kept(tiny_data):
        ids = np.flatnonzero(kept).tolist()
        n = len(ids)
        for shuffle in ({}, {"shuffle": "block", "window": 2}):
            found = read_ids(tiny_data, 3 * n, where=where, **shuffle)
            epochs = [found[k : k + n] for k in range(0, 3 * n, n)]
            assert [sorted(epoch) for epoch in epochs] == [ids] * 3, where
            assert epochs[0] != epochs[1]
        assert read_ids(tiny_data, n, where=where, once=True, crop="center") == ids


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet", "tsv"])
def test_a_filter_reads_columns_of_a_table_by_key(tiny_data, tmp_path, ending):
    count = len(labels_of(tiny_data))
    rows = [
        {"key": sample_key(i // 10, i % 10), "year": 2000 + i % 7, "place": "ab"[i % 2]}
        for i in np.random.default_rng(1).permutation(count).tolist()
    ]
    path = tmp_path / f"table.{ending}"
    if ending == "parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path)
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        between = "," if ending == "csv" else "\t"
        lines = [rows[0].keys(), *(map(str, row.values()) for row in rows)]
        path.write_text("".join(between.join(line) + "\n" for line in lines))
    assert read_table(path)["year"].dtype == np.int64
    where = {"year": lambda year: year > 2004, "place": "a"}
    ids = [i for i in range(count) if i % 7 > 4 and i % 2 == 0]
    assert read_ids(tiny_data, len(ids), where=where, table=path, once=True) == ids
    # The value in a column decides the part: all samples of a year stay together.
    parts = {
        name: set(read_ids(tiny_data, count, split=name, split_by={"train": 1, "val": 1},
                           table=path, group="year", split_seed=1))
        for name in ("train", "val")
    }  # fmt: skip
    assert not parts["train"] & parts["val"]
    years = [{i % 7 for i in part} for part in parts.values()]
    assert not years[0] & years[1]
    assert all(years)
    assert years[0] | years[1] == set(range(7))


def test_samples_are_found_by_the_names_of_their_files(tiny_data, tmp_path):
    with Stream(tiny_data, once=True, **SMALL) as stream:
        names = [name for batch in stream for name in batch.names][:48]
    assert len(set(names)) == 48
    wanted = [place for place, name in enumerate(names) if name.endswith("3.jpg")]
    assert read_ids(tiny_data, len(wanted), where={"name": "*3.jpg"}, once=True) == wanted
    path = tmp_path / "table.csv"
    path.write_text("name,good\n" + "".join(f"{name},{name[-5]}\n" for name in sorted(names)))
    where = {"good": 3}
    assert read_ids(tiny_data, len(wanted), where=where, table=path, once=True) == wanted


def test_parts_are_disjoint_cover_the_split_and_keep_when_the_seed_changes(tiny_data):
    shares = {"train": 0.7, "val": 0.2, "test": 0.1}
    settings = {"split_by": shares, "split_seed": 2, "once": True}
    parts = {}
    for name in shares:
        with Stream(tiny_data, split=name, **SMALL | settings) as stream:
            parts[name] = [i for batch in stream for i in batch.ids[batch.weights > 0].tolist()]
            assert len(parts[name]) == stream.samples
    assert sorted(itertools.chain(*parts.values())) == list(range(48))
    assert len(parts["train"]) > len(parts["val"]) > 0
    other = settings | {"seed": 99, "once": False}
    assert set(read_ids(tiny_data, 200, split="val", **other)) == set(parts["val"])
    moved = settings | {"split_seed": 3}
    assert set(read_ids(tiny_data, 20, split="val", **moved)) != set(parts["val"])


SELECTIONS = [
    {"where": {"label": [0, 2, 3]}},
    {"weights": "balanced", "where": {"key": "00000[0-2]*"}},
    {"split_by": {"train": 0.6, "val": 0.4}, "shuffle": "block", "window": 2},
]


@pytest.mark.parametrize("settings", [*SELECTIONS, {"mixed": True}], ids=repr)
def test_worlds_restarts_and_threads_give_the_same_bits(tiny_data, second_data, settings):
    settings = dict(settings)
    mixed = settings.pop("mixed", False)
    data = {tiny_data: 0.7, second_data: 0.3} if mixed else tiny_data

    def read(steps: int, **changes) -> list[tuple[list[int], int]]:
        with Stream(data, **SMALL | settings | changes) as stream:
            batches = list(itertools.islice(stream, steps))
        return [(b.ids.tolist(), zlib.crc32(b.images.numpy().tobytes())) for b in batches]

    whole = read(8)
    for world in (2, 3):
        ranks = [read(8, rank=rank, world_size=world, threads=2) for rank in range(world)]
        for step in range(8):
            assert [i for rank in ranks for i in rank[step][0]] == whole[step][0]
    assert read(3, position=5 * 12) == whole[5:]
    with Stream(data, **SMALL | settings) as stream:
        next(stream), next(stream)
        state = stream.state_dict()
    with Stream(data, **SMALL | settings) as stream:
        stream.load_state_dict(json.loads(json.dumps(state)))
        assert next(stream).ids.tolist() == whole[2][0]
    other = SMALL | {"shuffle": settings.get("shuffle", "full")}
    wrong = pytest.raises(ValueError, match="a state of another stream: ")
    with Stream(tiny_data, **other) as stream, wrong:
        stream.load_state_dict(state)


def test_weights_draw_as_often_as_they_say_and_pixels_anew(tiny_data):
    weights = np.zeros(48)
    weights[[4, 9, 30]] = 1, 2, 5
    ids = read_ids(tiny_data, 48 * 40, weights=weights)
    counts = np.bincount(ids, minlength=48)
    assert set(np.flatnonzero(counts)) == {4, 9, 30}
    expected = weights[[4, 9, 30]] / 8 * len(ids)
    # chi-square of 2 degrees of freedom: above 18.4 once in 10,000
    assert (((counts[[4, 9, 30]] - expected) ** 2) / expected).sum() < 18.4
    with Stream(tiny_data, weights=weights, colour=0, **SMALL) as stream:
        batch = next(stream)
    same = (batch.ids == 30).nonzero().flatten().tolist()
    assert len(same) > 2
    crops = {batch.images[place].numpy().tobytes() for place in same}
    assert len(crops) == len(same)


def test_balanced_weights_make_classes_equally_likely(tiny_data):
    labels = labels_of(tiny_data)
    where = (labels != 0) | (np.cumsum(labels == 0) == 1)  # one image of class 0 is left
    ids = read_ids(tiny_data, 2400, where=where, weights="balanced", size=8)
    counts = np.bincount(labels[ids], minlength=4)
    assert abs(counts - 600).max() < 4 * np.sqrt(2400 * 3 / 16)


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


patterns = st.text("01_*?[]!", max_size=6)


@given(st.lists(patterns, max_size=3), st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_patterns_match_keys_as_fnmatch_does(patterns, sizes):
    shards = [SimpleNamespace(samples=size) for size in sizes]
    reader = SimpleNamespace(shards=shards, manifest=SimpleNamespace(foreign=False))
    patterns = [*patterns, "*" + "".join(patterns)]
    keys = [sample_key(number, place) for number, size in enumerate(sizes) for place in range(size)]
    expected = [any(fnmatchcase(key, one) for one in patterns) for key in keys]
    found, matched = match_keys(reader, patterns)
    assert found.tolist() == expected
    assert matched == {one for one in patterns if any(fnmatchcase(key, one) for key in keys)}


@pytest.mark.parametrize("settings", [*SELECTIONS, {"mixed": True}], ids=repr)
def test_the_ledger_proves_that_each_delivery_was_the_one_due(
    tiny_data, second_data, tmp_path, settings
):
    settings = dict(settings)
    mixed = settings.pop("mixed", False)
    data = {tiny_data: 0.7, second_data: 0.3} if mixed else tiny_data
    ledger = tmp_path / "ledger"
    with Stream(data, ledger=ledger, **SMALL | settings) as stream:
        samples, steps = stream.samples, 2 * stream.steps_per_epoch
        position = [next(stream).position for _ in range(steps)][-3]
    for rank in range(2):  # again from there, in another world
        where = {"position": position, "rank": rank, "world_size": 2}
        with Stream(data, ledger=ledger, **SMALL | settings | where) as stream:
            for _ in range(4):
                next(stream)
    proof = prove(tiny_data, [ledger])
    assert not proof.findings
    assert (proof.samples, proof.again) == (samples, 24)
    assert len(proof.epochs) >= 2
    drawn = mixed or "weights" in settings
    assert ("as drawn" if drawn else "exactly once") in proof.summary()

    # A ledger that tells of another sample, with sums that are right.
    path = min(ledger.glob("*of0001-*.ledger"))
    file = scan_ledger(path)
    content = bytearray(path.read_bytes())
    at = int(file.frames[2, 0])
    width = file.header.id_type.itemsize
    old = int.from_bytes(content[at + FRAME.size :][:width], "little")
    new = next(i for i in range(48) if i != old)
    content[at + FRAME.size : at + FRAME.size + width] = new.to_bytes(width, "little")
    length = FRAME.unpack_from(content, at)[1]
    content[at : at + 4] = zlib.crc32(content[at + 4 : at + length]).to_bytes(4, "little")
    path.write_bytes(content)
    (finding,) = prove(tiny_data, [ledger]).findings
    assert (finding.kind, finding.position, finding.ids) == ("not due", 24, (new,))
    assert f"sample {old}" in finding.reason

    (saved,) = ledger.glob("selection-*.npz")
    saved.write_bytes(saved.read_bytes()[:-40])
    with pytest.raises(DuetError, match=r"selection-.*\.npz"):
        prove(tiny_data, [ledger])


def test_a_saved_selection_is_the_same_again(tmp_path):
    rng = np.random.default_rng(0)
    selection = Selection(
        identities=("a", "b"), shards=((5, 7), (9,)), shares=(0.25, 0.75),
        kept=rng.random(21) < 0.6, weights=rng.random(21),
    )  # fmt: skip
    selection.save(tmp_path)
    again = Selection.load(tmp_path, selection.digest)
    assert again.digest == selection.digest
    one, two = (make_order(s, 5, "full").list_slots(0, 3000) for s in (selection, again))
    assert (one.ids == two.ids).all()
    other = Selection(identities=("a", "b"), shards=((5, 7), (9,)), shares=(0.5, 0.5))
    assert other.digest != selection.digest


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"where": {"class": CLASSES[0] + "x"}},
            r"class .* is none of the 4 of this set; did you mean",
        ),
        ({"where": {"class": "zzz"}}, r"class 'zzz' is none .*; describe lists them"),
        ({"where": {"label": 9}}, r"where\['label'\] has 9, and no sample of split 'train' has it"),
        ({"where": {"height": [256, 0]}}, r"where\['height'\] has 0, and no sample of split"),
        ({"where": {"label": [0, 9]}}, r"where\['label'\] has 9, and no sample of split 'train'"),
        ({"where": {"key": ["000000_00000", "000009*"]}}, r"where\['key'\] has '000009\*', and no"),
        (
            {"where": {"label": 1, "key": "*_00000"}, "split_by": {"train": 1e-9, "val": 1}},
            "leaves",
        ),
        ({"where": np.zeros(48, bool)}, r"where=the mask leaves none of the 48 samples"),
        ({"where": np.arange(48)}, r"where is an array of int64; a mask is of true and false"),
        ({"where": np.ones(47, bool)}, r"where has 47 values, and split 'train' 48 samples"),
        (
            {"where": {"year": 3}},
            r"'year' is no id, label, class, key, name or size: name the table",
        ),
        ({"where": {"label": lambda column: 3}}, r"the function of where\['label'\] returns int"),
        ({"weights": np.zeros(48)}, r"weights sum to 0: no sample could be drawn"),
        ({"weights": [1.0] * 3}, r"weights has 3 values, and split 'train' 48 samples"),
        ({"weights": [1.0] * 47 + [-1]}, r"weights has -1.0 for sample 47; it takes finite"),
        ({"split_by": {"train": 1, "val": 1e-9}, "split": "val"}, r"split_by=.* leaves no sample"),
    ],
)
def test_what_selects_nothing_or_is_no_selection_is_refused(tiny_data, settings, line):
    with pytest.raises(UsageError, match=line) as caught:
        Stream(tiny_data, **SMALL | settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"weights": "even"}, "weights is 'even'; it takes 'balanced', or an array"),
        ({"weights": "balanced", "once": True}, "does not go with once=True"),
        ({"weights": "balanced", "shuffle": "block"}, "does not go with shuffle='block'"),
        ({"split_by": {"train": 1.0, "val": 0}}, "it takes names with shares above 0"),
        ({"split_by": {"a": 1.0, "b": 1.0}}, "split is 'train', and split_by names 'a', 'b'"),
        ({"group": "year"}, "group is 'year', and split_by is not set"),
    ],
    ids=repr,
)
def test_settings_that_do_not_go_together_are_refused(settings, line):
    with pytest.raises(ValueError, match=line):
        StreamConfig(**settings)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("key,year\n000000_00000,3\n", r"no row for 47 of the 48 samples, the first with key"),
        ("year\n3\n", r"has no column 'id', 'key' or 'name' to find a sample by; it has 'year'"),
        ("key,year\n1,2,3\n", r"line 2 has 3 values, the first 2"),
        ("key,yeer\n1,2\n", r"has no column 'year'; it has 'yeer'"),
        ("", r"has no row"),
        ("id,year\n0,1\n0,2\n", r"has id 0 more than once, so that a row is not that of one"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_table_that_does_not_fit_is_refused(tiny_data, tmp_path, text, line):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=line):
        Stream(tiny_data, where={"year": 3}, table=path, **SMALL)
    with pytest.raises(UsageError, match=r"table .*none.csv cannot be read"):
        Stream(tiny_data, where={"year": 3}, table=tmp_path / "none.csv", **SMALL)


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


def test_images_that_are_too_small_may_be_left_out(image_folder, tmp_path):
    train = image_folder / "train"
    packed(tmp_path / "data", train=train, holdout=0.1, size=64, fit="shorter", min_side=40)
    with pytest.raises(UsageError, match=r"does not fit into the train sample .*where={'height'"):
        Stream(tmp_path / "data", **SMALL | {"size": (80, 64)})
    where = {"height": lambda height: height >= 80}
    with Stream(tmp_path / "data", where=where, **SMALL | {"size": (80, 64)}) as stream:
        assert 0 < stream.samples < 40
        assert next(stream).images.shape == (12, 3, 80, 64)


def test_columns_of_numbers_are_numbers_and_others_stay_text_as_written(tmp_path):
    path = tmp_path / "table.csv"
    rows = [
        "key,name,count,share,code,site,patient,year,uid",
        "000000_00001,7,3,0.5,1_0,1.1,007,2001,10000000000000000000000",
        "000000_00002,8,-4,1e3,2_0,1.10,008,,10000000000000000000001",
    ]
    path.write_text("\n".join(rows) + "\n")
    table = read_table(path, texts=("share",))
    year = table.pop("year")
    assert year[0] == 2001
    assert np.isnan(year[1])
    assert {name: column.tolist() for name, column in table.items()} == {
        "key": ["000000_00001", "000000_00002"],
        "name": ["7", "8"],
        "count": [3, -4],
        "share": ["0.5", "1e3"],
        "code": ["1_0", "2_0"],
        "site": ["1.1", "1.10"],
        "patient": ["007", "008"],
        "uid": ["10000000000000000000000", "10000000000000000000001"],
    }
    assert read_table(path)["share"].tolist() == [0.5, 1000.0]
    lines = tmp_path / "table.jsonl"
    lines.write_text('{"year": 2001, "boxes": [1]}\n{"year": null, "boxes": [1, 2]}\n')
    with pytest.raises(UsageError, match=r"table.jsonl cannot be read"):
        read_table(lines)
    lines.write_text('{"year": 2001, "ok": true}\n{"year": null, "ok": false}\n')
    table = read_table(lines)
    assert np.isnan(table["year"][1])
    assert table["ok"].tolist() == [1, 0]


def test_rows_of_other_samples_move_nobody_to_another_part(tiny_data, tmp_path):
    settings = {"split_by": {"train": 0.5, "val": 0.5}, "group": "patient", "once": True}
    parts = []
    for more in ("", "999999_00000,A12\n"):
        path = tmp_path / f"table{len(more)}.csv"
        rows = [f"{sample_key(i // 10, i % 10)},{i // 4:03d}\n" for i in range(48)]
        path.write_text("key,patient\n" + "".join(rows) + more)
        with Stream(tiny_data, split="val", table=path, **settings, **SMALL) as stream:
            parts.append([i for batch in stream for i in batch.ids[batch.weights > 0].tolist()])
    assert parts[0] == parts[1]


def test_numbers_of_other_libraries_are_numbers(tiny_data):
    mask = np.ones(48, bool)
    settings = {"batch_size": np.int64(12), "seed": np.int64(3), "position": torch.tensor(12)}
    label = torch.tensor(1)
    where = {"label": label, "class": lambda names: names == CLASSES[1], "id": lambda ids: ids >= 0}
    with Stream(tiny_data, size=np.int64(32), threads=1, where=where, **settings) as stream:
        assert set(next(stream).labels.tolist()) == {1}
        assert json.loads(json.dumps(stream.state_dict()))["position"] == 24
        for position in ("8", 8.0, None):
            with pytest.raises(ValueError, match=r"position is .*; it is a whole number"):
                stream.load_state_dict(stream.state_dict() | {"position": position})
    weights = torch.ones(48, requires_grad=True)
    with Stream(tiny_data, where=mask, weights=weights, **SMALL) as stream:
        state = stream.state_dict()
        mask[:] = False  # it was copied
        assert stream.state_dict() == state
        next(stream)
