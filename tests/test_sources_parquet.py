from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UsageError
from pipeline.sources import parquet
from pipeline.sources.asking import Unreachable
from pipeline.sources.listing import Listing, ListingWriter, Unreadable
from pipeline.sources.parquet import is_parquet, scan_parquet
from pipeline.sources.readers import open_reader
from tests.drawn import CLASSES, jpeg
from tests.ranges import RangeServer, s3_bucket  # noqa: F401 - a fixture
from tests.servers import QUICK

PICTURES = [jpeg(seed) for seed in range(20)]
LABELS = [place % 4 for place in range(20)]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def scan(source: str | Path, scratch: Path, split: str = "train", classes=None) -> Listing:
    return scan_parquet(str(source), ListingWriter(scratch, str(source)), split, classes)


def contents(listing: Listing) -> list[tuple[str, bytes]]:
    """Class and bytes of each picture."""
    readers = [open_reader(container, QUICK) for container in listing.containers]
    found = [
        (
            listing.classes[row["label"]],
            readers[row["container"]].read(listing.names[place], int(row["place"]), -1),
        )
        for place, row in enumerate(listing.rows)
    ]
    for reader in readers:
        reader.close()
    return found


def features(names=CLASSES, image: str = "image", label: str = "label") -> dict[bytes, bytes]:
    """What the `datasets` library writes into the schema of an image set."""
    table = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    return {b"huggingface": json.dumps({"info": {"features": table}}).encode()}


def write(
    path: Path,
    pictures=tuple(PICTURES),
    labels=tuple(LABELS),
    *,
    kind: pa.DataType = IMAGE,
    image: str = "image",
    label: str = "label",
    label_kind: pa.DataType | None = None,
    metadata: dict[bytes, bytes] | None = None,
    rows: int = 6,
) -> Path:
    """Write pictures as `datasets` does: a struct of bytes and path, and a number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if pa.types.is_struct(kind):
        pictures = [
            {"bytes": data, "path": f"n{place}.JPEG"} if isinstance(data, bytes) else data
            for place, data in enumerate(pictures)
        ]
    table = pa.table({image: pa.array(pictures, kind), label: pa.array(labels, label_kind)})
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=rows)
    return path


NUMBERED = [(str(label), data) for label, data in zip(LABELS, PICTURES, strict=True)]
NAMED = [(CLASSES[label], data) for label, data in zip(LABELS, PICTURES, strict=True)]


def test_the_layout_of_the_datasets_library(tmp_path):
    """imagenet-1k: `data/train-00000-of-00294.parquet`, numbers whose names are in the schema."""
    root = tmp_path / "imagenet"
    for number in range(2):
        half = slice(10 * number, 10 * number + 10)
        path = root / f"data/train-{number:05d}-of-00002.parquet"
        write(path, PICTURES[half], LABELS[half], metadata=features())
    val = root / "data/validation-00000-of-00001.parquet"
    write(val, PICTURES[:8], [3, 2, 1, 0] * 2, metadata=features())
    write(root / "data/test-00000-of-00001.parquet", PICTURES, [-1] * 20, metadata=features())
    (root / "README.md").touch()
    assert is_parquet(str(root))
    train = scan(root, tmp_path / "train")
    assert contents(train) == NAMED
    assert train.classes == train.titles == CLASSES
    assert train.rejected == 0
    assert train.full_name(12) == f"{root}/data/train-00001-of-00002.parquet/n2.JPEG"
    found = scan(root, tmp_path / "val", "val", train.classes)
    assert contents(found) == [(CLASSES[3 - place % 4], PICTURES[place]) for place in range(8)]
    val.unlink()
    with pytest.raises(UsageError, match=r"20 pictures, none of them usable .*no labels"):
        scan(root, tmp_path / "test", "val", train.classes)
    one = scan(root / "data/train-00000-of-00002.parquet", tmp_path / "x")
    assert len(one) == 10


def test_test_rows_with_labels_serve_as_val(tmp_path):
    write(tmp_path / "s/train-0.parquet", metadata=features())
    write(tmp_path / "s/test-0.parquet", labels=[3] * 10 + [2] * 10, metadata=features())
    val = scan(tmp_path / "s", tmp_path / "val", "val", CLASSES)
    assert {name for name, _ in contents(val)} == {"cat", "dog"}


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
        rows = [{"bytes": data} for data in PICTURES]
        path = write(tmp_path / "a.parquet", rows, **options)
    else:
        path = write(tmp_path / "a.parquet", **options)
    assert is_parquet(str(path))
    listing = scan(path, tmp_path / "scratch")
    assert contents(listing) == NUMBERED
    assert listing.titles is None
    assert len(set(listing.names)) == 20
    if pa.types.is_binary(options.get("kind", IMAGE)):
        assert listing.names[7] == "row-000007"


def test_the_schema_says_which_columns(tmp_path):
    table = pa.table(
        {
            "thumb": pa.array([b"x"] * 20),
            "photo": pa.array([{"bytes": data, "path": None} for data in PICTURES], IMAGE),
            "id": list(range(20)),
            "breed": LABELS,
        }
    ).replace_schema_metadata(features(image="photo", label="breed"))
    pq.write_table(table, tmp_path / "a.parquet")
    assert contents(scan(tmp_path / "a.parquet", tmp_path / "scratch")) == NAMED


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
)
def test_words_are_classes(tmp_path, kind):
    words = [CLASSES[label] for label in LABELS]
    path = write(tmp_path / "a.parquet", labels=words, label_kind=kind)
    listing = scan(path, tmp_path / "scratch")
    assert contents(listing) == NAMED
    assert listing.classes == CLASSES


def test_two_classes_of_one_name(tmp_path):
    path = write(tmp_path / "a.parquet", metadata=features(("crane", "ox", "crane", "bee, Apis")))
    listing = scan(path, tmp_path / "scratch")
    assert listing.classes == ("crane 0", "ox", "crane 2", "bee, Apis")
    assert listing.titles == ("crane", "ox", "crane", "bee, Apis")


def test_numbers_count_the_classes_of_the_training_set(tmp_path):
    path = write(tmp_path / "a.parquet")
    assert contents(scan(path, tmp_path / "one", "val", CLASSES)) == NAMED
    with pytest.raises(UsageError, match=r"label 3 of .*a\.parquet row 3 is no class"):
        scan(path, tmp_path / "two", "val", CLASSES[:3])


def test_rows_without_a_label_are_named(tmp_path):
    labels = [None, -1, *LABELS[2:]]
    path = write(tmp_path / "a.parquet", labels=labels, label_kind=pa.int64())
    listing = scan(path, tmp_path / "scratch")
    assert contents(listing) == NUMBERED[2:]
    assert [(item.name, item.reason) for item in listing.rejects()] == [
        (f"{path}/n0.JPEG", "no label"),
        (f"{path}/n1.JPEG", "no label"),
    ]
    words = ["", None, *(CLASSES[label] for label in LABELS[2:])]
    listing = scan(write(tmp_path / "b.parquet", labels=words), tmp_path / "words")
    assert (len(listing), listing.rejected) == (18, 2)


def test_empty_rows_are_unreadable_one_by_one(tmp_path):
    rows = [None, {"bytes": None, "path": "/home/x/a.jpg"}, *PICTURES[2:]]
    listing = scan(write(tmp_path / "a.parquet", rows), tmp_path / "scratch")
    reader = open_reader(listing.containers[0])
    for place in (0, 1):
        with pytest.raises(Unreadable, match="empty row"):
            reader.read(listing.names[place], place, -1)
    assert reader.read(listing.names[2], 2, -1) == PICTURES[2]
    assert listing.names[0] == "row-000000"


def test_names_are_unique_and_harmless(tmp_path):
    paths = ["same.jpg", "same.jpg", "same.jpg (row 1)", "../../etc\npasswd", "x" * 5000, "\x1b[2J"]
    rows = [{"bytes": b"x", "path": path} for path in paths]
    path = write(tmp_path / "a.parquet", rows, [0, 1] * 3)
    names = list(scan(path, tmp_path / "scratch").names)
    assert names[:2] == ["same.jpg", "same.jpg (row 1)"]
    assert len(set(names)) == 6
    assert all(name.isprintable() and len(name) < 250 for name in names)


def test_labels_are_read_by_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS", 7)
    path = write(tmp_path / "a.parquet", metadata=features())
    assert contents(scan(path, tmp_path / "scratch")) == NAMED


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"image": [b"x"], "caption": ["x"]}, r"no column of labels.*'image \(binary\), caption"),
        ({"label": [1], "caption": ["x"]}, r"no column of pictures.*label \(int64\), caption"),
        ({"image": ["a.jpg"], "label": [1]}, r"no column of pictures.*image \(string\)"),
        ({"image": [b"x"], "label": [0.5]}, r"no column of labels.*label \(double\)"),
        ({"image": [b"x"], "label": [[1, 2]]}, r"no column of labels.*label \(list"),
        ({"a": [b"x"], "b": [b"y"], "label": [1]}, r"no column of pictures"),
    ],
)
def test_wrong_columns_are_listed(tmp_path, columns, says):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=says) as raised:
        scan(tmp_path / "a.parquet", tmp_path / "scratch")
    assert "\n" not in str(raised.value)


def test_files_that_are_no_parquet(tmp_path):
    whole = write(tmp_path / "whole.parquet").read_bytes()
    for number, damaged in enumerate(
        (
            b"",
            b"PAR1",
            b"not a parquet file at all",
            whole[: len(whole) // 2],
            whole[:-100] + bytes(92) + whole[-8:],
            whole[:-8] + b"\xff\xff\xff\x7fPAR1",
        )
    ):
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"parquet file .* cannot be read") as raised:
            scan(path, tmp_path / f"scratch{number}")
        assert "\n" not in str(raised.value)
    assert is_parquet(str(tmp_path / "0.parquet"))  # or nobody would say what is wrong with it


def test_damage_anywhere_is_an_error_or_a_reason(tmp_path):
    """Whatever bytes are turned over, nothing else than our own errors comes out."""
    whole = write(tmp_path / "whole.parquet", metadata=features()).read_bytes()
    random = np.random.default_rng(0)
    for number in range(150):
        damaged = bytearray(whole)
        start = 0 if number % 2 else len(whole) - 2500
        for place in random.integers(start, len(whole), 1 + number % 7):
            damaged[place] = random.integers(256)
        path = tmp_path / "damaged.parquet"
        path.write_bytes(damaged)
        try:
            listing = scan(path, tmp_path / "scratch")
            reader = open_reader(listing.containers[0])
        except (UsageError, OSError):
            continue
        for place, row in enumerate(listing.rows):
            try:
                reader.read(listing.names[place], int(row["place"]), -1)
            except (Unreadable, OSError):
                continue
        reader.close()


def test_files_of_two_sets_do_not_mix(tmp_path):
    write(tmp_path / "s/0.parquet", metadata=features())
    write(tmp_path / "s/1.parquet", metadata=features(reversed(CLASSES)))
    with pytest.raises(UsageError, match=r"1\.parquet names its classes differently"):
        scan(tmp_path / "s", tmp_path / "scratch")


def test_what_is_parquet(tmp_path):
    path = write(tmp_path / "s/train/0.parquet")
    path.with_suffix(".bin").write_bytes(path.read_bytes())
    for source in (path, path.parent, path.parent.parent, path.with_suffix(".bin")):
        assert is_parquet(str(source))
        assert len(scan(source, tmp_path / f"scratch-{source.name}")) == 20
    assert is_parquet(f"{tmp_path}/s/*/*.parquet")
    assert is_parquet(f"{tmp_path}/s/train/{{0..0}}.parquet")
    (tmp_path / "other/a").mkdir(parents=True)
    (tmp_path / "other/a/x.jpg").write_bytes(PICTURES[0])
    for source in ("other", "other/a/x.jpg", "nothing", "nothing.parquet", "s/*.parquet"):
        assert not is_parquet(str(tmp_path / source))


@pytest.fixture(params=["memory", "http", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A store with two files of ten pictures."""
    folder = tmp_path / "s"
    for number in range(2):
        half = slice(10 * number, 10 * number + 10)
        write(folder / f"{number}.parquet", PICTURES[half], LABELS[half], metadata=features())
    if request.param == "http":
        with RangeServer(folder) as server:
            yield server.address
    elif request.param == "memory":
        system = fsspec.filesystem("memory")
        system.put(str(folder), "/parquet", recursive=True)
        yield "memory://parquet"
        system.rm("/parquet", recursive=True)
    else:
        address = request.getfixturevalue("s3_bucket")
        for path in folder.iterdir():
            fsspec.filesystem("s3").put_file(str(path), f"{address}/{path.name}")
        yield address


def test_files_of_a_store(store, tmp_path):
    sources = [f"{store}/{{0,1}}.parquet"]
    if not store.startswith("http"):
        sources += [store, f"{store}/*.parquet"]
    for number, source in enumerate(sources):
        assert is_parquet(source)
        assert contents(scan(source, tmp_path / f"{number}")) == NAMED
    assert not is_parquet(f"{store}/train.tar")
    with pytest.raises(Unreachable, match=r"2\.parquet could not be read, tried 2 times"):
        scan(f"{store}/2.parquet", tmp_path / "gone")


def test_a_scan_reads_labels_and_no_pictures(tmp_path):
    random = np.random.default_rng(0)
    pictures = [random.bytes(100_000) for _ in range(100)]
    path = write(tmp_path / "s/a.parquet", pictures, LABELS * 5, rows=25)
    with RangeServer(path.parent) as server:
        listing = scan(f"{server.address}/a.parquet", tmp_path / "scratch")
        assert len(listing) == 100
        read = sum(end - start for _, start, end in server.requests)
        assert read < 0.12 * path.stat().st_size, server.requests
