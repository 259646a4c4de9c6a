"""WebDataset shards as a source: labels, classes, splits, ranges, stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset as wds

from pipeline.remote.filesystem import is_remote
from pipeline.sources import webdataset
from pipeline.sources.listing import ListingWriter
from pipeline.sources.webdataset import is_webdataset, scan_webdataset
from pipeline.tools.errors import UsageError
from tests.helpers.images import CLASSES
from tests.helpers.range_servers import RangeServer
from tests.helpers.sources import publish_folder, read_contents
from tests.helpers.webdatasets import IMAGES, scan, write_shards

NUMBERED = [(str(place % 4), data) for place, data in enumerate(IMAGES)]


@pytest.mark.parametrize(
    "fields",
    [
        {"cls": lambda place: place % 4},
        {"json": lambda place: {"label": place % 4, "width": 96}},
        {"json": lambda place: {"class_id": str(place % 4)}},
        {"txt": lambda place: f"{place % 4}\n"},
        {"txt": lambda place: "9", "json": lambda place: {"a": 1}, "cls": lambda place: place % 4},
    ],
)
def test_shards_of_the_formats_own_writer(tmp_path, fields):
    folder = write_shards(tmp_path / "s", **fields)
    assert is_webdataset(str(folder))
    listing = scan(folder, tmp_path / "scratch")
    assert read_contents(listing) == NUMBERED
    assert listing.classes == ("0", "1", "2", "3")
    assert listing.titles is None
    assert listing.rejected == 0
    assert listing.full_name(9) == f"{folder}/train-000001.tar/00009.jpg"


def test_numbers_keep_their_order_and_gaps(tmp_path):
    folder = write_shards(tmp_path / "s", cls=lambda place: place if place != 5 else 6)
    listing = scan(folder, tmp_path / "scratch")
    assert listing.classes == tuple(str(number) for number in range(20))  # not "0", "1", "10"
    assert [name for name, _ in read_contents(listing)][:7] == ["0", "1", "2", "3", "4", "6", "6"]


def test_words_are_classes(tmp_path):
    for name, fields in {
        "cls": {"cls": lambda place: CLASSES[place % 4].encode()},
        "json": {"json": lambda place: {"label": CLASSES[place % 4]}},
        "named": {"json": lambda place: {"class_name": CLASSES[place % 4]}},
    }.items():
        listing = scan(write_shards(tmp_path / name, **fields), tmp_path / f"scratch-{name}")
        assert read_contents(listing) == [
            (CLASSES[place % 4], data) for place, data in enumerate(IMAGES)
        ]
        assert listing.classes == CLASSES


def test_titles_out_of_records_beside_the_numbers(tmp_path):
    def record(place: int) -> dict[str, object]:
        return {"label": place % 4, "class_name": CLASSES[3 - place % 4]}

    for name, fields in {"both": {"cls": lambda place: place % 4, "json": record},
                         "json": {"json": record}}.items():  # fmt: skip
        listing = scan(write_shards(tmp_path / name, **fields), tmp_path / f"scratch-{name}")
        assert listing.classes == ("0", "1", "2", "3")
        assert listing.titles == tuple(reversed(CLASSES))


def test_classes_beside_the_shards(tmp_path):
    folder = write_shards(tmp_path / "s", cls=lambda place: place % 4)
    (folder / "classes.txt").write_text("d\nc\nb\na\n")
    listing = scan(folder, tmp_path / "one")
    assert listing.classes == ("d", "c", "b", "a")
    assert read_contents(listing) == [
        ("dcba"[place % 4], data) for place, data in enumerate(IMAGES)
    ]
    (folder / "classes.txt").write_text("d\nc\nb\n")
    with pytest.raises(UsageError, match=r"label 3 of .*00003\.jpg is no class: .* names 3"):
        scan(folder, tmp_path / "two")


def test_numbers_count_the_classes_of_the_training_set(tmp_path):
    folder = write_shards(tmp_path / "s", "%d.tar", cls=lambda place: place % 4)
    listing = scan(folder, tmp_path / "one", "val", CLASSES)
    assert listing.classes == CLASSES
    assert [name for name, _ in read_contents(listing)][:4] == list(CLASSES)
    with pytest.raises(UsageError, match="the training source has 3"):
        scan(folder, tmp_path / "two", "val", CLASSES[:3])


def test_numbers_mean_the_classes_of_that_name(tmp_path):
    folder = write_shards(tmp_path / "s", "%d.tar", cls=lambda place: (1, 2, 10)[place % 3])
    for number, names in enumerate((("1", "10", "2"), ("01", "02", "10"), ("1", "2", "10"))):
        listing = scan(folder, tmp_path / f"{number}", "val", names)
        found = [int(name) for name, _ in read_contents(listing)]
        assert found == [(1, 2, 10)[place % 3] for place in range(20)]
    with pytest.raises(UsageError, match=r"label 10 of .* has 3, named '1', '2', '3', as its numb"):
        scan(folder, tmp_path / "lacking", "val", ("1", "2", "3"))
    words = r"label 1 of .* may be a place in the classes .*'1', '2', 'x', or .*classes\.txt"
    with pytest.raises(UsageError, match=words):
        scan(folder, tmp_path / "mixed", "val", ("1", "2", "x"))
    (folder / "classes.txt").write_text("\n".join(["1", "2", *"abcdefghi"]))  # which was the choice
    listing = scan(folder, tmp_path / "chosen", "val", ("1", "2", *"abcdefghi"))
    assert listing.rows["label"].tolist()[:3] == [1, 2, 10]


def test_a_training_set_that_numbers_names_of_digits_leaves_two_meanings(tmp_path):
    folder = write_shards(tmp_path / "s", cls=lambda place: place % 3)
    (folder / "classes.txt").write_text("0\n1\n10\n")
    train = scan(folder, tmp_path / "train")
    assert (train.numbered, train.classes) == (True, ("0", "1", "10"))
    other = write_shards(tmp_path / "o", "%d.tar", cls=lambda place: place % 3)
    with pytest.raises(UsageError, match=r"label 0 of .* may be a place"):
        scan_webdataset(
            str(other), ListingWriter(tmp_path / "val", "o"), "val", train.classes, numbered=True
        )
    named = scan(other, tmp_path / "words", "val", ("0", "1", "2"))
    assert [name for name, _ in read_contents(named)][:3] == ["0", "1", "2"]


def test_labels_that_count_from_one_are_refused(tmp_path):
    folder = write_shards(tmp_path / "s", cls=lambda place: 1 + place % 4)
    with pytest.raises(UsageError, match=r"labels of source .* run from 1 to 4, .* subtract 1"):
        scan(folder, tmp_path / "one")
    (folder / "classes.txt").write_text("\n".join("abcd"))
    with pytest.raises(UsageError, match=r"label 4 of .*names 4, counted from 0"):
        scan(folder, tmp_path / "two")


@pytest.mark.parametrize(
    "fields",
    [
        {"cls": lambda place: f"{place % 4}.0".encode()},
        {"cls": lambda place: f"{place % 4:.18e}".encode()},
        {"json": lambda place: {"label": float(place % 4)}},
        {"json": lambda place: {"label": (place % 4, f"{place % 4}.0", f"{place % 4}")[place % 3]}},
    ],
)
def test_whole_numbers_may_be_written_as_fractions(tmp_path, fields):
    listing = scan(write_shards(tmp_path / "s", **fields), tmp_path / "scratch")
    assert read_contents(listing) == NUMBERED
    assert listing.classes == ("0", "1", "2", "3")


def test_a_packed_data_set_is_a_source(tiny_data, tmp_path):
    assert is_webdataset(str(tiny_data))
    listing = scan(tiny_data, tmp_path / "train")
    assert (len(listing), listing.classes) == (48, CLASSES)
    val = scan(tiny_data, tmp_path / "val", "val", listing.classes)
    assert (len(val), val.classes) == (20, CLASSES)
    one = scan(tiny_data / "val-000001.tar", tmp_path / "one")
    assert (len(one), one.classes) == (10, CLASSES)
    with pytest.raises(UsageError, match="without a split 'test'"):
        scan(tiny_data, tmp_path / "test", "test")


def test_splits_by_the_names_of_shards(tmp_path):
    write_shards(tmp_path / "s", cls=lambda place: place % 4)
    write_shards(tmp_path / "s", "validation-%06d.tar", cls=lambda place: 3 - place % 4)
    listing = scan(tmp_path / "s", tmp_path / "train")
    assert read_contents(listing) == NUMBERED
    val = scan(tmp_path / "s", tmp_path / "val", "val")
    assert read_contents(val) == [(str(3 - place % 4), data) for place, data in enumerate(IMAGES)]


def test_ranges_globs_and_single_shards(tmp_path):
    folder = write_shards(tmp_path / "s", cls=lambda place: place % 4)
    for number, (source, samples) in enumerate(
        {
            f"{folder}/train-{{000000..000002}}.tar": 20,
            f"{folder}/train-{{000000,000002}}.tar": 12,
            f"{folder}/*.tar": 20,
            f"{folder}/train-00000[01].tar": 16,
            f"{folder}/train-000001.tar": 8,
            f"file://{folder}/train-000001.tar": 8,
        }.items()
    ):
        assert is_webdataset(source)
        listing = scan(source, tmp_path / f"{number}")
        assert len(listing) == samples
        expanded = wds.shardlists.expand_urls(source)
        if "*" not in source and "[" not in source and "://" not in source:
            assert [item.address for item in listing.containers] == expanded
    with pytest.raises(UsageError, match=r"train-000003\.tar, which does not exist"):
        is_webdataset(f"{folder}/train-{{000000..000003}}.tar")
    with pytest.raises(UsageError, match="mend the braces"):
        is_webdataset(f"{folder}/train-{{000000..000003.tar")
    with pytest.raises(UsageError, match="more than 1,000,000 files"):
        is_webdataset(f"{folder}/{{000000000..999999999}}.tar")
    assert not is_webdataset(f"{folder}/nothing-*.tar")
    named = ",".join(["train-000000"] * 50)
    assert is_webdataset(f"{folder}/{{{named}}}.tar")  # longer than a name may be


def test_a_large_shard_comes_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "SAMPLES", 3)
    folder = write_shards(tmp_path / "s", cls=lambda place: place % 4)
    listing = scan(folder, tmp_path / "scratch")
    assert read_contents(listing) == NUMBERED
    assert len(listing.containers) == 3


@pytest.fixture(params=["memory", "http", "s3", "hf"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A store with the shards of `PICTURES`."""
    folder = write_shards(tmp_path / "s", cls=lambda place: place % 4)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    with publish_folder(folder, request) as address:
        yield address


def test_shards_of_a_store(store, tmp_path):
    assert is_remote(store)
    named = [(CLASSES[int(label)], data) for label, data in NUMBERED]
    whole = f"{store}/train-{{000000..000002}}.tar"
    assert is_webdataset(whole)
    listing = scan(whole, tmp_path / "range")
    assert read_contents(listing) == named
    assert listing.full_name(0) == f"{store}/train-000000.tar/00000.jpg"
    assert read_contents(scan(f"{store}/train-000001.tar", tmp_path / "one")) == named[8:16]
    if not store.startswith("http"):
        for number, source in enumerate((store, f"{store}/", f"{store}/*.tar")):
            assert is_webdataset(source)
            found = scan(source, tmp_path / f"{number}")
            assert read_contents(found) == named
            if not store.startswith("memory"):  # fsspec writes these with a third slash
                assert found.containers == listing.containers
    else:
        assert not is_webdataset(store)
        with pytest.raises(UsageError, match="a web server cannot be searched"):
            is_webdataset(f"{store}/*.tar")


def test_looking_into_a_store_is_cheap(tmp_path):
    folder = write_shards(tmp_path / "s", cls=lambda place: place % 4)
    with (folder / "train-000000.tar").open("r+b") as file:
        file.truncate(50 << 20)
    with RangeServer(folder) as server:
        assert is_webdataset(f"{server.address}/train-{{000000..000002}}.tar")
        assert sum(end - start for _, start, end in server.requests) < 100_000
