"""Parquet files as a source: layouts, columns, classes, stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.remote.filesystem import Unreachable
from pipeline.sources import parquet
from pipeline.sources.parquet import is_parquet
from pipeline.tools.errors import UsageError
from tests.helpers.images import CLASSES
from tests.helpers.parquets import (
    IMAGE,
    IMAGES,
    LABELS,
    NUMBERED,
    features,
    scan,
    write,
)
from tests.helpers.range_servers import RangeServer
from tests.helpers.sources import publish_folder, read_contents

NAMED = [(CLASSES[label], data) for label, data in zip(LABELS, IMAGES, strict=True)]


def test_the_layout_of_the_datasets_library(tmp_path):
    """imagenet-1k: `data/train-00000-of-00294.parquet`, numbers whose names are in the schema."""
    root = tmp_path / "imagenet"
    for number in range(2):
        half = slice(10 * number, 10 * number + 10)
        path = root / f"data/train-{number:05d}-of-00002.parquet"
        write(path, IMAGES[half], LABELS[half], metadata=features())
    val = root / "data/validation-00000-of-00001.parquet"
    write(val, IMAGES[:8], [3, 2, 1, 0] * 2, metadata=features())
    write(root / "data/test-00000-of-00001.parquet", IMAGES, [-1] * 20, metadata=features())
    (root / "README.md").touch()
    assert is_parquet(str(root))
    train = scan(root, tmp_path / "train")
    assert read_contents(train) == NAMED
    assert train.classes == train.titles == CLASSES
    assert train.rejected == 0
    assert train.full_name(12) == f"{root}/data/train-00001-of-00002.parquet/n2.JPEG"
    found = scan(root, tmp_path / "val", "val", train.classes)
    assert read_contents(found) == [(CLASSES[3 - place % 4], IMAGES[place]) for place in range(8)]
    val.unlink()
    with pytest.raises(
        UsageError, match=r"20 images, none of them usable; .*no label \(20 times, as .*no labels"
    ):
        scan(root, tmp_path / "test", "val", train.classes)
    one = scan(root / "data/train-00000-of-00002.parquet", tmp_path / "x")
    assert len(one) == 10


def test_test_rows_with_labels_serve_as_val(tmp_path):
    write(tmp_path / "s/train-0.parquet", metadata=features())
    write(tmp_path / "s/test-0.parquet", labels=[3] * 10 + [2] * 10, metadata=features())
    val = scan(tmp_path / "s", tmp_path / "val", "val", CLASSES)
    assert {name for name, _ in read_contents(val)} == {"cat", "dog"}


@pytest.mark.parametrize(
    "options",
    [
        {"kind": pa.binary()},
        {"kind": pa.large_binary()},
        {"kind": pa.struct([("path", pa.string()), ("bytes", pa.large_binary())])},
        {"kind": pa.struct([("bytes", pa.binary())])},
        {"image": "img", "label": "fine_label"},
        {"image": "jpg", "label": "cls", "kind": pa.binary(), "label_kind": pa.int8()},
        {"image": "picture_of_it", "label": "class", "label_kind": pa.uint64()},
        {"image": "a.b", "label": "labels", "kind": pa.binary()},
    ],
)
def test_columns_of_many_kinds(tmp_path, options):
    if "path" not in str(options.get("kind", "path")) and "struct" in str(options.get("kind")):
        rows = [{"bytes": data} for data in IMAGES]
        path = write(tmp_path / "a.parquet", rows, **options)
    else:
        path = write(tmp_path / "a.parquet", **options)
    assert is_parquet(str(path))
    listing = scan(path, tmp_path / "scratch")
    assert read_contents(listing) == NUMBERED
    assert listing.titles is None
    assert len(set(listing.names)) == 20
    if pa.types.is_binary(options.get("kind", IMAGE)):
        assert listing.names[7] == "row-000007"


def test_the_schema_says_which_columns(tmp_path):
    table = pa.table(
        {
            "thumb": pa.array([b"x"] * 20),
            "photo": pa.array([{"bytes": data, "path": None} for data in IMAGES], IMAGE),
            "id": list(range(20)),
            "breed": LABELS,
        }
    ).replace_schema_metadata(features(image="photo", label="breed"))
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_contents(scan(tmp_path / "a.parquet", tmp_path / "scratch")) == NAMED


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
)
def test_words_are_classes(tmp_path, kind):
    words = [CLASSES[label] for label in LABELS]
    path = write(tmp_path / "a.parquet", labels=words, label_kind=kind)
    listing = scan(path, tmp_path / "scratch")
    assert read_contents(listing) == NAMED
    assert listing.classes == CLASSES


def test_numbers_in_columns_of_other_kinds(tmp_path):
    """Data frames turn whole numbers into floats, and spreadsheets into text."""
    floats = [*map(float, LABELS[:19]), float("nan")]
    listing = scan(write(tmp_path / "f.parquet", labels=floats), tmp_path / "floats")
    assert (read_contents(listing), listing.rejected) == (NUMBERED[:19], 1)
    texts = [f"{label + 8}{'.0' * (place % 2)}" for place, label in enumerate(LABELS)]
    listing = scan(write(tmp_path / "t.parquet", labels=texts), tmp_path / "texts")
    assert listing.classes == ("8", "9", "10", "11")
    folder = write(tmp_path / "s/0.parquet").parent
    write(folder / "1.parquet", labels=[str(label) for label in LABELS])
    listing = scan(folder, tmp_path / "both")
    assert read_contents(listing) == NUMBERED * 2
    write(folder / "2.parquet", labels=["cat"] * 20)
    with pytest.raises(UsageError, match=r"labels that are numbers, such as 0 .*words, such as 'c"):
        scan(folder, tmp_path / "words")
    scores = write(tmp_path / "x.parquet", labels=[0.5] * 20, label="label")
    table = pq.read_table(scores).append_column("class", pa.array(["a", "b"] * 10))
    pq.write_table(table, scores)
    assert scan(scores, tmp_path / "scores").classes == ("a", "b")


def test_two_classes_of_one_name(tmp_path):
    path = write(tmp_path / "a.parquet", metadata=features(("crane", "ox", "crane", "bee, Apis")))
    listing = scan(path, tmp_path / "scratch")
    assert listing.classes == ("crane 0", "ox", "crane 2", "bee, Apis")
    assert listing.titles == ("crane", "ox", "crane", "bee, Apis")


def test_numbers_count_the_classes_of_the_training_set(tmp_path):
    path = write(tmp_path / "a.parquet")
    assert read_contents(scan(path, tmp_path / "one", "val", CLASSES)) == NAMED
    with pytest.raises(UsageError, match=r"label 3 of .*a\.parquet row 3 is no class"):
        scan(path, tmp_path / "two", "val", CLASSES[:3])


def test_labels_are_read_by_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS", 7)
    path = write(tmp_path / "a.parquet", metadata=features())
    assert read_contents(scan(path, tmp_path / "scratch")) == NAMED


def test_what_is_parquet(tmp_path):
    path = write(tmp_path / "s/train/0.parquet")
    path.with_suffix(".bin").write_bytes(path.read_bytes())
    for source in (path, path.parent, path.parent.parent, path.with_suffix(".bin")):
        assert is_parquet(str(source))
        assert len(scan(source, tmp_path / f"scratch-{source.name}")) == 20
    assert is_parquet(f"{tmp_path}/s/*/*.parquet")
    assert is_parquet(f"{tmp_path}/s/train/{{0..0}}.parquet")
    (tmp_path / "other/a").mkdir(parents=True)
    (tmp_path / "other/a/x.jpg").write_bytes(IMAGES[0])
    for source in ("other", "other/a/x.jpg", "nothing", "nothing.parquet", "s/*.parquet"):
        assert not is_parquet(str(tmp_path / source))


@pytest.fixture(params=["memory", "http", "s3", "hf"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A store with two files of ten images."""
    folder = tmp_path / "s"
    for number in range(2):
        half = slice(10 * number, 10 * number + 10)
        write(folder / f"{number}.parquet", IMAGES[half], LABELS[half], metadata=features())
    with publish_folder(folder, request) as address:
        yield address


def test_files_of_a_store(store, tmp_path):
    sources = [f"{store}/{{0,1}}.parquet"]
    if not store.startswith("http"):
        sources += [store, f"{store}/*.parquet"]
    for number, source in enumerate(sources):
        assert is_parquet(source)
        assert read_contents(scan(source, tmp_path / f"{number}")) == NAMED
    assert not is_parquet(f"{store}/train.tar")
    with pytest.raises(Unreachable, match=r"2\.parquet could not be read, tried 2 times"):
        scan(f"{store}/2.parquet", tmp_path / "gone")


def test_a_scan_reads_labels_and_no_images(tmp_path):
    random = np.random.default_rng(0)
    images = [random.bytes(100_000) for _ in range(100)]
    path = write(tmp_path / "s/a.parquet", images, LABELS * 5, rows=25)
    with RangeServer(path.parent) as server:
        listing = scan(f"{server.address}/a.parquet", tmp_path / "scratch")
        assert len(listing) == 100
        read = sum(end - start for _, start, end in server.requests)
        assert read < 0.12 * path.stat().st_size, server.requests
