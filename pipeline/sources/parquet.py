"""Lists the pictures of parquet files in the layouts of Hugging Face; no picture is read.

SRC.parquet    SRC/*.parquet    SRC/data/train-00000-of-00294.parquet    s3://bucket/*.parquet
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.remote.filesystem import Unreachable
from pipeline.sources.classes import Labels
from pipeline.sources.listing import Listing, ListingWriter, shown
from pipeline.sources.parquet_columns import DAMAGE, Columns, find_columns, in_a_line, opened
from pipeline.sources.paths import each, find, is_remote, of_split
from pipeline.stores.errors import without_secrets
from pipeline.tools.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

ENDING = ".parquet"
ROWS = 1 << 15
"""Rows whose labels are in memory at a time."""
LONGEST_NAME = 200


class _Rows(NamedTuple):
    """Labels of some rows that follow each other in a file."""

    address: str
    first: int
    names: list[str]
    labels: list[int] | list[str]
    """Numbers, negative without a label, or words, empty without."""
    columns: Columns


def is_parquet(source: str) -> bool:
    """Say whether a source is a parquet file, a folder of them, a glob or a brace range."""
    if find(source, ENDING) is not None:
        return True
    if is_remote(source) or not os.path.isfile(source):  # noqa: PTH113 - it may be a long range
        return False
    with Path(source).open("rb") as file:
        return file.read(4) == b"PAR1"


def scan_parquet(
    source: str, writer: ListingWriter, split: str, classes: Sequence[str] | None
) -> Listing:
    """List the pictures of a source for which `is_parquet` holds.

    Args:
        source: as the user named it.
        writer: of the listing; nothing has been added yet.
        split: `train` or `val`, for folders whose files are named so.
        classes: of the training split, when this is another one of the same set.

    Raises:
        UsageError: a file that is no parquet, or lacks pictures or labels; what the writer finds.
        StoreError: the store does not give a file.
    """
    files = find(source, ENDING)
    addresses = (str(Path(source).absolute()),) if files is None else of_split(files, split, source)
    labels: Labels | None = None
    names: tuple[str, ...] | None = None
    container, current = -1, ""
    for rows in each(addresses, _scan_file, is_remote(source)):
        if labels is None:
            names = rows.columns.names
            labels = Labels(source, names, classes, titles=names)
        if rows.columns.names != names:
            raise UsageError(
                f"parquet file {without_secrets(rows.address)} names its classes differently from "
                f"{without_secrets(addresses[0])}; take files of one set"
            )
        if rows.address != current:
            container, current = writer.container("parquet", rows.address), rows.address
        _add(rows, container, writer, labels)
    return (labels or Labels(source, None, classes)).finish(writer)


def _add(rows: _Rows, container: int, writer: ListingWriter, labels: Labels) -> None:
    classes, names, places = [], [], []
    for place, (name, label) in enumerate(zip(rows.names, rows.labels, strict=True), rows.first):
        if isinstance(label, str) and label:
            classes.append(labels.of_word(label, f"{rows.address} row {place}"))
        elif isinstance(label, int) and label >= 0:
            classes.append(labels.of_number(label, f"{rows.address} row {place}"))
        else:
            writer.reject(f"{rows.address}/{name}", "no label")
            continue
        names.append(name)
        places.append(place)
    writer.add(container, classes, names, places)


def _scan_file(address: str) -> Iterator[_Rows]:
    """Yield the labels of a file, `ROWS` at a time."""
    import pyarrow as pa

    try:
        yield from _rows_of(address)
    except Unreachable:
        raise
    except (pa.ArrowException, *DAMAGE) as error:
        raise UsageError(
            f"parquet file {without_secrets(address)} cannot be read ({in_a_line(error)}); "
            "it must be whole"
        ) from error


def _rows_of(address: str) -> Iterator[_Rows]:
    with opened(address) as file:
        columns = find_columns(file, address)
        wanted = [columns.label, *([f"{columns.image}.path"] if columns.has_path else [])]
        seen: set[int] = set()
        first = 0
        for batch in file.iter_batches(ROWS, columns=wanted, use_threads=False):
            names = _names(batch, columns, first, seen)
            yield _Rows(address, first, names, _labels(batch, columns), columns)
            first += batch.num_rows
        if first != file.metadata.num_rows:
            raise OSError(f"{first} rows instead of {file.metadata.num_rows}")


def _labels(batch: pa.RecordBatch, columns: Columns) -> list[int] | list[str]:
    import pyarrow as pa

    column = batch.column(batch.schema.get_field_index(columns.label))
    if columns.numbers:
        numbers: list[int] = column.cast(pa.int64()).fill_null(-1).to_pylist()
        return numbers
    return [(word or "").strip() for word in column.to_pylist()]


def _names(batch: pa.RecordBatch, columns: Columns, first: int, seen: set[int]) -> list[str]:
    """Return unique names of rows: the path that stands there, or else the row's number."""
    paths: list[str | None] = [None] * batch.num_rows
    if columns.has_path:
        image = batch.column(batch.schema.get_field_index(columns.image))
        paths = image.flatten()[0].to_pylist()
    names = []
    for row, path in enumerate(paths, first):
        name = shown(path)[-LONGEST_NAME:] if path else f"row-{row:06d}"
        if hash(name) in seen:
            name = f"{name} (row {row})"
        seen.add(hash(name))
        names.append(name)
    return names
