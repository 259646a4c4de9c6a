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
from pipeline.dataset.index import sample_key
from pipeline.dataset.manifest import Manifest
from pipeline.stream.config import StreamConfig
from pipeline.stream.ledger.format import FRAME, scan_ledger
from pipeline.stream.ledger.proof import prove
from pipeline.stream.selection.filters import match_keys
from pipeline.stream.selection.record import Selection, make_order
from pipeline.tools.errors import DuetError, UsageError
from pipeline.tools.tables import read_table
from tests.helpers.images import CLASSES, packed
from tests.helpers.streams import SMALL, labels_of, read_ids


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


@pytest.mark.parametrize("name", ["label", "class", "height", "width"])
def test_a_column_named_as_what_is_known_is_refused(tiny_data, tmp_path, name):
    path = tmp_path / "table.csv"
    path.write_text(f"id,{name}\n" + "".join(f"{i},1\n" for i in range(48)))
    with pytest.raises(UsageError, match=rf"where\['{name}'\] may mean .* rename the column"):
        Stream(tiny_data, where={name: 1}, table=path, **SMALL)


def test_masked_values_are_refused(tiny_data):
    flags = np.ma.array(np.ones(48, bool), mask=np.arange(48) == 3)
    for settings in ({"where": flags}, {"weights": flags.astype(float)}):
        with pytest.raises(UsageError, match=r"has masked values; say what they stand for"):
            Stream(tiny_data, **settings, **SMALL)
    plain = np.ma.array(np.arange(48) < 5)  # nothing is masked
    assert len(read_ids(tiny_data, 5, where=plain, once=True, crop="center")) == 5


def test_images_that_are_too_small_may_be_left_out(image_folder, tmp_path):
    train = image_folder / "train"
    packed(tmp_path / "data", train=train, holdout=0.1, size=64, fit="shorter", min_side=40)
    with pytest.raises(UsageError, match=r"does not fit into the train sample .*where={'height'"):
        Stream(tmp_path / "data", **SMALL | {"size": (80, 64)})
    where = {"height": lambda height: height >= 80}
    with Stream(tmp_path / "data", where=where, **SMALL | {"size": (80, 64)}) as stream:
        assert 0 < stream.samples < 40
        assert next(stream).images.shape == (12, 3, 80, 64)


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
