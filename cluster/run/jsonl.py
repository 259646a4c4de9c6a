"""Files of rows that survive a disk that is full, or away for a while."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.tools.errors import SetupError
from pipeline.tools.files import atomic_write, sync_folder

MOST = 1 << 22
"""Bytes of rows kept in memory before they are put on the disk without being asked."""
WAITS = ("wait_storage", "wait_feed", "wait_decode", "wait_transfer")
"""Seconds of a step's waiting for data, by what was not ready: the disk or the store; checksums,
order and draws; pixels; and their way to where the network computes."""
STEP = re.compile(rb'"step": (\d+)[,}]')


class Rows:
    """A file to which rows are added, a line of JSON each; one process writes it.

    Rows stay in memory until they are known to be on the disk, not only given to the system: what
    it does not take, or loses, is written in its turn when it takes it again. No row is lost,
    doubled or left half written. `sync` says whether all are there.
    """

    def __init__(self, path: Path, step: int, warn: Callable[[str], None]) -> None:
        """Open the file, first cutting off rows after `step`.

        Args:
            path: of the file.
            step: the last whose rows are kept.
            warn: gets a line when trouble begins, and when it is over.

        Raises:
            SetupError: the file cannot be opened, or cut.
        """
        self._path, self._warn = path, warn
        try:
            cut_rows(path, step)
            self._file = _open(path)
            os.fsync(self._file)
            sync_folder(path.parent)
        except OSError as error:
            raise SetupError(
                f"{path} cannot be written ({error.strerror}); make room, or bring its disk back"
            ) from error
        self._safe = self._size = os.fstat(self._file).st_size
        """Bytes of the file that are on the disk, and of whole rows in it."""
        self._rows: list[bytes] = []
        """What is not safe; the first `_given` of them are in the file."""
        self._given = self._bytes = 0
        self._torn = self._troubled = False

    def add(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self._rows.append((json.dumps(row) + "\n").encode())
        self._bytes += len(self._rows[-1])
        try:
            if self._troubled or self._bytes > MOST:
                self._settle()
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
        """Give the system what it has not got yet.

        Raises:
            OSError: it does not take all of it; no half row is left behind.
        """
        self._mend()
        while self._given < len(self._rows):
            left = line = self._rows[self._given]
            self._torn = True
            try:
                while left:
                    left = left[os.write(self._file, left) :]
            except OSError:
                with suppress(OSError):  # or before the next row
                    self._mend()
                raise
            self._torn = False
            self._size += len(line)
            self._given += 1

    def _mend(self) -> None:
        """Cut off half a row, if there is one."""
        if self._torn:
            os.ftruncate(self._file, self._size)
            self._torn = False

    def _settle(self) -> None:
        """Put all rows on the disk, under the name they are looked for.

        Raises:
            OSError: it does not take them, or the name is gone with its folder.
        """
        self._follow()
        self._write()
        try:
            os.fsync(self._file)
        except OSError:
            # What was given is dropped, and the next fsync would not say so: give it again.
            self._size, self._given, self._torn = self._safe, 0, True
            raise
        self._safe = self._size
        self._rows.clear()
        self._given = self._bytes = 0
        if self._troubled:
            self._troubled = False
            self._warn(f"{self._path} can be written again; no row is lost")

    def _follow(self) -> None:
        """Make sure that the open file is the one of that name: it may have been deleted."""
        mine = os.fstat(self._file)
        try:
            there = self._path.stat()
        except FileNotFoundError:
            there = None
        if there is not None and (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
            return
        with atomic_write(self._path) as copy:
            at = 0
            while part := os.pread(self._file, min(1 << 20, self._size - at), at):
                copy.write(part)
                at += len(part)
        os.close(self._file)
        self._file = _open(self._path)

    def sync(self) -> None:
        """Put all rows on the disk.

        Raises:
            SetupError: it does not take them.
        """
        try:
            self._settle()
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


def cut_rows(path: Path, step: int) -> None:
    """Shorten a file of rows so that none is after `step`, nor half written.

    One truncation: whoever reads meanwhile sees whole rows only, and a crash leaves the old
    file or the new one.
    """
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            row = _step_of(line)
            if row is None or row > step:
                break
            end += len(line)
    os.truncate(path, end)


def _step_of(line: bytes) -> int | None:
    """Step of a whole row; None for anything else."""
    # Millions of rows are looked at before a start: what a crash may leave is seen without parsing.
    whole = line[:1] == b"{" and line.endswith(b"}\n") and b"\0" not in line
    if whole and (found := STEP.search(line)):
        return int(found[1])
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def read_tail(path: Path, most: int) -> Iterator[dict[str, Any]]:
    """Yield the last rows of a file, oldest first; what is half written or no row is left out."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - most * 600))
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines[-most:]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row
