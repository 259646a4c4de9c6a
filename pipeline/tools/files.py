"""Files that are either whole or not there: write beside, fsync, rename.

A file that is read once: its hash and any part of it, from one pass over its bytes.

What the kernel keeps of files in memory, and how to have it let go.

Locks between processes that the kernel frees with their holder, however that ends (`flock`).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import io
import mmap
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from pipeline.tools.errors import UsageError

HELD = 64 * 2**20
"""Files up to this size are held in memory. Of larger ones the parts are read again, out of the
kernel's cache, where the pass for the hash has just put them."""


class HashedFile:
    """`with HashedFile(path) as file: file.sha256; file.read(512, 100)`."""

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

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def drop_page_cache(file: int) -> int:
    """Ask the kernel to drop an open file from the page cache.

    Returns:
        bytes that are in memory all the same (a file system in memory; pages that others map).
    """
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    size = os.fstat(file).st_size
    if not size:
        return 0
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    # A private map may be written to, which ctypes wants before it gives an address.
    with closing(mmap.mmap(file, size, flags=mmap.MAP_PRIVATE)) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages
        )
        del first  # or the map cannot be closed
    return 0 if failed else min(size, mmap.PAGESIZE * sum(page & 1 for page in pages))


_held: set[int] = set()
"""Descriptors of the locks this process holds."""


def _forget_locks() -> None:
    # A forked child shares its parent's locks, and would keep them alive after the parent's death.
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)


def try_lock(path: Path) -> int | None:
    """Take the lock at `path` (created if need be); None if another thread or process holds it.

    Returns:
        A descriptor for `unlock`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    _held.add(descriptor)
    return descriptor


def unlock(descriptor: int) -> None:
    """Give a lock back."""
    if descriptor in _held:  # in a forked child it is closed, and the lock the parent's
        _held.discard(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


PARTIAL = ".partial"
"""Ending of a file that is being written; whatever has it may be deleted."""


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a new file for writing that takes its name only when the block ends well.

    The bytes and the rename are on the disk when the block is left, unless it need not be
    `durable`: then a loss of power may take it. If the block raises, the file of that name is
    untouched and the partial one is removed.
    """
    # Not the process's id alone: on another node one may have the same, and write the same file.
    unique = f"{secrets.token_hex(4)}.{os.getpid()}"
    partial = path.with_name(f"{path.name}.{unique}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
        if durable:
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` on the disk (a rename is durable only after this)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ensure_writable(path: Path, what: str) -> Path:
    """Create `path` if need be and prove that a file can be written in it.

    Raises:
        UsageError: it is a file, or cannot be created or written.
    """
    if re.match("[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise UsageError(
            f"{what} {path} is an address; name a local folder, and upload it as it is"
        )
    probe = path / f".write-test.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"{what} {path} cannot be written ({error.strerror}); name another folder"
        ) from error
    return path
