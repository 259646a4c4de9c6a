"""Images out of the rows of Parquet files."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.remote.filesystem import Unreachable
from pipeline.sources import listing, parquet, readers
from pipeline.sources.listing import Container, ListingWriter, Unreadable
from pipeline.sources.parquet import scan_parquet
from pipeline.sources.readers import open_reader
from pipeline.tools.errors import UsageError
from tests.helpers.http_servers import QUICK
from tests.helpers.range_servers import RangeServer

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(path: Path, images: list, rows: int, kind: pa.DataType = IMAGE) -> str:
    table = pa.table({"image": pa.array(images, kind), "label": [0] * len(images)})
    # Pages of 16 rows: by default they hold 1,024, however large, and are read whole.
    packer = "none" if rows > 40 else "snappy"
    pq.write_table(table, path, row_group_size=rows, compression=packer, write_batch_size=16)
    return str(path)


@pytest.mark.parametrize("most_rows", [3, 256])
def test_rows_in_any_order(tmp_path, monkeypatch, most_rows):
    monkeypatch.setattr(readers, "MOST_ROWS", most_rows)
    data = [np.random.default_rng(place).bytes(50 + place) for place in range(95)]
    plain = write_parquet(tmp_path / "plain.parquet", data, 10, pa.binary())
    large = write_parquet(tmp_path / "large.parquet", data, 95, pa.large_binary())
    struct = write_parquet(tmp_path / "s.parquet", [{"bytes": item} for item in data], 10)
    order = np.random.default_rng(0).permutation(95).tolist()
    for path in (plain, large, struct):
        reader = open_reader(Container("parquet", path))
        for place in [*range(95), *order]:
            assert reader.read("x", place, -1) == data[place]
        with pytest.raises(OSError, match="has 95 rows, not row 95"):
            reader.read("x", 95, -1)
        reader.close()


def test_rows_without_bytes(tmp_path, monkeypatch):
    rows = [None, {"bytes": None, "path": "a.jpg"}, {"bytes": b""}, {"bytes": b"12345"}]
    reader = open_reader(Container("parquet", write_parquet(tmp_path / "x.parquet", rows, 2)))
    for place in range(3):
        with pytest.raises(Unreadable, match="empty row"):
            reader.read("x", place, -1)
    assert reader.read("x", 3, -1) == b"12345"
    monkeypatch.setattr(listing, "MOST_IMAGE_BYTES", 4)
    with pytest.raises(Unreadable, match="too large: 5 bytes"):
        reader.read("x", 3, -1)


def test_a_damaged_row_group_costs_its_own_rows_only(tmp_path):
    data = [
        np.random.default_rng(place).integers(0, 9, 9000, np.uint8).tobytes() for place in range(40)
    ]
    path = write_parquet(tmp_path / "x.parquet", data, 10, pa.binary())
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    with Path(path).open("r+b") as file:
        file.seek(start)
        file.write(bytes(chunk.total_compressed_size))
    reader = open_reader(Container("parquet", path))
    read = []
    for place in range(40):
        try:
            assert reader.read("x", place, -1) == data[place]
            read.append(place)
        except Unreadable as error:
            assert "row group" in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
    assert read == [*range(10), *range(20, 40)]


def test_rows_of_a_store(tmp_path):
    data = [np.random.default_rng(place).bytes(20_000) for place in range(100)]
    write_parquet(tmp_path / "x.parquet", data, 25, pa.binary())
    with RangeServer(tmp_path) as server:
        server.fail("x.parquet", ["", "503", "", "cut", "503"])
        reader = open_reader(Container("parquet", f"{server.address}/x.parquet"), QUICK)
        assert [reader.read("x", place, -1) for place in range(100)] == data
        reader.close()
        assert len(server.requests) < 15, server.requests
    with RangeServer(tmp_path) as server:
        reader = open_reader(Container("parquet", f"{server.address}/x.parquet"), QUICK)
        server.fail("x.parquet", itertools.repeat("500"))
        with pytest.raises(Unreachable, match="HTTP 500"):  # not a damaged image
            reader.read("x", 60, -1)
        reader.close()


MEMORY = """
import re, sys
from pathlib import Path
from pipeline.sources.listing import Container
from pipeline.sources.readers import open_reader
for path in sys.argv[1:]:
    reader = open_reader(Container("parquet", path))
    for place in range(reader._starts[-1]):
        reader.read("x", place, -1)
    reader.close()
    # Not `ru_maxrss`: a child inherits that of the process that started it.
    most = re.search("VmHWM:[^0-9]*([0-9]+)", Path("/proc/self/status").read_text())
    print(int(most[1]) // 1024)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    def file(name: str, count: int, rows: int) -> str:
        return write_parquet(tmp_path / name, data[:count], rows, pa.binary())

    random = np.random.default_rng(0)
    data = [random.bytes(200_000) for _ in range(450)]

    files = [file("small", 150, 50), file("many", 450, 50), file("one", 450, 450)]
    command = [sys.executable, "-c", MEMORY, *files]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    small, many, one = map(int, text.split())
    assert many - small < 12, text  # MiB; the file has 57 more
    assert one - small < 24, text  # all of it in one row group: 86 MiB


def test_a_row_group_of_thousands_of_times_its_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "LARGEST_GROUP", 8 << 20)
    monkeypatch.setattr(parquet, "MOST_TIMES", 10)  # snappy does not pack zeros to nothing
    row = {"bytes": bytes(16 << 20), "path": None}
    path = write_parquet(tmp_path / "b.parquet", [row], 1)
    with pytest.raises(OSError, match=r"decompression bomb: a row group of 16,.* bytes in a file"):
        open_reader(Container("parquet", path))
    with pytest.raises(UsageError, match="decompression bomb") as caught:
        scan_parquet(path, ListingWriter(tmp_path, path), "train", None)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(parquet, "LARGEST_GROUP", 32 << 20)
    assert open_reader(Container("parquet", path)).read("x", 0, 0) == bytes(16 << 20)
