"""Reads pictures out of folders, tars and parquet files, on a disk or in a store."""

from __future__ import annotations

import errno
import os
import stat

from pipeline.remote.download import Policy
from pipeline.remote.file import RemoteFile
from pipeline.sources.limits import refuse_if_too_large
from pipeline.sources.listing import ENCODING, Container, Reader, Unreadable, shown
from pipeline.sources.paths import is_remote

_NOT_THE_PICTURES_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN)


def open_reader(container: Container, policy: Policy | None = None) -> Reader:
    """Open what holds pictures.

    Args:
        container: of a `Listing`.
        policy: how long to insist where it is in a store.

    Raises:
        OSError: it is not there (any more), or is not what it was.
    """
    if container.kind == "parquet":
        from pipeline.sources.parquet_reader import ParquetReader

        return ParquetReader(container.address, policy)
    if container.kind == "folder":
        return FolderReader(container.address)
    if is_remote(container.address):
        return RemoteTarReader(container.address, policy)
    return TarReader(container.address)


class FolderReader:
    """Files of a folder; links are followed."""

    def __init__(self, folder: str) -> None:
        """Check that the folder is there.

        Raises:
            OSError: it is not.
        """
        os.scandir(folder).close()
        self._folder = folder

    def read(self, name: str, place: int, size: int) -> bytes:
        """Return the bytes of file `name`; see `Reader`."""
        path = os.path.join(self._folder.encode(*ENCODING), name.encode(*ENCODING))
        try:
            # Without O_NONBLOCK, a pipe named as a picture would be waited for.
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                return _read_all(file)
            finally:
                os.close(file)
        except OSError as error:
            if error.errno in _NOT_THE_PICTURES_FAULT:
                raise
            os.scandir(self._folder).close()  # raises if the whole folder went away
            raise Unreadable(f"cannot be read: {error.strerror}") from error
        except ValueError as error:  # a zero byte in a name
            raise Unreadable(f"cannot be read: {error}") from error

    def close(self) -> None:
        """Nothing is held."""


def _read_all(file: int) -> bytes:
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable("not a file but a folder, a pipe or a device")
    refuse_if_too_large(found.st_size)
    data = os.read(file, found.st_size + 1)
    if len(data) == found.st_size:
        return data
    parts = [data]  # it grows, or stands where sizes are not known
    while more := os.read(file, 1 << 20):
        parts.append(more)
        refuse_if_too_large(sum(map(len, parts)))
    return b"".join(parts)


class TarReader:
    """Byte ranges of a tar on a disk."""

    def __init__(self, path: str) -> None:
        """Open the tar.

        Raises:
            OSError: it cannot be opened.
        """
        self._path = path
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, name: str, place: int, size: int) -> bytes:
        """Return `size` bytes at `place`; see `Reader`."""
        refuse_if_too_large(size)
        try:
            data = os.pread(self._file, size, place)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EBADMSG, errno.EUCLEAN):
                raise
            raise Unreadable(f"cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise OSError(f"{self._path} ends inside {shown(name)}")
        return data

    def close(self) -> None:
        """Close the tar."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class RemoteTarReader:
    """Byte ranges of a tar in a store, fetched in large blocks ahead of need."""

    def __init__(self, address: str, policy: Policy | None = None) -> None:
        """Ask for the size of the tar.

        Raises:
            OSError: the store does not have it, or does not answer.
        """
        self._address = address
        self._file = RemoteFile(address, policy)

    def read(self, name: str, place: int, size: int) -> bytes:
        """Return `size` bytes at `place`; see `Reader`."""
        refuse_if_too_large(size)
        self._file.seek(place)
        data = self._file.read(size)
        if len(data) != size:
            raise OSError(f"{self._address} ends inside {shown(name)}")
        return data

    def close(self) -> None:
        """Let go of the tar."""
        self._file.close()
