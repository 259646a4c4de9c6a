"""Files: atomic writes, hashes, page cache, and locks between processes."""

from __future__ import annotations

import ctypes
import errno
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
from typing import IO, Any, BinaryIO

from pipeline.tools.errors import SetupError, UsageError
from pipeline.tools.watchdog import BackgroundCall, FileAccess, NoAnswer

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk that is full, or on which the user may write no more."""
PARTIAL = ".partial"
"""Ending of a file that is being written; such a file may be deleted."""
HELD = 64 * 2**20
"""Bytes: `HashedFile` keeps files up to this size in memory. Parts of larger ones are read again,
out of the page cache, where the pass for the hash has just put them."""
_BLOCK = 1 << 20
"""Bytes that are hashed at a time."""
LONGEST_NAME = 255
"""Bytes of a file name that file systems take."""
LOCK_TIMEOUT = 30.0
"""Seconds in which `flock` answers, or counts as hung."""
_NO_LOCKS = frozenset(
    {
        *(errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP),  # Lustre without `-o flock`, NFS, FUSE
        *(errno.EINTR, errno.EINVAL, errno.EIO, errno.EACCES, errno.EPERM),
    }
)
"""Errors of `flock` on file systems that have none, or whose lock service is down."""
_held_locks: set[int] = set()
"""Descriptors of the locks that this process holds, or waits for."""


class NoLocks(SetupError):
    """The file system of a file has no working `flock`."""


class LockHang(SetupError):
    """`flock` does not return: whether another process holds the lock cannot be told."""


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a new file for writing; it gets its name when the block ends without an exception.

    If the block raises, a file of that name is untouched and the partial one is removed.

    Args:
        path: the final name.
        durable: whether bytes and rename are on the disk after the block, so that they survive a
            loss of power.

    Raises:
        UsageError: `path` is a device, a pipe or a socket, which a rename would remove.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UsageError(f"{path} is a device or a pipe, not a file; name another")
    # The process number alone is not unique: processes of two nodes may write the same file.
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
            sync_path(path.parent)
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:
            error.filename = str(path)  # of a write, the system names no file
        raise
    finally:
        partial.unlink(missing_ok=True)


def sync_path(path: Path) -> None:
    """Put a file's bytes, or a folder's names, on the disk (only then is a rename durable)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def ensure_writable(path: Path, what: str) -> Path:
    """Create a folder if it is missing, and check that a file can be written in it.

    Args:
        path: the folder.
        what: the folder's purpose, for messages.

    Raises:
        UsageError: it is an address or a file, or cannot be created or written.
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


def is_plain_name(name: object) -> bool:
    """Return whether a name from outside is that of a file in a folder, and of nothing elsewhere.

    Whoever joins a name that a manifest, a checkpoint or a store gives to a folder checks it first.
    """
    if not isinstance(name, str) or not name or name.startswith(".") or {"/", "\0"} & set(name):
        return False
    try:
        return len(os.fsencode(name)) <= LONGEST_NAME
    except UnicodeEncodeError:  # half a character, which JSON can hold and no file name can
        return False


@contextmanager
def explain_full_disk(message: str) -> Iterator[None]:
    """Turn the error of a full disk in the block into one line.

    Raises:
        SetupError: no space is left, or none of the user's quota; with this message.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise SetupError(message) from error
        raise


def read_text(path: Path) -> str:
    """Return the text of a file without surrounding blanks; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def read_document(path: Path) -> str:
    """Return the UTF-8 text of a file that the user names.

    Raises:
        OSError: it cannot be read, or is a device, which may have no end.
        UnicodeDecodeError: it is no UTF-8.
    """
    if path.is_char_device() or path.is_block_device():
        raise OSError(errno.EINVAL, "a device, not a file", str(path))
    return path.read_text(encoding="utf-8")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, as `sha256sum` prints it."""
    with FileAccess(path):
        file = path.open("rb", buffering=0)
    with file:
        return _hash_file(path, file)


def _hash_file(path: Path, file: io.FileIO) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    while size := _read_block(path, file, block):
        digest.update(block[:size])
    return digest.hexdigest()


def _read_block(path: Path, file: io.FileIO, block: memoryview) -> int:
    with FileAccess(path):
        return file.readinto(block) or 0


class HashedFile:
    """A file that is read once for its hash and its parts: `with HashedFile(path) as file:`.

    Attributes:
        size: size of the file in bytes.
        sha256: in hexadecimal; None where a part of the file cannot be read.
        error: why a part cannot be read; else None.
    """

    def __init__(self, path: Path) -> None:
        """Read and hash a file.

        Raises:
            OSError: it cannot be opened. An error of reading is in `error`, and raised by `read`.
        """
        with FileAccess(path):
            self._file = path.open("rb", buffering=0)
            self.size = os.fstat(self._file.fileno()).st_size
        self._path = path
        self.sha256: str | None = None
        self.error: OSError | None = None
        self._data: bytes | None = None
        try:
            if self.size <= HELD:
                with FileAccess(path):
                    self._data = self._file.readall()
                self.sha256 = hashlib.sha256(self._data).hexdigest()
            else:
                self.sha256 = _hash_file(path, self._file)
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
        with FileAccess(self._path):
            return os.pread(self._file.fileno(), size, offset) if size > 0 else b""

    def stream(self) -> BinaryIO:
        """Return a seekable file at its beginning."""
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
        Number of bytes that stay in memory (a file system in memory; pages that others map).
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


def _forget_locks() -> None:
    # A forked child shares its parent's locks, and would hold them after the parent's death.
    for descriptor in _held_locks:
        with suppress(OSError):
            os.close(descriptor)
    _held_locks.clear()


os.register_at_fork(after_in_child=_forget_locks)


def try_lock(path: Path) -> int | None:
    """Take the lock file at `path`; the kernel frees it (`flock`) when this process ends.

    Returns:
        A descriptor for `unlock`; None if another thread or process holds the lock.

    Raises:
        NoLocks: the file system has no flock.
        LockHang: it does not answer.
    """
    with FileAccess(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        flock(descriptor, wait=False)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except NoLocks as error:
        os.close(descriptor)
        raise NoLocks(
            f"{path} cannot be locked ({error}); name a folder on a local disk"
        ) from error
    except BaseException:
        os.close(descriptor)
        raise
    _held_locks.add(descriptor)
    return descriptor


def flock(file: int | IO[Any], *, wait: bool) -> None:
    """Lock an open file until it is closed.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
        NoLocks: the file system has no flock, as Lustre without `-o flock` and some FUSE mounts.
        LockHang: the call has not returned after `LOCK_TIMEOUT` seconds; with `wait`, another
            process may hold the lock.
    """
    # The call is made on a second descriptor, which is the thread's: if it returns after it was
    # given up, the lock is free again as soon as both are closed.
    given = file if isinstance(file, int) else file.fileno()
    descriptor = os.dup(given)
    _held_locks.add(descriptor)

    def lock() -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        finally:
            _held_locks.discard(descriptor)
            os.close(descriptor)

    try:
        BackgroundCall(lock, "flock").result(LOCK_TIMEOUT)
    except NoAnswer as error:
        raise LockHang(
            f"{Path(f'/proc/self/fd/{given}').readlink()} cannot be locked (flock has not "
            f"answered for {LOCK_TIMEOUT:.0f} s, as where the lock service of NFS or FUSE hangs); "
            "mend the mount, mount NFS with -o local_lock=flock if one node uses it, or name a "
            "folder on a local disk"
        ) from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocks(f"no flock on its file system: {error.strerror}") from error
        raise


def unlock(descriptor: int) -> None:
    """Release a lock."""
    if descriptor in _held_locks:  # in a forked child it is closed, and the lock the parent's
        _held_locks.discard(descriptor)
        with suppress(OSError):  # closing releases it, too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


_NETWORK = re.compile(
    "nfs|lustre|cifs|smb|ceph|fuse|9p|afs|gfs|gpfs|beegfs|gluster|virtiofs|orangefs|pvfs|weka|panfs"
)


def is_network_mount(path: Path) -> bool:
    """Return whether a path lies on a mount of another machine, or of a program (FUSE).

    False where the kernel does not say.
    """
    with suppress(OSError):
        device = path.stat().st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            words = line.split()  # proc(5): the device is the third, the type after a lone `-`
            if words[2] == number:
                return _NETWORK.match(words[words.index("-") + 1]) is not None
    return False


_FOREIGN = {
    b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"PK\x03\x04": "compressed with zip",
    b"version https://git-lfs.": "a pointer of Git LFS, and the file itself is fetched by "
    "`git lfs pull`",
    b"<!DOCTYPE html": "a web page",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
}
"""First bytes of files that lie where images and archives are expected."""


def describe_foreign(head: bytes) -> str | None:
    """Return what a file is by its first bytes, if it is surely no image, tar or table."""
    return next((what for magic, what in _FOREIGN.items() if head.startswith(magic)), None)
