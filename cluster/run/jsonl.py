"""JSON-lines files: a writer that survives a full or absent disk, and the readers."""

from __future__ import annotations

import bisect
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.tools.errors import SetupError, refuse_forbidden
from pipeline.tools.files import atomic_write, sync_path
from pipeline.tools.jsonl import Row, parse_rows

MOST_ROW = 1200
"""Bytes that no row of a run is as long as."""
MOST = 1 << 22
"""Bytes of rows kept in memory before an unrequested sync to disk."""
WAITS = ("wait_storage", "wait_feed", "wait_decode", "wait_transfer")
"""Fields with the seconds that a step waited for data: for the disk or the store; for checksums,
order and random draws; for decoded pixels; and for their transfer to the network's device."""


class Rows:
    """Appends rows to a file, a line of JSON each; one process writes it.

    Rows stay in memory until fsync has confirmed them: what the system refuses or loses is written
    again, in order, when it accepts writes again. No row is lost, doubled or left half written.
    `sync` raises unless all rows are on disk.
    """

    def __init__(self, path: Path, step: int, warn: Callable[[str], None]) -> None:
        """Open the file, first cutting off rows after `step`.

        Args:
            path: path of the file.
            step: last step whose rows are kept.
            warn: receives a line when writing begins to fail, when it works again, and about
                damaged rows.

        Raises:
            SetupError: the file cannot be opened, or cut.
        """
        self._path, self._warn = path, warn
        try:
            cut_rows(path, step, warn)
            self._file = _open(path)
            os.fsync(self._file)
            sync_path(path.parent)
        except OSError as error:
            raise SetupError(
                f"{path} cannot be written ({error.strerror}); make room, or bring its disk back"
            ) from error
        self._safe = self._size = os.fstat(self._file).st_size
        """Bytes of the file that are on disk, and bytes of whole rows in it."""
        self._rows: list[bytes] = []
        """Rows not confirmed yet; the first `_given` of them are in the file."""
        self._given = self._bytes = 0
        self._torn = self._troubled = False

    def add(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self._rows.append((json.dumps(row) + "\n").encode())
        self._bytes += len(self._rows[-1])
        try:
            if self._troubled or self._bytes > MOST:
                self._flush()
            else:
                self._write()
        except OSError as error:
            if not self._troubled:
                self._warn(
                    f"{self._path} cannot be written ({error.strerror}); its rows are kept in "
                    "memory until it can"
                )
            self._troubled = True

    def _write(self) -> None:
        """Write the rows that are not in the file yet.

        Raises:
            OSError: the system refuses some of them; no half row is left behind.
        """
        self._truncate_torn()
        while self._given < len(self._rows):
            left = line = self._rows[self._given]
            self._torn = True
            try:
                while left:
                    left = left[os.write(self._file, left) :]
            except OSError:
                with suppress(OSError):  # or before the next row
                    self._truncate_torn()
                raise
            self._torn = False
            self._size += len(line)
            self._given += 1

    def _truncate_torn(self) -> None:
        """Truncate half a row, if there is one."""
        if self._torn:
            os.ftruncate(self._file, self._size)
            self._torn = False

    def _flush(self) -> None:
        """Write and fsync all rows, to the file of that name.

        Raises:
            OSError: the disk refuses them, or the folder is gone.
        """
        self._reopen_if_replaced()
        self._write()
        try:
            os.fsync(self._file)
        except OSError:
            # The kernel dropped what was written, and the next fsync would not say so: rewrite.
            self._size, self._given, self._torn = self._safe, 0, True
            raise
        self._safe = self._size
        self._rows.clear()
        self._given = self._bytes = 0
        if self._troubled:
            self._troubled = False
            self._warn(f"{self._path} can be written again; no row is lost")

    def _reopen_if_replaced(self) -> None:
        """Copy the rows to a new file if the open one was deleted or replaced."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file), self._path.stat()):
                return
        with atomic_write(self._path) as copy:
            at = 0
            while part := os.pread(self._file, min(1 << 20, self._size - at), at):
                at += copy.write(part)
        os.close(self._file)
        self._file = _open(self._path)

    def sync(self) -> None:
        """Write and fsync all rows.

        Raises:
            SetupError: the disk refuses them.
        """
        try:
            self._flush()
        except OSError as error:
            missing = len(self._rows) - self._given
            raise SetupError(
                f"{self._path} lacks {f'{missing} ' if missing else ''}rows ({error.strerror}); "
                "make room, or bring its disk back"
            ) from error

    def close(self) -> None:
        """Close the file; call `sync` first."""
        os.close(self._file)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)


def cut_rows(path: Path, step: int, warn: Callable[[str], None]) -> None:
    """Truncate a file of rows behind the last row up to `step`.

    What lies before that row stays, also rows that cannot be read or are out of order: a damaged
    byte costs the row that it is in, not those after it. A single truncation: concurrent readers
    see whole rows only, and a crash leaves the old file or the new one.

    Args:
        path: the file; a missing one stays missing.
        step: last step whose rows are kept.
        warn: receives a line if rows that stay are damaged.
    """
    if not path.exists():
        return
    steps, ends = array("q"), array("q")
    end = 0
    with path.open("rb") as file:
        for line in file:
            end += len(line)
            steps.append(_parse_step(line))
            ends.append(end)
    in_order = find_ordered(steps)
    last = next((place for place in reversed(in_order) if steps[place] <= step), -1)
    damaged = sorted(set(range(last + 1)).difference(in_order))
    os.truncate(path, ends[last] if last >= 0 else 0)
    if damaged:
        warn(
            f"{path} has {len(damaged)} damaged row{'s' if len(damaged) > 1 else ''}, first in "
            f"line {damaged[0] + 1}; it stays, and so do the others"
        )


def append_row(path: Path, step: int, row: Row) -> None:
    """Add the row of a step to a file that no `Rows` has open, unless it is there.

    Raises:
        OSError: the file cannot be written.
    """
    cut_rows(path, step, lambda _: None)
    if next(iter(read_tail(path, 1)), {}).get("step") != step:
        with path.open("ab") as file:
            file.write((json.dumps(row) + "\n").encode())


def _parse_step(line: bytes) -> int:
    """Return the step of a whole row; -1 for anything else."""
    row = next(parse_rows([line])) if line.endswith(b"\n") else None
    step = row.get("step") if row else None
    return step if type(step) is int and 0 <= step < 2**62 else -1


def find_ordered(steps: Sequence[int]) -> Sequence[int]:
    """Return the places of a longest series of steps that do not decrease; -1: no step.

    A step that is out of order was damaged itself, so it says nothing about the others.
    """
    places = [place for place, step in enumerate(steps) if step >= 0]
    if all(steps[one] <= steps[next_] for one, next_ in pairwise(places)):
        return places
    tops: list[int] = []
    """The lowest step that a series of each length can end with; `ends` has its place."""
    ends: list[int] = []
    before: dict[int, int] = {}
    for place in places:
        length = bisect.bisect_right(tops, steps[place])
        before[place] = ends[length - 1] if length else -1
        tops[length : length + 1] = [steps[place]]
        ends[length : length + 1] = [place]
    found, place = [], ends[-1]
    while place >= 0:
        found.append(place)
        place = before[place]
    return found[::-1]


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file in order; skips half-written ones. No file: no rows.

    Raises:
        OSError: the file cannot be read.
    """
    with suppress(FileNotFoundError), path.open("rb") as file:
        yield from _drop_none(parse_rows(line for line in file if line.endswith(b"\n")))


def read_tail(path: Path, most: int) -> Iterator[Row]:
    """Yield the last rows of a file, oldest first; skips half-written ones. No file: no rows.

    Raises:
        SetupError: the file is there and may not be read.
    """
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - (most + 1) * MOST_ROW))
            whole, _, _ = file.read().rpartition(b"\n")  # the last row may be half written
            lines = whole.splitlines()
    except OSError as error:
        refuse_forbidden(error)
        return
    yield from _drop_none(parse_rows(lines[-most:]))


def _drop_none(rows: Iterable[Row | None]) -> Iterator[Row]:
    return (row for row in rows if row is not None)


def count_rows(path: Path) -> int:
    """Return the number of rows in a file; 0 if there is no such file."""
    count = 0
    with suppress(OSError), path.open("rb") as file:
        while part := file.read(1 << 20):
            count += part.count(b"\n")
    return count
