"""Files of rows that survive a disk that is full, or away for a while."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import SetupError


class Rows:
    """A file to which rows are added, a line of JSON each; one process writes it.

    What the disk does not take is kept in memory, and written in its turn when the disk takes it
    again: no row is lost, doubled or left half written. `sync` says whether all are there.
    """

    def __init__(self, path: Path, step: int, warn: Callable[[str], None]) -> None:
        """Open the file, first cutting off rows after `step`.

        Args:
            path: of the file.
            step: the last whose rows are kept.
            warn: gets a line when trouble begins, and when it is over.
        """
        cut(path, step)
        self._path, self._warn = path, warn
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = os.fstat(self._file).st_size
        self._waiting: list[bytes] = []
        self._troubled = False

    def add(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self._waiting.append((json.dumps(row) + "\n").encode())
        try:
            self._write()
        except OSError as error:
            if not self._troubled:
                self._warn(
                    f"{self._path} cannot be written ({error.strerror}); its rows are kept in "
                    "memory until it can"
                )
            self._troubled = True

    def _write(self) -> None:
        """Write what is waiting.

        Raises:
            OSError: the disk does not take all of it.
        """
        while self._waiting:
            line = self._waiting[0]
            try:
                written = os.write(self._file, line)
                if written < len(line):
                    os.write(self._file, line[written:])  # says why not all of it
            except OSError:
                os.ftruncate(self._file, self._size)
                raise
            self._size += len(line)
            self._waiting.pop(0)
        if self._troubled:
            self._troubled = False
            self._warn(f"{self._path} can be written again; no row is lost")

    def sync(self) -> None:
        """Put all rows on the disk.

        Raises:
            SetupError: it does not take them.
        """
        try:
            self._write()
            os.fsync(self._file)
        except OSError as error:
            raise SetupError(
                f"{self._path} lacks {len(self._waiting)} rows ({error.strerror}); make room, or "
                "bring its disk back"
            ) from error

    def close(self) -> None:
        """Close the file; call `sync` first."""
        os.close(self._file)


def cut(path: Path, step: int) -> None:
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
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
