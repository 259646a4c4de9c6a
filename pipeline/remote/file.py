"""A file in a store, read like a local one: in large blocks ahead of need, and tried again.

A store is any address that fsspec knows. Reading forward asks for growing blocks and has the next
one under way while the last is used; reading here and there asks for just what is wanted.
"""

from __future__ import annotations

import contextlib
import errno
import io
import tempfile
from typing import IO, Any

from pipeline.remote.filesystem import (
    BackgroundCall,
    RetryPolicy,
    TransferError,
    Unreachable,
    open_filesystem,
    retry,
)
from pipeline.tools.errors import SetupError

__all__ = ["RemoteFile", "Unreachable", "open_filesystem", "retry"]

SMALLEST, LARGEST = 1 << 16, 1 << 22
"""Bytes of a block: doubled with each one that follows the last, for reading forward."""
NEAR = 1 << 20
"""A read this close behind the last block goes on forward: a request costs more than the gap."""
AHEAD = 1 << 19
"""From blocks of this size on, the next one is fetched while the last is in use."""


class RemoteFile(io.RawIOBase):
    """A file in a store that can be read at any place.

    A server that cannot give parts of a file gives it whole, into a temporary file without a name.
    """

    def __init__(self, address: str, policy: RetryPolicy | None = None) -> None:
        """Ask for the size of the file.

        Raises:
            UsageError, SetupError: as `file_system`.
            Unreachable: it is not there, or the store does not answer.
        """
        super().__init__()
        self._address, self._policy = address, policy or RetryPolicy()
        self._system, self._path = open_filesystem(address, self._policy)
        self._blocks: list[tuple[int, bytes]] = []
        """The last two blocks and where they begin: what is read goes a little back and forth."""
        self._coming: tuple[int, int, BackgroundCall[bytes]] | None = None
        self._place, self._length = 0, SMALLEST // 2
        self._whole: IO[bytes] | None = None
        size = retry(self._look, address, self._policy)
        if size is None:
            self._whole = retry(self._fetch_whole, address, self._policy, watched=False)
            size = self._whole.seek(0, io.SEEK_END)
        self.size = size
        """Bytes of the file."""

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Return the place of the next read."""
        return self._place

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; nothing is sent."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size}[whence]
        self._place = max(0, base + place)
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Read at most `len(buffer)` bytes, fewer only at the end of the file."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def read(self, count: int | None = -1, /) -> bytes:
        """Return `count` bytes, fewer only at the end of the file, and all that follow if -1.

        Raises:
            Unreachable: the store did not give them, after all tries.
        """
        left = max(0, self.size - self._place)
        count = left if count is None or count < 0 else min(count, left)
        start, end = self._place, self._place + count
        parts = []
        while self._place < end:
            base, block = self._block(self._place, end - self._place)
            part = block[self._place - base : end - base]
            parts.append(part)
            self._place += len(part)
        self._place = start + count
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Let go of what was read; a request under way ends by itself."""
        self._blocks.clear()
        self._coming = None
        if self._whole is not None:
            self._whole.close()
        super().close()

    def _block(self, place: int, count: int) -> tuple[int, bytes]:
        """Return a block that holds at least the byte at `place`, and where it begins."""
        if self._whole is not None:
            self._whole.seek(place)
            return place, self._whole.read(count)
        for base, block in reversed(self._blocks):
            if base <= place < base + len(block):
                return base, block
        last = self._blocks[-1][0] + len(self._blocks[-1][1]) if self._blocks else 0
        if 0 <= place - last <= NEAR:
            self._length = min(2 * self._length, LARGEST)
            found = self._forward(place, last)
        else:
            self._length, self._coming = SMALLEST // 2, None
            found = place, self._get(place, min(place + max(count, SMALLEST), self.size))
        self._blocks = [*self._blocks[-1:], found]
        return found

    def _forward(self, place: int, last: int) -> tuple[int, bytes]:
        """Return the block after the last one, and have the next on its way."""
        found = None
        if self._coming is not None:
            start, end, call = self._coming
            if start <= place < end:
                # What went wrong ahead of need is tried anew below.
                with contextlib.suppress(Exception):
                    found = start, call.result(4 * self._policy.stall)
        if found is None:
            start = last if place - last < self._length else place
            found = start, self._get(start, min(start + self._length, self.size))
        start = found[0] + len(found[1])
        end = min(start + min(2 * self._length, LARGEST), self.size)
        self._coming = None
        if self._length >= AHEAD and start < end:
            self._coming = start, end, BackgroundCall(lambda: self._get_once(start, end))
        return found

    def _get(self, start: int, end: int) -> bytes:
        return retry(lambda: self._get_once(start, end), self._address, self._policy)

    def _get_once(self, start: int, end: int) -> bytes:
        data: bytes = self._system.cat_file(self._path, start=start, end=end)
        if len(data) != end - start:
            raise TransferError(f"{len(data)} bytes came, not {end - start}")
        return data

    def _look(self) -> int | None:
        """Return the size, or None if the file is to be had only from its beginning."""
        if not self._path.startswith(("http://", "https://")):
            return int(self._system.info(self._path)["size"])
        try:
            file = self._system.open(self._path, "rb", cache_type="none")
        except FileNotFoundError as error:  # whatever the server answered
            raise error.__cause__ or error from None
        with file:
            if not getattr(file, "size", None):
                return None
            size = int(file.size)
            try:
                file.seek(size - 1)
                return size if len(file.read(1)) == 1 else None
            except ValueError:  # "doesn't appear to support range requests"
                return None

    def _fetch_whole(self) -> IO[bytes]:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this object
        try:
            with self._system.open(self._path, "rb", block_size=0) as source:
                while data := source.read(1 << 20):
                    file.write(data)
        except BaseException as error:
            file.close()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise SetupError(
                    f"no space left in {tempfile.gettempdir()} for {self._address}, which its "
                    "server gives only whole; free some, or name another folder with TMPDIR"
                ) from error
            raise
        return file
