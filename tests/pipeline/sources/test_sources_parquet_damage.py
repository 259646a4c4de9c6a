"""Rows and files of Parquet that are empty, damaged, or no images."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sources.listing import Unreadable
from pipeline.sources.parquet import is_parquet
from pipeline.sources.readers import open_reader
from pipeline.tools.errors import UsageError
from tests.helpers.images import CLASSES
from tests.helpers.parquets import IMAGES, LABELS, NUMBERED, features, scan, write
from tests.helpers.sources import read_contents


def test_rows_without_a_label_are_named(tmp_path):
    labels = [None, -1, *LABELS[2:]]
    path = write(tmp_path / "a.parquet", labels=labels, label_kind=pa.int64())
    listing = scan(path, tmp_path / "scratch")
    assert read_contents(listing) == NUMBERED[2:]
    assert [(item.name, item.reason) for item in listing.rejects()] == [
        (f"{path}/n0.JPEG", "no label"),
        (f"{path}/n1.JPEG", "no label"),
    ]
    words = ["", None, *(CLASSES[label] for label in LABELS[2:])]
    listing = scan(write(tmp_path / "b.parquet", labels=words), tmp_path / "words")
    assert (len(listing), listing.rejected) == (18, 2)


def test_empty_rows_are_unreadable_one_by_one(tmp_path):
    rows = [None, {"bytes": None, "path": "/home/x/a.jpg"}, *IMAGES[2:]]
    listing = scan(write(tmp_path / "a.parquet", rows), tmp_path / "scratch")
    reader = open_reader(listing.containers[0])
    for place in (0, 1):
        with pytest.raises(Unreadable, match="empty row"):
            reader.read(listing.names[place], place, -1)
    assert reader.read(listing.names[2], 2, -1) == IMAGES[2]
    assert listing.names[0] == "row-000000"


def test_names_are_unique_and_harmless(tmp_path):
    paths = ["same.jpg", "same.jpg", "same.jpg (row 1)", "../../etc\npasswd", "x" * 5000, "\x1b[2J"]
    rows = [{"bytes": b"x", "path": path} for path in paths]
    path = write(tmp_path / "a.parquet", rows, [0, 1] * 3)
    names = list(scan(path, tmp_path / "scratch").names)
    assert names[:2] == ["same.jpg", "same.jpg (row 1)"]
    assert len(set(names)) == 6
    assert all(name.isprintable() and len(name) < 250 for name in names)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"image": [b"x"], "caption": ["x"]}, r"no column of labels.*'image \(binary\), caption"),
        ({"label": [1], "caption": ["x"]}, r"no column of images.*label \(int64\), caption"),
        ({"image": ["a.jpg"], "label": [1]}, r"no column of images.*image \(string\)"),
        ({"image": [b"x"], "label": [0.5]}, r"no label: 0\.5 is no whole number"),
        ({"image": [b"x"], "label": [True]}, r"no column of labels.*label \(bool\)"),
        ({"image": [b"x"], "label": [[1, 2]]}, r"no column of labels.*label \(list"),
        ({"a": [b"x"], "b": [b"y"], "label": [1]}, r"no column of images"),
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
    """Changed bytes raise nothing but our own errors."""
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
