"""Lists the images of parquet files in the layouts of Hugging Face; no image is read.

SRC.parquet    SRC/*.parquet    SRC/data/train-00000-of-00294.parquet    s3://bucket/*.parquet

Images are a column `struct<bytes: binary, path: string>` or plain `binary`; labels are numbers,
whose names the schema's metadata may hold (`ClassLabel`), or text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.dataset.samples import parse_text
from pipeline.dataset.tar import escape
from pipeline.remote.filesystem import RetryPolicy, Unreachable, is_remote
from pipeline.sources.classes import LabelMapper
from pipeline.sources.listing import WHOLE_FILE, Listing, ListingWriter, Unreadable
from pipeline.sources.paths import find_files, open_file, read_small, scan_each, select_split
from pipeline.tools.errors import (
    SYSTEM_ERRORS,
    DamagedSource,
    UsageError,
    summarize_error,
)
from pipeline.tools.files import describe_foreign
from pipeline.tools.jsonl import parse_json
from pipeline.tools.text import hide_credentials

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ENDING = ".parquet"
IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixels")
LABELS = ("label", "labels", "fine_label", "cls", "class", "class_id", "target")

BUFFER = 1 << 20
"""Bytes of a column that are read at a time; without it, a column of a row group is read whole."""
LARGEST_FOOTER = 1 << 30
"""Bytes of strings and lists in the schema and the row groups, once parsed."""
ROWS = 1 << 15
"""Rows whose labels are in memory at a time."""
LARGEST_GROUP = 512 << 20
"""Bytes, unpacked, up to which a row group may be any number of times the size of its file."""
MOST_TIMES = 100
"""Times the size of its file that a larger row group may be; images hardly pack any further."""
LONGEST_NAME = 200
DAMAGE = (OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError)
"""Exceptions that pyarrow raises on damaged files, besides its own `ArrowException`; found by
changing bytes of good ones."""


class ParquetColumn(NamedTuple):
    """A column whose values are bytes."""

    name: str
    in_struct: bool
    """True if the column is `struct<bytes, ...>`, not the bytes themselves."""


@dataclass(frozen=True)
class ParquetColumns:
    """Columns of a file that hold images and labels."""

    image: str
    has_path: bool
    """True if the column of images is a struct with a `path` that is text."""
    label: str | None
    """None where labels are not asked for."""
    numbers: bool
    """True if labels are numbers, not text."""
    names: tuple[str, ...] | None
    """Names of the numbers, if the file has them."""


def open_parquet(address: str, policy: RetryPolicy | None = None) -> tuple[pq.ParquetFile, int]:
    """Open a parquet file of a disk or a store; `close(force=True)` closes it.

    Returns:
        The file, and its size in bytes.

    Raises:
        OSError: it cannot be read, or is a decompression bomb; of a store, `Unreachable`.
        pyarrow.ArrowException, or one of `DAMAGE`: it is no parquet file, or damaged.
    """
    import pyarrow.parquet as pq

    source: Any = open_file(address, policy) if is_remote(address) else address
    size: int = source.size if is_remote(address) else Path(address).stat().st_size
    file = pq.ParquetFile(
        source,
        buffer_size=BUFFER,
        pre_buffer=False,  # it would keep every column it has read
        thrift_string_size_limit=LARGEST_FOOTER,
    )
    groups = (file.metadata.row_group(group) for group in range(file.metadata.num_row_groups))
    largest = max((group.total_byte_size for group in groups), default=0)
    if largest > max(LARGEST_GROUP, MOST_TIMES * size):
        file.close(force=True)
        raise OSError(
            f"decompression bomb: a row group of {largest:,} bytes in a file of {size:,} bytes"
        )
    return file, size


def find_image_column(file: pq.ParquetFile, address: str) -> ParquetColumn:
    """Return the column that holds images.

    Raises:
        UsageError: there is none; the message lists the columns of the file.
    """
    schema = file.schema_arrow
    fields = {field.name: field for field in schema}
    image = _find_field(IMAGES, fields, _features(schema), "Image", _holds_bytes)
    if image is None:
        raise _column_error(schema, address, f"images ({BYTES}), such as {IMAGES[0]!r}")
    return ParquetColumn(image.name, image.type.num_fields > 0)  # plain bytes have none


BYTES = "struct<bytes, path> or binary"


def _column_error(schema: pa.Schema, address: str, lacks: str) -> UsageError:
    # The type of a column may be as long as its writer wants.
    there = ", ".join(f"{field.name} ({str(field.type)[:60]})" for field in schema)[:300]
    return UsageError(
        f"parquet file {hide_credentials(address)} has no column of {lacks}; its columns: {there!r}"
    )


def find_member_columns(
    file: pq.ParquetFile, address: str, fields: Sequence[str]
) -> dict[str, ParquetColumn]:
    """Return the column of each field: `caption.txt` is column `caption.txt`, or else `caption`.

    Raises:
        UsageError: there is none, or its values are neither bytes nor text, and the field is no
            `.json`.
    """
    schema, found = file.schema_arrow, {}
    for name in fields:
        stem, _, kind = name.rpartition(".")
        places = (schema.get_field_index(one) for one in (name, stem))
        place = next((place for place in places if place >= 0), -1)
        if place < 0:
            wanted = f"the field {name!r}, {name!r}" + (f" or {stem!r}" if stem else "")
            raise _column_error(schema, address, wanted)
        column = schema.field(place)
        if not (_holds_bytes(column.type) or _is_text(column.type) or kind == "json"):
            raise UsageError(
                f"parquet file {hide_credentials(address)} has {str(column.type)[:60]} in column "
                f"{column.name!r}; a field is {BYTES}, text, or by an ending .json any value: "
                f"{column.name}.json"
            )
        in_struct = _holds_bytes(column.type) and column.type.num_fields > 0
        found[name] = ParquetColumn(column.name, in_struct)
    return found


def encode_value(value: Any) -> bytes:
    """Return a value of a column as the content of a member: bytes, text as UTF-8, else JSON.

    Raises:
        Unreadable: it is null, or a value that JSON has no form for.
    """
    if value is None:
        raise Unreadable("empty row")
    if isinstance(value, bytes):
        return value
    try:
        return (value if isinstance(value, str) else json.dumps(value, allow_nan=False)).encode()
    except (TypeError, ValueError) as error:  # dates, bytes in a struct
        raise Unreadable(f"no value for JSON ({summarize_error(error)})") from error


def find_columns(
    file: pq.ParquetFile, address: str, fields: Sequence[str] = (), labelled: bool = True
) -> ParquetColumns:
    """Return the columns that hold images and labels, after looking for those of the fields.

    Raises:
        UsageError: there are none; the message lists the columns of the file.
    """
    import pyarrow as pa

    def is_label(kind: pa.DataType) -> bool:
        return pa.types.is_integer(kind) or _is_text(kind)

    schema = file.schema_arrow
    features = _features(schema)
    columns = {field.name: field for field in schema}
    image = columns[find_image_column(file, address).name]
    find_member_columns(file, address, fields)
    has_path = image.type.num_fields > 0 and image.type.get_field_index("path") >= 0
    has_path = has_path and _is_text(image.type.field("path").type)
    if not labelled:
        return ParquetColumns(image.name, has_path, label=None, numbers=False, names=None)
    label = _find_field(LABELS, columns, features, "ClassLabel", is_label)
    if label is None:
        label = _find_field(LABELS, columns, features, "ClassLabel", pa.types.is_floating)
    if label is None:
        raise _column_error(schema, address, f"labels, such as {LABELS[0]!r}")
    names = features.get(label.name, {}).get("names")
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return ParquetColumns(
        image=image.name,
        has_path=has_path,
        label=label.name,
        numbers=not _is_text(label.type),
        names=tuple(names) if names and is_list else None,
    )


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return Hugging Face's metadata of each column; an empty table if they cannot be read."""
    try:
        found = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, dict)}


def _find_field(
    known: tuple[str, ...],
    fields: dict[str, pa.Field],
    features: dict[str, dict[str, Any]],
    kind: str,
    fits: Callable[[pa.DataType], bool],
) -> pa.Field | None:
    """Return the field with a known name, else the only one that the features call `kind`."""
    fitting = [name for name, field in fields.items() if fits(field.type)]
    for name in known:
        if name in fitting:
            return fields[name]
    said = [name for name in fitting if features.get(name, {}).get("_type") == kind]
    if len(said) != 1 and kind == "Image":
        said = fitting
    return fields[said[0]] if len(said) == 1 else None


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in (pa.string(), pa.large_string())


def _holds_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        kind = kind.field(place).type if place >= 0 else pa.null()
    return kind in (pa.binary(), pa.large_binary())


class _LabelRows(NamedTuple):
    """Labels of some rows that follow each other in a file."""

    address: str
    first: int
    names: list[str]
    labels: Sequence[int | str | float | None] | None
    """Numbers from 0, or words; None without a label, a float that is no whole number. None where
    labels are not asked for."""
    columns: ParquetColumns


def is_parquet(source: str) -> bool:
    """Return whether a source is parquet files with images: a file, a folder, a glob or a range.

    The first file that can be read tells; if none can, they are taken for some.
    """
    if (files := find_files(source, ENDING)) is not None:
        known = map(_has_images, files.addresses)
        return next((found for found in known if found is not None), True)
    if is_remote(source) or not os.path.isfile(source):  # noqa: PTH113 - it may be a long range
        return False
    with Path(source).open("rb") as file:
        return file.read(4) == b"PAR1"


def _has_images(address: str) -> bool | None:
    """Return whether a file has a column of images; None if it cannot be read."""
    import pyarrow as pa

    try:
        file, _ = open_parquet(address)
    except Unreachable:
        raise
    except (pa.ArrowException, *DAMAGE):
        return None
    try:
        schema = file.schema_arrow
        fields = {field.name: field for field in schema}
        return _find_field(IMAGES, fields, _features(schema), "Image", _holds_bytes) is not None
    except (pa.ArrowException, *DAMAGE):
        return None
    finally:
        file.close(force=True)


def scan_parquet(
    source: str,
    writer: ListingWriter,
    split: str,
    classes: Sequence[str] | None,
    numbered: bool = False,
) -> Listing:
    """List the images of a source for which `is_parquet` holds; arguments as `scan_webdataset`.

    Raises:
        UsageError: a file lacks a column of images or labels; or as `LabelMapper.finish`.
        StoreError: the store does not return a file.
    """
    files = find_files(source, ENDING)
    addresses = (
        (str(Path(source).absolute()),) if files is None else select_split(files, split, source)
    )
    labels: LabelMapper | None = None
    names: tuple[str, ...] | None = None
    scan_file = partial(_scan_file, fields=writer.fields, labelled=writer.labelled)
    for rows in scan_each(addresses, scan_file, is_remote(source)):
        if isinstance(rows, DamagedSource):
            writer.container("parquet", rows.source)
            writer.add_fault(rows, rows.source)
            continue
        if rows.labels is None:
            places = range(rows.first, rows.first + len(rows.names))
            _add_members(rows, writer, "", rows.names, places)
            continue
        if labels is None:
            names = rows.columns.names
            labels = LabelMapper(source, names, classes, titles=names, numbered=numbered)
        if rows.columns.names != names:
            raise UsageError(
                f"parquet file {hide_credentials(rows.address)} names its classes differently from "
                f"{hide_credentials(addresses[0])}; take files of one set"
            )
        _add(rows, writer, labels)
    if not writer.labelled:
        return writer.finish()
    return (labels or LabelMapper(source, None, classes)).finish(writer)


def _add(rows: _LabelRows, writer: ListingWriter, labels: LabelMapper) -> None:
    classes, names, places = list[str](), list[str](), list[int]()
    assert rows.labels is not None
    for place, (name, label) in enumerate(zip(rows.names, rows.labels, strict=True), rows.first):
        if label is None or isinstance(label, float):
            what = "" if label is None else f": {label:g} is no whole number"
            writer.reject(f"{rows.address}/{name}", f"no label{what}")
            continue
        classes.append(labels.find_class(label, f"{rows.address} row {place}"))
        names.append(name)
        places.append(place)
    _add_members(rows, writer, classes, names, places)


def _add_members(
    rows: _LabelRows,
    writer: ListingWriter,
    classes: str | Sequence[str],
    names: Sequence[str],
    places: Sequence[int],
) -> None:
    """Add images with their members, which lie in the same rows."""
    members = [[(place, WHOLE_FILE)] * len(writer.fields) for place in places]
    container = writer.container("parquet", rows.address)
    writer.add(container, classes, names, places, members=members)


def _scan_file(
    address: str, fields: Sequence[str] = (), labelled: bool = True
) -> Iterator[_LabelRows | DamagedSource]:
    """Yield the labels of a file, `ROWS` at a time, and the damage of row groups or of all."""
    import pyarrow as pa

    try:
        yield from _read_rows(address, fields, labelled)
    except (pa.ArrowException, *DAMAGE) as error:
        refuse_other_errors(error)
        foreign = describe_foreign(read_small(address, 1 << 20) or b"")
        what = summarize_error(error)[:200] if foreign is None else f"it is {foreign}"
        yield _file_error(address, what)


def refuse_other_errors(error: Exception) -> None:
    """Raise an error that pyarrow handed on and that says nothing about the file."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, Unreachable) or number in SYSTEM_ERRORS:
        raise error


def _file_error(address: str, what: str, first: int = 0, rows: int = 0) -> DamagedSource:
    """Return the error for a file of which so many rows cannot be read, or no row (0)."""
    safe = hide_credentials(address)
    message = f"parquet file {safe} cannot be read ({what}); it must be whole"
    return DamagedSource(message, address, first, what, rows)


def _read_rows(
    address: str, fields: Sequence[str], labelled: bool
) -> Iterator[_LabelRows | DamagedSource]:
    file, _ = open_parquet(address)
    try:
        columns = find_columns(file, address, fields, labelled)
        wanted = [columns.label] if columns.label else []
        wanted += [f"{columns.image}.path"] if columns.has_path else []
        if not wanted:  # images alone: nothing of them is read yet
            count = file.metadata.num_rows
            for first in range(0, count, ROWS):
                rows = range(first, min(first + ROWS, count))
                yield _LabelRows(address, first, [f"row-{row:06d}" for row in rows], None, columns)
            return
        seen: set[int] = set()
        first = 0
        for group in range(file.metadata.num_row_groups):
            stop = first + file.metadata.row_group(group).num_rows
            for found in _read_group(file, address, group, wanted, first, stop):
                if isinstance(found, DamagedSource):
                    yield found
                    break
                at, batch = found
                names = _make_names(batch, columns, at, seen)
                labels = _read_labels(batch, columns) if columns.label else None
                yield _LabelRows(address, at, names, labels, columns)
            first = stop
    finally:
        file.close(force=True)


def _read_group(
    file: pq.ParquetFile, address: str, group: int, columns: list[str], first: int, stop: int
) -> Iterator[tuple[int, pa.RecordBatch] | DamagedSource]:
    """Yield the batches of a row group, each with its first row; last its damage, if any."""
    import pyarrow as pa

    try:
        for batch in file.iter_batches(ROWS, [group], columns, use_threads=False):
            yield first, batch
            first += batch.num_rows
        what = f"its row group ends at row {first}, not at {stop}"
    except (pa.ArrowException, *DAMAGE) as error:
        refuse_other_errors(error)
        what = f"row group {group}: {summarize_error(error)[:200]}"
    if first != stop:
        yield _file_error(address, what, first, max(0, stop - first))


def _read_labels(
    batch: pa.RecordBatch, columns: ParquetColumns
) -> Sequence[int | str | float | None]:
    import pyarrow as pa

    column = batch.column(batch.schema.get_field_index(columns.label))
    if columns.numbers:
        kind = pa.float64() if pa.types.is_floating(column.type) else pa.int64()
        numbers = column.cast(kind).fill_null(-1).to_pylist()
        return [_whole_number(number) for number in numbers]
    return [_to_word(word or "") for word in column.to_pylist()]


def _whole_number(value: int | float) -> int | float | None:
    """Return a number from 0 as an integer; data frames turn a column with a gap into floats."""
    if not 0 <= value < 1e18:  # NaN, too
        return None
    return int(value) if value % 1 == 0 else value


def _to_word(text: str) -> str | None:
    """Return a label that is a text; `3.0` as `3`, which is what a column of numbers would have."""
    number = parse_text(text)
    return str(number) if isinstance(number, int) and "." in text else text.strip() or None


def _make_names(
    batch: pa.RecordBatch, columns: ParquetColumns, first: int, seen: set[int]
) -> list[str]:
    """Return unique names of rows: the path beside the image, or else the row's number."""
    paths: list[str | None] = [None] * batch.num_rows
    if columns.has_path:
        image = batch.column(batch.schema.get_field_index(columns.image))
        paths = image.flatten()[0].to_pylist()
    names = []
    for row, path in enumerate(paths, first):
        name = escape(path)[-LONGEST_NAME:] if path else f"row-{row:06d}"
        if hash(name) in seen:
            name = f"{name} (row {row})"
        seen.add(hash(name))
        names.append(name)
    return names
