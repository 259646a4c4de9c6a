"""Which columns of a parquet file hold pictures and labels, in the layouts of Hugging Face.

Pictures are a column `struct<bytes: binary, path: string>` or plain `binary`; labels are numbers,
whose names the schema's metadata may hold (`ClassLabel`), or text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.remote.download import Policy
from pipeline.sources.paths import is_remote, open_file
from pipeline.stores.errors import without_secrets
from pipeline.tools.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixels")
LABELS = ("label", "labels", "fine_label", "cls", "class", "class_id", "target")

BUFFER = 1 << 20
"""Bytes of a column that are read at a time; without it, a column of a row group is read whole."""
LARGEST_FOOTER = 1 << 30
"""Bytes of strings and lists in the schema and the row groups, once parsed."""


DAMAGE = (OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError)
"""What pyarrow raises over damaged files, besides its own `ArrowException`: found by turning over
bytes of good ones."""


@dataclass(frozen=True)
class Columns:
    """Where a file keeps what is wanted."""

    image: str
    in_struct: bool
    """The column is `struct<bytes, ...>`, not the bytes themselves."""
    has_path: bool
    """The struct has a `path` that is text."""
    label: str
    numbers: bool
    """Labels are whole numbers, not text."""
    names: tuple[str, ...] | None
    """Names of the numbers, where the file has them."""


def in_a_line(error: BaseException) -> str:
    """Return the first line of what pyarrow says."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def opened(address: str, policy: Policy | None = None) -> Iterator[pq.ParquetFile]:
    """Open a parquet file of a disk or a store.

    Raises:
        OSError: it cannot be read; of a store, `Unreachable`.
        pyarrow.ArrowException, or one of `DAMAGE`: it is none, or damaged.
    """
    file = open_parquet(address, policy)
    try:
        yield file
    finally:
        file.close(force=True)


def open_parquet(address: str, policy: Policy | None = None) -> pq.ParquetFile:
    """As `opened`, for as long as the caller wants it."""
    import pyarrow.parquet as pq

    source: Any = open_file(address, policy) if is_remote(address) else address
    return pq.ParquetFile(
        source,
        buffer_size=BUFFER,
        pre_buffer=False,  # it would keep every column it has read
        thrift_string_size_limit=LARGEST_FOOTER,
    )


def find_columns(file: pq.ParquetFile, address: str) -> Columns:
    """Say which columns are pictures and labels.

    Raises:
        UsageError: there are none; the message lists those that are there.
    """
    schema = file.schema_arrow
    features = _features(schema)
    fields = {field.name: field for field in schema}
    image = _first(IMAGES, fields, features, "Image", _holds_bytes)
    label = _first(LABELS, fields, features, "ClassLabel", _is_label)
    if image is None or label is None:
        lacks = "pictures (struct<bytes, path> or binary)" if image is None else "labels"
        known = IMAGES if image is None else LABELS
        # The type of a column may be as long as its writer wants.
        there = ", ".join(f"{field.name} ({str(field.type)[:60]})" for field in schema)[:300]
        raise UsageError(
            f"parquet file {without_secrets(address)} has no column of {lacks}, such as "
            f"{known[0]!r}; its columns: {there!r}"
        )
    struct = image.type if _is_struct(image.type) else None
    path = struct is not None and struct.get_field_index("path") >= 0
    names = features.get(label.name, {}).get("names")
    return Columns(
        image=image.name,
        in_struct=struct is not None,
        has_path=path and _is_text(struct.field("path").type) if struct is not None else False,
        label=label.name,
        numbers=not _is_text(label.type),
        names=_texts(names),
    )


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return what Hugging Face's metadata say of each column; nothing if they cannot be read."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, dict)}


def _first(known: tuple[str, ...], fields: Any, features: Any, kind: str, fits: Any) -> Any:
    """Return the field with a known name, else the only one that its features call `kind`."""
    for name in known:
        if name in fields and fits(fields[name].type):
            return fields[name]
    said = [name for name, value in features.items() if value.get("_type") == kind]
    said = [name for name in said if name in fields and fits(fields[name].type)]
    if len(said) != 1 and kind == "Image":
        said = [name for name, field in fields.items() if fits(field.type)]
    return fields[said[0]] if len(said) == 1 else None


def _is_struct(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _holds_bytes(kind: pa.DataType) -> bool:
    if _is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_bytes(kind.field(place).type)
    return _is_bytes(kind)


def _is_label(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind)) or _is_text(kind)


def _texts(names: object) -> tuple[str, ...] | None:
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None
