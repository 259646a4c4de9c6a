"""A folder of fetched files that all processes of a node share, never larger than it may be.

CACHE/lock                     held for moments, by whoever makes room or removes something
CACHE/SET/                     a data set: the first 16 digits of its manifest's SHA-256
CACHE/SET/train-000000.tar     a whole file; its mtime is when it was last used
CACHE/SET/NAME.BYTES.room.partial   so much room is promised to NAME, which is on its way
CACHE/SET/NAME.TOKEN.partial   what has come of it
CACHE/SET/locks/NAME.lock      held by whoever fetches NAME

Locks are `flock`s: the kernel frees them with their process, however that ends. A partial file
whose lock is free is therefore rubbish, and whoever makes room removes it. What is in the folder is
counted each time from the files that are there. Remove the folder at any time when nobody uses it.
The locks need a local disk (or a network file system with working `flock`).
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
from pipeline.remote.filesystem import Stopped
from pipeline.tools.errors import DuetError, UsageError
from pipeline.tools.files import PARTIAL, atomic_write, sync_folder, try_lock, unlock

AS_STORED = ".as-stored"
"""Ending of the file beside a shard which the store itself holds damaged; the hash of that."""

LOCKS = "locks"
_SET = re.compile("[0-9a-f]{16}")
_ON_ITS_WAY = re.compile(r"(?P<name>.+)\.(?:(?P<room>\d+)\.room|[0-9a-f]{8})\.partial")
_EVICTABLE = ".tar"
_POLL = 0.1
"""Seconds between two looks at a lock that another process holds."""


@dataclass(frozen=True)
class _Entry:
    """A file that counts: its size in bytes, and when it was last used (ns)."""

    path: Path
    bytes: int
    used: int


class Cache:
    """The folder, and how many bytes may be in it."""

    def __init__(self, folder: Path, limit: int, patience: float) -> None:
        """Create the folder if need be.

        Args:
            folder: CACHE.
            limit: most bytes that the files in it may have together.
            patience: seconds to wait for another process that gives no sign of life.

        Raises:
            UsageError: the folder cannot be created or written.
        """
        self.folder = folder
        self.limit = limit
        self._patience = patience
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "lock").touch()
        except OSError as error:
            raise UsageError(
                f"cache {folder} cannot be written ({error.strerror}); "
                "name another folder with --cache"
            ) from error

    def set_folder(self, identity: str, manifest: bytes) -> Path:
        """Return the folder of the set whose manifest is `manifest`, with that manifest in it."""
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
    def fetching(
        self, path: Path, *, wait: bool, until: Callable[[], bool], stop: threading.Event
    ) -> Iterator[bool]:
        """Be the one that fetches `path`, in this process and any other.

        Yields:
            True while its lock is held; False if another held it and `wait` is False, or if
            `until()` came true while waiting.

        Raises:
            Stopped: `stop` was set while waiting.
            DuetError: another process holds it and gives no sign of life.
        """
        lock = _lock_of(path)
        signs, since = self._signs(path), time.monotonic()
        descriptor = try_lock(lock)
        while descriptor is None and wait and not until():
            if stop.wait(_POLL):
                raise Stopped(f"waiting for {path.name} was stopped")
            now = self._signs(path)
            if now != signs:
                signs, since = now, time.monotonic()
            elif time.monotonic() - since > self._patience:
                raise DuetError(
                    f"another process has held {lock} for {self._patience:.0f} s and fetched "
                    "nothing; end it and start again"
                )
            descriptor = try_lock(lock)
        try:
            if descriptor is not None:
                for leftover in self._coming(path):  # of one that held this lock, and died
                    leftover.unlink(missing_ok=True)
            yield descriptor is not None
        finally:
            if descriptor is not None:
                unlock(descriptor)

    @contextmanager
    def room(
        self,
        path: Path,
        size: int,
        *,
        beside: int = 0,
        spare: Collection[Path],
        wait: bool,
        stop: threading.Event,
    ) -> Iterator[bool]:
        """Keep `size` bytes free for `path` while it is fetched (its lock must be held).

        Shards that were not used for longest are removed to make room. A reader that has one open
        can go on reading it; its bytes are free on the disk when it is closed.

        Args:
            path: what is going to be there.
            size: bytes of it.
            beside: bytes for which there must be room too, as they are needed sooner.
            spare: what to remove last, or, if `wait` is False, not at all.
            wait: wait until other files that are on their way have come and can make room.
            stop: ends the wait.

        Yields:
            Whether there is room; always True if `wait`.

        Raises:
            UsageError: there is too little room even in an empty cache.
            Stopped: `stop` was set while waiting.
        """
        marker = path.with_name(f"{path.name}.{size}.room{PARTIAL}")
        there = self._make_room(marker, size, beside, spare, wait)
        signs, since = self._names(), time.monotonic()
        while not there and wait:
            now = self._names()
            if now != signs:
                signs, since = now, time.monotonic()
            elif time.monotonic() - since > self._patience:
                raise UsageError(
                    f"cache {self.folder} of {self.limit} bytes has no room for {path.name}, which "
                    f"has {size}; give a larger --cache-size"
                )
            if stop.wait(_POLL):
                raise Stopped(f"waiting for room for {path.name} was stopped")
            os.utime(_lock_of(path))  # a sign of life to those who wait for us
            there = self._make_room(marker, size, beside, spare, wait)
        try:
            yield there
        finally:
            marker.unlink(missing_ok=True)

    def install(self, partial: Path, path: Path, as_stored: str | None = None) -> None:
        """Give a fetched file its name, for good; remember the hash of one that is damaged."""
        mark = path.with_name(path.name + AS_STORED)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with self._exclusive():  # who counts sees the file under one of its names, and only one
            partial.replace(path)
            for marker in self._coming(path):
                marker.unlink(missing_ok=True)
            mark.unlink(missing_ok=True)
        sync_folder(path.parent)
        if as_stored is not None:
            with atomic_write(mark) as file:
                file.write(as_stored.encode())

    def touch(self, path: Path) -> bool:
        """Note that a file is used now; False if it was removed to make room."""
        now = time.time_ns()  # finer than the kernel's own stamp: the order of uses is kept
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
            shards = [entry for entry in entries if entry.path.name.endswith(_EVICTABLE)]
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
        """All that counts. A file on its way counts with what was promised to it, or has come."""
        whole: list[_Entry] = []
        coming: dict[Path, list[int]] = {}
        for path, stat in self._files():
            match = _ON_ITS_WAY.fullmatch(path.name)
            if match is None:
                whole.append(_Entry(path, stat.st_size, stat.st_mtime_ns))
                continue
            sizes = coming.setdefault(path.with_name(match["name"] + PARTIAL), [0, 0])
            sizes[0] += int(match["room"] or 0)
            sizes[1] += stat.st_size
        return whole + [_Entry(name, max(sizes), 0) for name, sizes in coming.items()]

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for folder in self.folder.iterdir():
            # Only what we made: CACHE may hold other folders, and tars in them that are not ours.
            if not _SET.fullmatch(folder.name) or not (folder / LOCKS).is_dir():
                continue
            for item in os.scandir(folder):
                with suppress(FileNotFoundError):  # removed while we look
                    if item.is_file():
                        yield Path(item.path), item.stat()

    def _sweep(self) -> None:
        """Remove what dead processes left unfinished. The lock of the cache must be held."""
        for path, _ in list(self._files()):
            if not path.name.endswith(PARTIAL):
                continue
            match = _ON_ITS_WAY.fullmatch(path.name)
            if match is None:
                path.unlink(missing_ok=True)  # a manifest, written under the lock we hold
                continue
            descriptor = try_lock(_lock_of(path.with_name(match["name"])))
            if descriptor is not None:
                path.unlink(missing_ok=True)
                unlock(descriptor)

    def _names(self) -> list[tuple[Path, int]]:
        return sorted((path, stat.st_size) for path, stat in self._files())

    def _coming(self, path: Path) -> list[Path]:
        return list(path.parent.glob(f"{glob.escape(path.name)}.*{PARTIAL}"))

    def _signs(self, path: Path) -> list[tuple[str, int]]:
        """What changes while somebody fetches `path`."""
        signs = [("lock", 0)]
        with suppress(FileNotFoundError):
            signs = [("lock", _lock_of(path).stat().st_mtime_ns)]
        for partial in self._coming(path):
            with suppress(FileNotFoundError):
                signs.append((partial.name, partial.stat().st_size))
        return sorted(signs)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        lock, began = self.folder / "lock", time.monotonic()
        while (descriptor := try_lock(lock)) is None:
            if time.monotonic() - began > self._patience:
                raise DuetError(
                    f"another process has held {lock} for {self._patience:.0f} s; "
                    "end it and start again"
                )
            time.sleep(0.005)
        try:
            yield
        finally:
            unlock(descriptor)


def _lock_of(path: Path) -> Path:
    return path.parent / LOCKS / f"{path.name}.lock"
