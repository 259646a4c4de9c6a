"""JSON of a file, and JSON lines: files of one JSON object a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def parse_json(text: str | bytes) -> Any:
    """Return what JSON from outside holds.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a value's JSON, whatever the order of its keys and its blanks."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def parse_rows(lines: Iterable[bytes]) -> Iterator[Row | None]:
    """Yield the object of each line; None for a line without one (half a row, other JSON)."""
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        yield row if isinstance(row, dict) else None


def read_all_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, whose every line must be one.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not a row; the message has its number.
    """
    with path.open("rb") as file:
        for number, row in enumerate(parse_rows(file), 1):
            if row is None:
                raise ValueError(f"line {number} is not a JSON object")
            yield row
