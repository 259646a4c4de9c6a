"""A remote file with the interface of a local one: read in blocks, with read-ahead and retries.

Sequential reads request growing blocks, the next one while the last is in use; random reads request
just the bytes that are wanted.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable
from typing import IO, Any, TypeVar

from pipeline.remote.answers import TransferError
from pipeline.remote.filesystem import (
    Client,
    RetryPolicy,
    Unreachable,
    check_address,
    is_web,
    retry,
    temporary_space,
)
from pipeline.tools.watchdog import BackgroundCall

SMALLEST, LARGEST = 1 << 16, 1 << 22
"""Bytes of a block; doubled with each one that follows the last."""
NEAR = 1 << 20
"""Bytes: a read this close behind the last block is sequential, as a request costs more than the
gap."""
READ_AHEAD = 1 << 19
"""Bytes: from blocks of this size on, the next one is requested while the last is in use."""

T = TypeVar("T")


class RemoteFile(io.RawIOBase):
    """A seekable file in a store.

    From a server without range requests the whole file is downloaded into a temporary one.
    """

    def __init__(self, address: str, policy: RetryPolicy | None = None) -> None:
        """Request the size of the file.

        Raises:
            UsageError, SetupError: as `check_address`.
            Unreachable: it is not there, or the store does not answer.
        """
        super().__init__()
        check_address(address, "source", chain=False)
        self._address, self._policy = address, policy or RetryPolicy()
        self._client = Client(address, self._policy)
        self._blocks: list[tuple[int, bytes]] = []
        """Offset and bytes of the last two blocks: readers go a little back and forth."""
        self._next: tuple[int, int, BackgroundCall[bytes]] | None = None
        """Begin and end of the block that is read ahead, and its request."""
        self._offset, self._length = 0, SMALLEST // 2
        self._whole: IO[bytes] | None = None
        size = self._retry(self._request_size)
        if size is None:
            self._whole = self._retry(self._download_whole, watched=False)
            size = self._whole.seek(0, io.SEEK_END)
        self.size = size
        """Size of the file in bytes."""

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the offset of the next read in bytes."""
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the offset of the next read; nothing is requested."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self.size}[whence]
        self._offset = max(0, base + offset)
        return self._offset

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, less of it only at the end of the file; return the number of bytes."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def read(self, count: int | None = -1, /) -> bytes:
        """Return `count` bytes, fewer only at the end of the file; all that follow if it is -1.

        Raises:
            Unreachable: the store did not give them, after all tries.
        """
        left = max(0, self.size - self._offset)
        end = self._offset + (left if count is None or count < 0 else min(count, left))
        parts = []
        while self._offset < end:
            base, block = self._block(self._offset, end - self._offset)
            parts.append(block[self._offset - base : end - base])
            self._offset += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Free all memory and files; a request under way ends by itself."""
        self._blocks.clear()
        self._next = None
        if self._whole is not None:
            self._whole.close()
        super().close()

    def _block(self, offset: int, count: int) -> tuple[int, bytes]:
        """Return offset and bytes of a block that holds at least the byte at `offset`."""
        if self._whole is not None:
            self._whole.seek(offset)
            return offset, self._whole.read(count)
        for base, block in reversed(self._blocks):
            if base <= offset < base + len(block):
                return base, block
        last = self._blocks[-1][0] + len(self._blocks[-1][1]) if self._blocks else 0
        if 0 <= offset - last <= NEAR:
            self._length = min(2 * self._length, LARGEST)
            found = self._read_forward(offset, last)
        else:
            self._length, self._next = SMALLEST // 2, None
            found = offset, self._get(offset, min(offset + max(count, SMALLEST), self.size))
        self._blocks = [*self._blocks[-1:], found]
        return found

    def _read_forward(self, offset: int, last: int) -> tuple[int, bytes]:
        """Return the block after the last one, and request the next."""
        found = None
        if self._next is not None:
            start, end, call = self._next
            if start <= offset < end:
                with contextlib.suppress(Exception):  # a failed read-ahead is retried below
                    found = start, call.result(self._policy.request_timeout())
        if found is None:
            start = last if offset - last < self._length else offset
            found = start, self._get(start, min(start + self._length, self.size))
        start = found[0] + len(found[1])
        end = min(start + min(2 * self._length, LARGEST), self.size)
        self._next = None
        if self._length >= READ_AHEAD and start < end:
            self._next = start, end, BackgroundCall(lambda: self._request(start, end))
        return found

    def _get(self, start: int, end: int) -> bytes:
        return self._retry(lambda: self._request(start, end))

    def _request(self, start: int, end: int) -> bytes:
        data: bytes = self._client.system.cat_file(self._client.path, start=start, end=end)
        if len(data) != end - start:
            raise TransferError(f"{len(data)} bytes came, not {end - start}")
        return data

    def _request_size(self) -> int | None:
        """Return the size, or None if the server has no range requests."""
        if not is_web(self._client.path):
            return int(self._client.system.info(self._client.path)["size"])
        try:
            file = self._client.system.open(self._client.path, "rb", cache_type="none")
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

    def _download_whole(self) -> IO[bytes]:
        with (
            temporary_space(f"{self._address}, which its server gives only whole"),
            self._client.system.open(self._client.path, "rb", block_size=0) as source,
            contextlib.ExitStack() as cleanup,
        ):
            file = cleanup.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(source, file, 1 << 20)
            cleanup.pop_all()  # the file lives as long as this object
            return file

    def _retry(self, action: Callable[[], T], watched: bool = True) -> T:
        return retry(action, self._address, self._policy, watched=watched, error=Unreachable)
