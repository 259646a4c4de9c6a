"""A file that is read once: its hash and any part of it, from one pass over its bytes."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

HELD = 64 * 2**20
"""Files up to this size are held in memory. Of larger ones the parts are read again, out of the
kernel's cache, where the pass for the hash has just put them."""


class WholeFile:
    """`with WholeFile(path) as file: file.sha256; file.read(512, 100)`."""

    def __init__(self, path: Path) -> None:
        """Read and hash a file.

        Raises:
            OSError: it cannot be opened. What cannot be read of it shows in `error` and `read`.
        """
        self._file = path.open("rb", buffering=0)
        self.size = os.fstat(self._file.fileno()).st_size
        self.sha256: str | None = None
        """In hexadecimal; None where some of the file cannot be read."""
        self.error: OSError | None = None
        self._data: bytes | None = None
        try:
            if self.size <= HELD:
                self._data = self._file.readall()
                self.sha256 = hashlib.sha256(self._data).hexdigest()
            else:
                self.sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
        except OSError as error:
            self.error = error

    def read(self, offset: int, size: int) -> bytes | memoryview:
        """Return `size` bytes at `offset`, fewer where the file ends.

        Raises:
            OSError: a bad sector.
        """
        if self._data is not None:
            return memoryview(self._data)[offset : offset + size]
        size = min(size, self.size - offset)
        return os.pread(self._file.fileno(), size, offset) if size > 0 else b""

    def stream(self) -> BinaryIO:
        """Return the file from its beginning, to be read and seeked in."""
        if self._data is not None:
            return io.BytesIO(self._data)
        self._file.seek(0)
        return self._file

    def __enter__(self) -> WholeFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
