"""Builds from damaged sources: the rest is packed, within the limit on rejects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.dataset.manifest import Manifest
from pipeline.remote.target import WORK
from pipeline.tools.errors import DuetError, UsageError
from pipeline.verify import main as verify
from tests.helpers.images import jpeg, packed
from tests.helpers.parquets import write as write_parquet
from tests.helpers.tars import tar_of

PER_CLASS = 8


@pytest.fixture(name="source")
def tars_of_which_one_is_cut(tmp_path) -> Path:
    """Three tars of a class, of which `b` ends behind its second image of eight."""
    source = tmp_path / "source"
    for label, name in enumerate("abc"):
        members = {f"{n}.jpg": jpeg(100 * label + n) for n in range(PER_CLASS)}
        tar_of(source / f"{name}.tar", members)
    data = (source / "b.tar").read_bytes()
    (source / "b.tar").write_bytes(data[: data.index(b"2.jpg") + 1000])
    return source


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


def test_the_rest_is_packed_where_the_limit_allows_it(source, tmp_path, capsys):
    out = tmp_path / "data"
    # What is lost counts in images: two of eight are there, six are not.
    wanted = r"about 6 of 24 files \(25.00%\) cannot be packed.*--max-rejects 0.26"
    with pytest.raises(DuetError, match=wanted):
        packed(out, train=source)
    assert not (out / WORK / "chunks").exists()  # it was said before packing
    assert len(rows_of(out)) == 1
    assert "b.tar is damaged and skipped from" in capsys.readouterr().err

    manifest = packed(out, train=source, max_rejects=0.26)
    assert manifest.splits["train"].samples == 18
    assert manifest.rejected == 1
    (row,) = rows_of(out)
    assert row["source"] == row["name"] == str(source / "b.tar")
    assert row["offset"] == (source / "b.tar").read_bytes().index(b"2.jpg")
    assert row["reason"].startswith("damaged, and skipped from here on: 2.jpg goes on after")
    assert verify([str(out)]) == 0
    assert packed(out, train=source, max_rejects=0.26, strict=False) == manifest


def test_strict_refuses_what_is_damaged(source, tmp_path):
    with pytest.raises(UsageError, match=r"b\.tar cannot be read \(2\.jpg goes on after its end"):
        packed(tmp_path / "data", train=source, strict=True, max_rejects=1)
    assert not (tmp_path / "data/manifest.json").exists()
    # It changes nothing where nothing is damaged.
    (source / "b.tar").unlink()
    first = packed(tmp_path / "1", train=source)
    assert packed(tmp_path / "2", train=source, strict=True) == first


def test_rows_of_a_damaged_row_group_have_their_file_and_row(tmp_path):
    import pyarrow.parquet as pq

    path = write_parquet(tmp_path / "a.parquet")
    meta = pq.ParquetFile(path).metadata.row_group(1)
    with path.open("r+b") as file:
        chunk = meta.column(0)
        file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        file.write(bytes(chunk.total_compressed_size))
    manifest = packed(tmp_path / "data", train=path, max_rejects=0.5)
    rows = rows_of(tmp_path / "data")
    assert [(row["source"], row["offset"]) for row in rows] == [
        (str(path), n) for n in range(6, 12)
    ]
    assert manifest == Manifest.load(tmp_path / "data")
    assert manifest.splits["train"].samples == 14
