"""Places that a data set is written to: a folder of this machine, or an object store.

A file is there whole or not at all. In a store it is uploaded when it is complete. Names of files
are relative to the target, with `/` between folders.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.dataset.manifest import VERSIONS
from pipeline.remote.answers import describe_error
from pipeline.remote.filesystem import (
    OBJECT_STORES,
    StoreError,
    StoreFolder,
    check_address,
    is_remote,
    is_web,
    join_name,
    local_path,
    none_if_missing,
    temporary_space,
)
from pipeline.remote.lease import Lease, lock_folder
from pipeline.tools.errors import UsageError
from pipeline.tools.files import PARTIAL, atomic_write, ensure_writable
from pipeline.tools.text import hide_credentials

WORK = ".build"
"""Folder in OUT with the state of an unfinished build; removed when the set is finished."""
_LOCK = f"{WORK}/lock"
_LOCKS = {"lock", "lock.lease"}
"""Files in `WORK` while the folder is locked."""
BATCH = 256
"""Byte ranges in one request: 50 MB with raw images."""
_UPLOADED = "files that are uploaded"


class ByteRange(NamedTuple):
    """A byte range of a file."""

    name: str
    offset: int
    size: int


class Target(Protocol):
    """A folder or an address for a data set, pickled to workers.

    Many may write different files at a time.
    """

    @property
    def address(self) -> str:
        """Path or URL for messages, credentials removed."""

    def create(self, name: str, *, durable: bool = True) -> AbstractContextManager[IO[bytes]]:
        """Open a file for writing; it gets its name when the block ends without an exception.

        Args:
            name: relative to the target; folders in it are created.
            durable: whether the file must survive a loss of power (all survive `kill -9`).
        """

    def read(self, name: str) -> bytes:
        """Return the content of a small file.

        Raises:
            FileNotFoundError: there is no such file.
        """

    def read_ranges(self, ranges: Sequence[ByteRange]) -> Iterator[bytes]:
        """Yield the bytes of many ranges, in this order; fewer where a file ends inside a range.

        Raises:
            FileNotFoundError: one of the files is not there.
        """

    def list_files(self, folder: str = "") -> set[str]:
        """Return the names (with folders) of all complete files below `folder`."""

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None if it is not there."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; missing ones are ignored."""

    def clear(self, folder: str) -> None:
        """Remove a folder and its content."""

    def scratch(self) -> AbstractContextManager[Path]:
        """Return a local folder for intermediate files, which is removed after the block."""

    def reserve(self, extends: bool = False) -> AbstractContextManager[None]:
        """Lock the target for one build.

        Args:
            extends: a further version of the finished set in it is made.

        Raises:
            UsageError: it cannot be written, holds files that are no part of an unfinished build
                (unless `extends`), or is locked by another build.
        """


@dataclass(frozen=True)
class FolderTarget:
    """A `Target` in a folder."""

    address: str

    @property
    def path(self) -> Path:
        """Path of the folder."""
        return Path(self.address)

    @contextmanager
    def create(self, name: str, *, durable: bool = True) -> Iterator[IO[bytes]]:
        """See `Target`."""
        path = self.path / name
        for folder in reversed(path.relative_to(self.path).parents[:-1]):
            (self.path / folder).mkdir(exist_ok=True)
        with atomic_write(path, durable=durable) as file:
            yield file

    def read(self, name: str) -> bytes:
        """See `Target`."""
        return (self.path / name).read_bytes()

    def read_ranges(self, ranges: Sequence[ByteRange]) -> Iterator[bytes]:
        """See `Target`."""
        for name, offset, size in ranges:
            descriptor = os.open(self.path / name, os.O_RDONLY)
            try:
                yield os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)

    def list_files(self, folder: str = "") -> set[str]:
        """See `Target`."""
        return {
            str((Path(root) / file).relative_to(self.path))
            for root, _, files in os.walk(self.path / folder)
            for file in files
            if not file.endswith(PARTIAL)
        }

    def size(self, name: str) -> int | None:
        """See `Target`."""
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def remove(self, names: Iterable[str]) -> None:
        """See `Target`."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def clear(self, folder: str) -> None:
        """See `Target`."""
        shutil.rmtree(self.path / folder, ignore_errors=True)

    @contextmanager
    def reserve(self, extends: bool = False) -> Iterator[None]:
        """See `Target`."""
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        ensure_writable(self.path, "data set folder")
        work = self.path / WORK
        if not (extends or work.is_dir()) and (strangers := sorted(os.listdir(self.path))):
            raise UsageError(
                f"{self.path} holds {strangers[0]}, which is no part of an unfinished data set; "
                "name an empty folder"
            )
        work.mkdir(exist_ok=True)
        with lock_folder(self.path, _LOCK, "build"):
            try:
                self._remove_partial()
                yield
            finally:
                self._remove_partial()
                if work.is_dir() and set(os.listdir(work)) <= _LOCKS:  # nothing was begun
                    self.clear(WORK)
                    with suppress(OSError):  # what was not there before, and holds nothing
                        for path in made:
                            path.rmdir()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """See `Target`."""
        self.clear(plan := f"{WORK}/plan")  # of a build that was killed
        (self.path / plan).mkdir(parents=True)
        try:
            yield self.path / plan
        finally:
            self.clear(plan)

    def _remove_partial(self) -> None:
        """Remove partial files of a killed build, or of a worker of this one."""
        below = (self.path / folder for folder in (WORK, VERSIONS))
        inside = itertools.chain.from_iterable(one.rglob(f"*{PARTIAL}") for one in below)
        for partial in (*self.path.glob(f"*{PARTIAL}"), *inside):
            partial.unlink(missing_ok=True)


class StoreTarget(StoreFolder):
    """A `Target` in an object store. Every method raises `StoreError` if it does not answer."""

    @contextmanager
    def create(self, name: str, *, durable: bool = True) -> Iterator[IO[bytes]]:
        """See `Target`. Until the block ends the file is a temporary one of this node.

        Raises:
            SetupError: no space is left for it.
        """
        with temporary_space(_UPLOADED), tempfile.NamedTemporaryFile(prefix="duet-") as file:
            yield file
            file.flush()
            self.upload(Path(file.name), name)

    def upload(self, local: Path, name: str) -> None:
        """Upload a local file."""
        size = local.stat().st_size
        self.request(name, lambda system, path: system.put_file(str(local), path), "written", size)

    def download(self, name: str, local: Path) -> None:
        """Download a file to a local path.

        Raises:
            FileNotFoundError: there is no such file.
        """
        size = self.size(name)
        if size is None:
            raise self.missing(name)
        self.request(name, lambda system, path: system.get_file(path, str(local)), "read", size)

    def read_ranges(self, ranges: Sequence[ByteRange]) -> Iterator[bytes]:
        """See `Target`."""
        for start in range(0, len(ranges), BATCH):
            batch = ranges[start : start + BATCH]
            for one, data in zip(batch, self._request_ranges(batch), strict=True):
                if isinstance(data, Exception):
                    raise self.missing(one.name) from data
                if len(data) > one.size and is_web(self.address):
                    raise UsageError(
                        f"{self.address}/{one.name}: the web server sends all of it where a part "
                        "is asked for; copy the shards into a folder and index them there"
                    )
                yield data[: one.size]

    def list_files(self, folder: str = "") -> set[str]:
        """See `Target`."""
        return {
            f"{folder}/{name}".lstrip("/")
            for name in self.request(folder, lambda system, path: _below(path, system.find(path)))
        }

    def size(self, name: str) -> int | None:
        """See `Target`."""
        return self.request(name, none_if_missing(lambda fs, path: int(fs.info(path)["size"])))

    def clear(self, folder: str) -> None:
        """See `Target`."""

        def remove(system: Any, path: str) -> None:
            if found := system.find(path):
                system.rm(found)

        self.request(folder, none_if_missing(remove), "removed")

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """See `Target`."""
        with temporary_space(_UPLOADED), tempfile.TemporaryDirectory(prefix="duet-") as folder:
            yield Path(folder)

    @contextmanager
    def reserve(self, extends: bool = False) -> Iterator[None]:
        """See `Target`."""
        ls = none_if_missing(lambda fs, path: _below(path, fs.ls(path, detail=False)))
        there = self.request("", ls)
        if there and WORK not in there and not extends:
            raise UsageError(
                f"{self.address} holds {min(there)}, which is no part of an unfinished data set; "
                "name an empty address"
            )
        with Lease(self, f"{WORK}/claim", "build"):
            yield

    def _request_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes | Exception]:
        """Request ranges at once; the retry requests those that failed."""
        found: list[bytes | Exception] = [StoreError("not requested yet")] * len(ranges)

        def fetch(system: Any, root: str) -> None:
            wanted = [place for place, data in enumerate(found) if _has_failed(data)]
            parts = system.cat_ranges(
                [join_name(root, ranges[place].name) for place in wanted],
                [ranges[place].offset for place in wanted],
                [ranges[place].offset + ranges[place].size for place in wanted],
                on_error="return",
            )
            for place, data in zip(wanted, parts, strict=True):
                is_past_end = isinstance(data, Exception) and "(HTTP 416)" in describe_error(data)
                found[place] = b"" if is_past_end else data
            for data in found:
                if isinstance(data, Exception) and _has_failed(data):
                    raise data

        self.request("", fetch, size=sum(one.size for one in ranges))
        return found


def _below(root: str, paths: Iterable[str]) -> set[str]:
    """Return paths relative to a folder, without the folder itself."""
    names = {path[len(root) :].strip("/") for path in paths if path.startswith(root)}
    return names - {""}


def _has_failed(data: bytes | Exception) -> bool:
    return isinstance(data, Exception) and not isinstance(data, FileNotFoundError)


def open_target(out: str) -> Target:
    """Return the target that OUT names: a folder, or an address in a store.

    Raises:
        UsageError: an address where data sets cannot be written.
        SetupError: the package for its scheme is not installed.
    """
    if is_remote(out):
        return open_store(out, what="data sets")
    return FolderTarget(str(local_path(out)))


def open_store(address: str, folder: str = "", *, what: str = "checkpoints") -> StoreTarget:
    """Return the target of a folder in an object store.

    Args:
        address: a bucket, or a folder in one.
        folder: relative to `address`.
        what: the things that are written there, for messages.

    Raises:
        UsageError: it is not an object store, or names no bucket.
        SetupError: the package for its scheme is not installed.
    """
    safe = hide_credentials(address)
    if address.partition("://")[0] not in OBJECT_STORES:
        raise UsageError(
            f"{safe}: {what} are written to folders and to object stores (s3://, gs://, az://); "
            "name one of these, or write to a folder and copy that"
        )
    if not urlsplit(address).netloc:
        raise UsageError(f"{safe} names no bucket; give one such as s3://bucket/folder")
    check_address(address, "store")
    return StoreTarget(f"{address.rstrip('/')}/{folder}".rstrip("/"))


def is_finished(target: Target) -> bool:
    """Return whether a target holds a finished set: the manifest is written last."""
    return target.size(MANIFEST) is not None
