"""Cache folder for downloaded files: shared by all processes of a node, with a size limit.

CACHE/lock                     held for moments, while files are evicted or renamed
CACHE/SET/                     a data set: the first 16 digits of its manifest's SHA-256
CACHE/SET/train.index.npy      a file beside its shards
CACHE/SET/train-000000.tar     a shard that the store itself holds damaged
CACHE/sha256/SHA256.tar        any other shard, by its content: versions of a set share it; its
                               mtime is the time of its last use
.../NAME.BYTES.room.partial    BYTES are reserved for NAME, which is being downloaded
.../NAME.TOKEN.partial         the part of NAME that has been downloaded
.../locks/NAME.lock            held by the process that downloads NAME

Locks are `flock`s, which the kernel frees when their process ends. A partial file whose lock is
free is a leftover, and the next process that needs room removes it. The size of the cache is
counted from its files each time. The folder may be deleted whenever no process uses it. The locks
need a local disk (or a network file system with working `flock`).
"""

from __future__ import annotations

import glob
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.dataset.manifest import VERSIONS
from pipeline.remote.filesystem import Stopped
from pipeline.tools.errors import DuetError, UsageError
from pipeline.tools.files import PARTIAL, NoLocks, atomic_write, sync_path, try_lock, unlock

AS_STORED = ".as-stored"
"""Ending of a file beside a shard that the store itself holds damaged; it holds that SHA-256."""

LOCKS = "locks"
SHARED = "sha256"
"""Folder in CACHE with the shards that sets share."""
_FOLDER = re.compile(f"[0-9a-f]{{16}}|{SHARED}")
_SHARD = re.compile(r"[0-9a-f]{64}\.tar\b")
_PARTIAL_NAME = re.compile(r"(?P<name>.+)\.(?:(?P<room>\d+)\.room|[0-9a-f]{8})\.partial")
_POLL = 0.1
"""Seconds between two tries to take a lock that another process holds."""


@dataclass(frozen=True)
class _Entry:
    """A file that counts towards the limit; size in bytes, time of its last use in ns."""

    path: Path
    bytes: int
    used: int


class Cache:
    """The cache folder of a node."""

    def __init__(self, folder: Path, limit: int, timeout: float) -> None:
        """Create the folder if it is missing.

        Args:
            folder: CACHE.
            limit: largest size of all files together, in bytes.
            timeout: seconds to wait for another process that makes no progress.

        Raises:
            UsageError: the folder cannot be created, written or locked.
        """
        self.folder = folder
        self.limit = limit
        self._timeout = timeout
        try:
            (folder / SHARED / LOCKS).mkdir(parents=True, exist_ok=True)
            if (lock := try_lock(folder / "lock")) is not None:
                unlock(lock)
        except NoLocks as error:
            raise UsageError(
                f"cache {error}, with --cache: the processes of a node share it by locks"
            ) from error
        except OSError as error:
            raise UsageError(
                f"cache {folder} cannot be written ({error.strerror}); "
                "name another folder with --cache"
            ) from error

    def locate(self, digest: str) -> Path:
        """Return the path of a shard with this SHA-256, whether it is there or not."""
        return self.folder / SHARED / f"{digest}.tar"

    def create_folder(self, identity: str, manifest: bytes) -> Path:
        """Return the folder of a data set, with its manifest in it.

        Args:
            identity: SHA-256 of the manifest.
            manifest: content of `manifest.json`.
        """
        folder = self.folder / identity[:16]
        (folder / LOCKS).mkdir(parents=True, exist_ok=True)
        path = folder / MANIFEST
        with self._exclusive():
            if not path.is_file() or path.read_bytes() != manifest:
                with atomic_write(path) as file:
                    file.write(manifest)
            self._sweep()
        return folder

    @contextmanager
    def lock_file(
        self, path: Path, *, wait: bool, until: Callable[[], bool], stop: threading.Event
    ) -> Iterator[bool]:
        """Lock a file, so that no other thread or process of the node downloads it.

        Args:
            path: the file.
            wait: wait for another holder of the lock.
            until: condition that ends the wait.
            stop: ends the wait when set.

        Yields:
            True while the lock is held; False if another process held it and `wait` is False, or
            if `until()` became true during the wait.

        Raises:
            Stopped: `stop` was set during the wait.
            DuetError: another process holds the lock and makes no progress.
        """
        lock = _lock_path(path)
        progress, since = self._progress(path), time.monotonic()
        descriptor = try_lock(lock)
        while descriptor is None and wait and not until():
            if stop.wait(_POLL):
                raise Stopped(f"waiting for {path.name} was stopped")
            now = self._progress(path)
            if now != progress:
                progress, since = now, time.monotonic()
            elif time.monotonic() - since > self._timeout:
                raise DuetError(
                    f"another process has held {lock} for {self._timeout:.0f} s and fetched "
                    "nothing; end it and start again"
                )
            descriptor = try_lock(lock)
        try:
            if descriptor is not None:
                for leftover in self._partial_files(path):  # of a dead holder
                    leftover.unlink(missing_ok=True)
            yield descriptor is not None
        finally:
            if descriptor is not None:
                unlock(descriptor)

    @contextmanager
    def reserve_room(
        self,
        path: Path,
        size: int,
        *,
        name: str,
        beside: int = 0,
        spare: Collection[Path],
        wait: bool,
        stop: threading.Event,
    ) -> Iterator[bool]:
        """Reserve room for a file while it is downloaded (its lock must be held).

        The least recently used shards are evicted. A reader that has one open can go on reading;
        its bytes are free on the disk when it is closed.

        Args:
            path: the file.
            size: its size in bytes.
            name: what messages call it: of a shard, its name in the data set.
            beside: bytes of other files that are needed sooner, and must fit too.
            spare: files to evict last, or, if `wait` is False, not at all.
            wait: wait until other downloads have ended and their files can be evicted.
            stop: ends the wait when set.

        Yields:
            True if there is room; always if `wait`.

        Raises:
            UsageError: there is too little room even in an empty cache.
            Stopped: `stop` was set during the wait.
        """
        marker = path.with_name(f"{path.name}.{size}.room{PARTIAL}")
        has_room = self._make_room(marker, size, beside, spare, wait)
        progress, since = self._sizes(), time.monotonic()
        while not has_room and wait:
            now = self._sizes()
            if now != progress:
                progress, since = now, time.monotonic()
            elif time.monotonic() - since > self._timeout:
                raise UsageError(
                    f"cache {self.folder} of {self.limit} bytes has no room for {name}, which has "
                    f"{size}; give a larger --cache-size"
                )
            if stop.wait(_POLL):
                raise Stopped(f"waiting for room for {name} was stopped")
            os.utime(_lock_path(path))  # progress, for those who wait for this process
            has_room = self._make_room(marker, size, beside, spare, wait)
        try:
            yield has_room
        finally:
            marker.unlink(missing_ok=True)

    def install(self, partial: Path, path: Path, as_stored: str | None = None) -> None:
        """Rename a downloaded file to its final name, durably.

        Args:
            partial: the downloaded file; removed if this fails.
            path: its final name.
            as_stored: SHA-256 of a file that the store itself holds damaged; None if it is sound.
        """
        mark = path.with_name(path.name + AS_STORED)
        try:
            sync_path(partial)
            with self._exclusive():  # the file counts under one name
                partial.replace(path)
                for marker in self._partial_files(path):
                    marker.unlink(missing_ok=True)
                mark.unlink(missing_ok=True)
        finally:
            partial.unlink(missing_ok=True)
        sync_path(path.parent)
        if as_stored is not None:
            with atomic_write(mark) as file:
                file.write(as_stored.encode())

    def touch(self, path: Path) -> bool:
        """Mark a file as used now; return False if it was evicted."""
        now = time.time_ns()  # finer than the kernel's own stamp, so uses keep their order
        try:
            os.utime(path, ns=(now, now))
        except FileNotFoundError:
            return False
        return True

    def _make_room(
        self, marker: Path, size: int, beside: int, spare: Collection[Path], force: bool
    ) -> bool:
        with self._exclusive():
            self._sweep()
            entries = self._entries()
            missing = sum(entry.bytes for entry in entries) + size - self.limit
            shards = [entry for entry in entries if entry.path.name.endswith(".tar")]
            if not force:
                shards = [entry for entry in shards if entry.path not in spare]
            if sum(entry.bytes for entry in shards) < missing + beside:
                return False
            for entry in sorted(shards, key=lambda shard: (shard.path in spare, shard.used)):
                if missing <= 0:
                    break
                entry.path.unlink(missing_ok=True)
                entry.path.with_name(entry.path.name + AS_STORED).unlink(missing_ok=True)
                missing -= entry.bytes
            marker.touch()
            return True

    def _entries(self) -> list[_Entry]:
        """Return all files that count; a download with the larger of reserved and real size."""
        whole: list[_Entry] = []
        downloads: dict[Path, list[int]] = {}
        for path, stat in self._files():
            match = _PARTIAL_NAME.fullmatch(path.name)
            if match is None:
                whole.append(_Entry(path, stat.st_size, stat.st_mtime_ns))
                continue
            sizes = downloads.setdefault(path.with_name(match["name"] + PARTIAL), [0, 0])
            sizes[0] += int(match["room"] or 0)
            sizes[1] += stat.st_size
        return whole + [_Entry(name, max(sizes), 0) for name, sizes in downloads.items()]

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for folder in self.folder.iterdir():
            # CACHE may hold folders of other programs, with tars in them.
            if not _FOLDER.fullmatch(folder.name) or not (folder / LOCKS).is_dir():
                continue
            for part in (folder, *(folder / VERSIONS).glob("*")):
                for item in os.scandir(part):
                    if folder.name == SHARED and not _SHARD.match(item.name):
                        continue
                    with suppress(FileNotFoundError):  # removed meanwhile
                        if item.is_file():
                            yield Path(item.path), item.stat()

    def _sweep(self) -> None:
        """Remove partial files of dead processes. The lock of the cache must be held."""
        for path, _ in list(self._files()):
            if not path.name.endswith(PARTIAL):
                continue
            match = _PARTIAL_NAME.fullmatch(path.name)
            if match is None:
                path.unlink(missing_ok=True)  # a manifest, written under the lock held here
                continue
            descriptor = try_lock(_lock_path(path.with_name(match["name"])))
            if descriptor is not None:
                path.unlink(missing_ok=True)
                unlock(descriptor)

    def _sizes(self) -> list[tuple[Path, int]]:
        return sorted((path, stat.st_size) for path, stat in self._files())

    def _partial_files(self, path: Path) -> list[Path]:
        return list(path.parent.glob(f"{glob.escape(path.name)}.*{PARTIAL}"))

    def _progress(self, path: Path) -> list[tuple[str, int, int]]:
        """Return values that change while another process downloads a file."""
        values = []
        for file in (_lock_path(path), *self._partial_files(path)):
            with suppress(FileNotFoundError):
                values.append((file.name, file.stat().st_mtime_ns, file.stat().st_size))
        return sorted(values)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        lock, began = self.folder / "lock", time.monotonic()
        while (descriptor := try_lock(lock)) is None:
            if time.monotonic() - began > self._timeout:
                raise DuetError(
                    f"another process has held {lock} for {self._timeout:.0f} s; "
                    "end it and start again"
                )
            time.sleep(0.005)
        try:
            yield
        finally:
            unlock(descriptor)


def _lock_path(path: Path) -> Path:
    return path.parent / LOCKS / f"{path.name}.lock"
