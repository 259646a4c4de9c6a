"""Where OUT is: files that are whole or not there, in a folder of this machine or one it mounts.

`cluster.build_shards` brings another `Target`, for stores. Names are relative, with `/` between.

OUT in an object store: a file is uploaded when it is whole, and is there whole or not at all.

Credentials and endpoints come from the environment, as `stores.fetch` says.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from fsspec.core import url_to_fs

from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.remote.dataset import is_remote
from pipeline.remote.download import Store
from pipeline.remote.file import Unreachable, retry
from pipeline.remote.filesystem import RetryPolicy, StoreError, describe_error, hide_credentials
from pipeline.remote.lease import Lease
from pipeline.tools.errors import SetupError, UsageError
from pipeline.tools.files import PARTIAL, atomic_write, ensure_writable


def open_store(store: str, folder: str) -> StoreTarget:
    """Return what writes into a folder of a store; raises as `places_of`."""
    safe = hide_credentials(store)
    if store.partition("://")[0] not in OBJECT_STORES:
        raise UsageError(
            f"store {safe}: checkpoints go to folders and to object stores "
            "(s3://, gs://, az://); give one of these"
        )
    if not urlsplit(store).netloc:
        raise UsageError(f"store {safe} names no bucket; give one such as s3://bucket/folder")
    Store(store)  # has the package for it
    return StoreTarget(f"{store.rstrip('/')}/{folder}".rstrip("/"), POLICY)


def local_path(store: str) -> Path:
    """Return the folder that `folder` or `file:///folder` names."""
    local = store.lower().startswith("file://")
    return Path(unquote(urlsplit(store).path) if local else store)


POLICY = RetryPolicy()
"""For what a thread does: half a minute of pauses before it gives up."""


WORK = ".build"
"""Folder in OUT for what a build needs to go on; gone when the set is finished."""


class ByteRange(NamedTuple):
    """A byte range of a file."""

    name: str
    offset: int
    size: int


class Target(Protocol):
    """A place for a data set. Pickled to workers; many may write different files at a time."""

    @property
    def address(self) -> str:
        """How messages call it."""

    def create(self, name: str, *, durable: bool = True) -> AbstractContextManager[IO[bytes]]:
        """Write a file that takes its name only when the block ends well.

        Args:
            name: relative to the target; folders in it are made.
            durable: whether the file must survive a loss of power (all survive `kill -9`).
        """

    def read(self, name: str) -> bytes:
        """Return a whole small file.

        Raises:
            FileNotFoundError: it is not there.
        """

    def read_ranges(self, ranges: Sequence[ByteRange]) -> Iterator[bytes]:
        """Read many byte ranges, in the order asked for; a short one is a file that is too short.

        Raises:
            FileNotFoundError: one of the files is not there.
        """

    def list_files(self, folder: str = "") -> set[str]:
        """Return the names (with folders) of all whole files below `folder`."""

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None if it is not there."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that are not there are no matter."""

    def clear(self, folder: str) -> None:
        """Remove a folder with all that is in it."""

    def scratch(self) -> AbstractContextManager[Path]:
        """Give a local folder for what a build finds out, for as long as the block runs."""

    def reserve(self) -> AbstractContextManager[None]:
        """Hold the target for one build.

        Raises:
            UsageError: it cannot be written, holds what is no part of an unfinished build, or
                another build holds it.
        """


@dataclass(frozen=True)
class FolderTarget:
    """A `Target` in a folder."""

    address: str

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.address)

    @contextmanager
    def create(self, name: str, *, durable: bool = True) -> Iterator[IO[bytes]]:
        """Write a file; see `Target`."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)  # not its parents: OUT may have been deleted under us
        with atomic_write(path, durable=durable) as file:
            yield file

    def read(self, name: str) -> bytes:
        """Return a whole small file; see `Target`."""
        return (self.path / name).read_bytes()

    def read_ranges(self, ranges: Sequence[ByteRange]) -> Iterator[bytes]:
        """Read many byte ranges; see `Target`."""
        for name, offset, size in ranges:
            descriptor = os.open(self.path / name, os.O_RDONLY)
            try:
                yield os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)

    def list_files(self, folder: str = "") -> set[str]:
        """Return the names of all whole files; see `Target`."""
        found = set()
        for root, _, files in os.walk(self.path / folder):
            below = Path(root).relative_to(self.path)
            found |= {str(below / file) for file in files if not file.endswith(PARTIAL)}
        return found

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None; see `Target`."""
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; see `Target`."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def clear(self, folder: str) -> None:
        """Remove a folder; see `Target`."""
        shutil.rmtree(self.path / folder, ignore_errors=True)

    @contextmanager
    def reserve(self) -> Iterator[None]:
        """Hold the folder for one build; see `Target`."""
        ensure_writable(self.path, "data set folder")
        work = self.path / WORK
        if not work.is_dir() and (strangers := sorted(os.listdir(self.path))):
            raise UsageError(
                f"{self.path} holds {strangers[0]}, which is no part of an unfinished data set; "
                "name an empty folder"
            )
        work.mkdir(exist_ok=True)
        with (work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    f"{self.path} is being built by another process; wait for it, "
                    "or name another folder"
                ) from error
            self._tidy()
            try:
                yield
            finally:
                self._tidy()
                if work.is_dir() and os.listdir(work) == ["lock"]:  # nothing was begun
                    self.clear(WORK)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give a local folder; see `Target`."""
        folder = self.path / WORK / "plan"
        shutil.rmtree(folder, ignore_errors=True)  # of a build that was killed
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _tidy(self) -> None:
        """Remove what a killed build, or a worker of this one, was writing."""
        for folder in (self.path, *(path for path in (self.path / WORK).rglob("*"))):
            if folder.is_dir():
                for partial in folder.glob(f"*{PARTIAL}"):
                    partial.unlink(missing_ok=True)


def is_finished(target: Target) -> bool:
    """Say whether a target holds a finished set (the manifest is written last)."""
    return target.size(MANIFEST) is not None


OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")
"""Where a file appears only when all of it has arrived."""

BATCH = 256
"""Pieces that are asked for at a time: with raw images 50 MB."""

SLOWEST = 100_000
"""Bytes a second below which a transfer is given up, after the patience of any request."""

T = TypeVar("T")


def open_target(out: str) -> Target:
    """Return the target that OUT names: a folder, or an address in a store.

    Raises:
        UsageError: an address where sets cannot be written.
        SetupError: the package for its scheme is not installed.
    """
    if not is_remote(out):
        return FolderTarget(
            unquote(urlsplit(out).path) if out.lower().startswith("file://") else out
        )
    Store(out)  # knows the scheme, and has its package
    if out.partition("://")[0] not in OBJECT_STORES:
        raise UsageError(
            f"{hide_credentials(out)}: sets are written to folders and to object stores (s3://, "
            "gs://, az://); name one of these, and copy the finished set"
        )
    return StoreTarget(out.rstrip("/"))


@dataclass(frozen=True)
class StoreTarget:
    """A `Target` in a store. Every method raises `StoreError` if it does not answer."""

    url: str
    policy: RetryPolicy = field(default_factory=RetryPolicy)

    @property
    def address(self) -> str:
        """How messages call it."""
        return hide_credentials(self.url)

    @contextmanager
    def create(self, name: str, *, durable: bool = True) -> Iterator[IO[bytes]]:
        """Write a file; see `Target`. Until the block ends it is a temporary one of this node.

        Raises:
            SetupError: no space left for that.
        """
        with _room_for_temporary_files(), tempfile.NamedTemporaryFile(prefix="duet-") as file:
            yield file
            file.flush()
            size = os.fstat(file.fileno()).st_size
            self.request(
                name, lambda system, path: system.put_file(file.name, path), "written", size
            )

    def read(self, name: str) -> bytes:
        """Return a whole small file; see `Target`."""
        data = self.request(name, _or_none(lambda system, path: bytes(system.cat_file(path))))
        if data is None:
            raise self._missing(name)
        return data

    def read_ranges(self, ranges: Sequence[ByteRange]) -> Iterator[bytes]:
        """Read many byte ranges; see `Target`."""
        for start in range(0, len(ranges), BATCH):
            yield from self._batch(ranges[start : start + BATCH])

    def list_files(self, folder: str = "") -> set[str]:
        """Return the names of all files; see `Target`."""
        return {
            f"{folder}/{name}".lstrip("/")
            for name in self.request(folder, lambda system, path: _below(path, system.find(path)))
        }

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None; see `Target`."""
        return self.request(name, _or_none(lambda system, path: int(system.info(path)["size"])))

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; see `Target`."""
        for name in names:
            self.request(name, _or_none(lambda system, path: system.rm_file(path)), "removed")

    def clear(self, folder: str) -> None:
        """Remove a folder; see `Target`."""

        def remove(system: Any, path: str) -> None:
            if found := system.find(path):
                system.rm(found)

        self.request(folder, _or_none(remove), "removed")

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give a temporary folder of this machine; see `Target`."""
        with (
            _room_for_temporary_files(),
            tempfile.TemporaryDirectory(prefix="duet-") as folder,
        ):
            yield Path(folder)

    @contextmanager
    def reserve(self) -> Iterator[None]:
        """Hold the address for one build; see `Target`."""
        there = self.request("", _or_none(lambda s, path: _below(path, s.ls(path, detail=False))))
        if there and WORK not in there:
            raise UsageError(
                f"{self.address} holds {min(there)}, which is no part of an unfinished data set; "
                "name an empty address"
            )
        with Lease(self.request, f"{WORK}/claim", self.address):
            yield

    def request(
        self,
        name: str,
        action: Callable[[Any, str], T],
        done: str = "read",
        size: int = 0,
    ) -> T:
        """Return what `action(file system, path of the file)` returns, tried again if need be.

        Args:
            name: the file, relative to the target; the target itself if empty.
            action: asks the store once.
            done: what is done with the file, for messages.
            size: bytes that are transferred.

        Raises:
            StoreError: the store did not do it, after all tries.
        """
        system, root = url_to_fs(self.url)
        path = f"{root.rstrip('/')}/{name}".rstrip("/")

        def once() -> T:
            system.invalidate_cache()  # others write here, too
            return action(system, path)

        patient = replace(self.policy, stall=self.policy.stall + size / SLOWEST)
        try:
            return retry(once, f"{self.url}/{name}".rstrip("/"), patient, done=done)
        except Unreachable as error:
            # An OSError would be taken for a fault of this one file.
            raise StoreError(str(error)) from error

    def _batch(self, pieces: Sequence[ByteRange]) -> Iterator[bytes]:
        """Ask for pieces at once, and again for those that did not come."""
        found: list[bytes | Exception] = [StoreError("not asked for yet")] * len(pieces)

        def fetch(system: Any, root: str) -> None:
            wanted = [place for place, data in enumerate(found) if _failed(data)]
            parts = system.cat_ranges(
                [f"{root}/{pieces[place].name}" for place in wanted],
                [pieces[place].offset for place in wanted],
                [pieces[place].offset + pieces[place].size for place in wanted],
                on_error="return",
            )
            for place, data in zip(wanted, parts, strict=True):
                found[place] = b"" if _past_the_end(data) else data
            for data in found:
                if isinstance(data, Exception) and _failed(data):
                    raise data

        self.request("", fetch, size=sum(piece.size for piece in pieces))
        for piece, data in zip(pieces, found, strict=True):
            if isinstance(data, Exception):
                raise self._missing(piece.name) from data
            yield data[: piece.size]

    def _missing(self, name: str) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.address}/{name}")


def _or_none(action: Callable[[Any, str], T]) -> Callable[[Any, str], T | None]:
    """Make an action of another that gives None for what is not there, at the first try."""

    def wrapped(system: Any, path: str) -> T | None:
        with contextlib.suppress(FileNotFoundError):
            return action(system, path)
        return None

    return wrapped


def _below(root: str, paths: Iterable[str]) -> set[str]:
    """Return paths as seen from a folder, without the folder itself."""
    names = {path[len(root) :].strip("/") for path in paths if path.startswith(root)}
    return names - {""}


def _failed(data: bytes | Exception) -> bool:
    return isinstance(data, Exception) and not isinstance(data, FileNotFoundError)


def _past_the_end(data: bytes | Exception) -> bool:
    return isinstance(data, Exception) and "(HTTP 416)" in describe_error(data)


@contextmanager
def _room_for_temporary_files() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SetupError(
                f"no space left in {tempfile.gettempdir()}, where files lie until they are "
                "uploaded; free some, or name another folder with TMPDIR"
            ) from error
        raise
