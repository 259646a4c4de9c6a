"""Tables of facts about samples: CSV, TSV, JSON lines and Parquet, as columns of NumPy arrays."""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.tools.errors import UsageError
from pipeline.tools.jsonl import read_all_rows
from pipeline.tools.packages import require_package


def read_table(path: Path, texts: Collection[str] = ()) -> dict[str, npt.NDArray[Any]]:
    """Read the columns of a table: CSV or TSV with a first line of names, JSON lines, or Parquet.

    Columns of numbers become int64, or float64 with NaN where a value is missing; all others text,
    as it is written. Text is a number only if no two different texts are the same one: not 1.1 and
    1.10, and not 007.

    Args:
        path: the table; its ending says what it is.
        texts: names of columns that stay text, besides `key` and `name`.

    Raises:
        UsageError: it cannot be read, or has no row.
        SetupError: a package for it is missing.
    """
    try:
        columns = {
            name: _to_texts(column) if name in ("key", "name", *texts) else _to_array(column)
            for name, column in _READERS.get(path.suffix, _read_csv)(path)
        }
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"table {path} cannot be read ({error}); name another file") from error
    if not columns or not all(map(len, columns.values())):
        raise UsageError(f"table {path} has no row; name another file")
    return columns


def refuse_masked(what: str, values: Any) -> None:
    """Refuse a masked array, whose mask NumPy drops where it makes a plain one.

    Raises:
        UsageError: it is one, and some values are masked.
    """
    if np.ma.is_masked(values):
        raise UsageError(
            f"{what} has masked values; say what they stand for, as by {what}.filled(0)"
        )


def _read_csv(path: Path) -> Iterable[tuple[str, Sequence[Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    for number, row in enumerate(rows, 1):
        if len(set(rows[0])) < len(rows[0]):
            raise ValueError(f"its first line names a column twice: {', '.join(rows[0])}")
        if len(row) != len(rows[0]):
            raise ValueError(f"line {number} has {len(row)} values, the first {len(rows[0])}")
    return zip(rows[0], zip(*rows[1:], strict=True), strict=False) if rows else ()


def _read_jsonl(path: Path) -> Iterable[tuple[str, Sequence[Any]]]:
    rows = list(read_all_rows(path))
    for number, row in enumerate(rows, 1):
        if row.keys() != rows[0].keys():
            raise ValueError(f"line {number} has other names than the first")
    return ((name, [row[name] for row in rows]) for name in (rows[0] if rows else ()))


def _read_parquet(path: Path) -> Iterable[tuple[str, Sequence[Any]]]:
    require_package("pyarrow", "parquet", f"table {path}")
    import pyarrow as pa  # here: an optional package
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        return [(name, table[name].to_numpy()) for name in table.column_names]
    except pa.ArrowException as error:
        raise ValueError(str(error).splitlines()[0]) from error


_READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _to_texts(column: Sequence[Any]) -> npt.NDArray[Any]:
    """Return a column as text; what is missing is empty."""
    return np.array(["" if value is None else str(value) for value in column])


def _to_array(column: Sequence[Any]) -> npt.NDArray[Any]:
    """Return a column as int64, float64 or text."""
    array = np.asarray(column)
    if array.dtype.kind in "biu":
        return array.astype(np.int64)
    if array.dtype.kind == "f":
        return array.astype(np.float64)
    texts = _to_texts(column)
    known = np.unique(texts)
    with contextlib.suppress(ValueError, OverflowError):
        if [str(int(text)) for text in known.tolist()] == known.tolist():
            return texts.astype(np.int64)
    with contextlib.suppress(ValueError):
        filled = np.where(texts == "", "nan", texts)
        numbers = filled.astype(np.float64)
        is_written = re.search(r"_|(^|\s)[+-]?0\d", " ".join(known.tolist())) is None  # 1_0, 007
        if is_written and len(np.unique(numbers)) == len(np.unique(filled)):
            return numbers
    return texts
