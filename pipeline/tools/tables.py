"""Tables of facts about samples: CSV, TSV, JSON lines and Parquet, as columns of NumPy arrays."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.tools.errors import UsageError
from pipeline.tools.jsonl import read_all_rows
from pipeline.tools.packages import require_package


def read_table(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read the columns of a table: CSV or TSV with a first line of names, JSON lines, or Parquet.

    Columns of numbers become int64 or float64, all others text.

    Raises:
        UsageError: it cannot be read, or has no row.
        SetupError: a package for it is missing.
    """
    try:
        columns = {
            name: np.asarray(column).astype(str) if name in ("key", "name") else _to_array(column)
            for name, column in _READERS.get(path.suffix, _read_csv)(path)
        }
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"table {path} cannot be read ({error}); name another file") from error
    if not columns or not all(map(len, columns.values())):
        raise UsageError(f"table {path} has no row; name another file")
    return columns


def _read_csv(path: Path) -> Iterable[tuple[str, Sequence[Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    for number, row in enumerate(rows, 1):
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


def _to_array(column: Sequence[Any]) -> npt.NDArray[Any]:
    """Return a column as int64, float64 or text."""
    array = np.asarray(column)
    if array.dtype.kind in "biu":
        return array.astype(np.int64)
    if array.dtype.kind == "f":
        return array.astype(np.float64)
    array = array.astype(str)
    if not (np.char.find(array, "_") >= 0).any():  # Python takes 1_0 for a number
        for kind in (np.int64, np.float64):
            with contextlib.suppress(ValueError, OverflowError):
                return array.astype(kind)
    return array
