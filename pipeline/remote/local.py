"""A data set as it is read: the interface of all, and that in a folder of this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from pipeline.dataset.manifest import Manifest, Shard, find_root
from pipeline.dataset.versions import (
    SealedVersion,
    Withdrawn,
    list_versions,
    load_withdrawn,
    read_local,
)
from pipeline.tools.errors import REBUILD, DataError
from pipeline.tools.watchdog import FileAccess


class Dataset(Protocol):
    """The files of one data set. Threads may share it."""

    folder: Path
    """Local folder with `manifest.json` of the version that is read; `tables_folder` says where
    the files beside its shards are."""

    root: Path
    """Local folder of all versions; that of a remote data set is in the cache."""

    def list_versions(self) -> Iterator[SealedVersion]:
        """Yield this version and those before it, down to the first.

        Raises:
            As `fetch_shard`; DamagedFile: a manifest is missing or damaged.
        """

    def list_withdrawn(self) -> Withdrawn:
        """Return all samples that are withdrawn in the newest version that there was at opening.

        Raises:
            As `fetch_shard`.
        """

    def fetch_shard(self, shard: Shard) -> Path:
        """Return the local path of a whole shard, and mark it as used now.

        For a remote data set this waits until the shard is downloaded and checked against the
        manifest. Another process may evict the file again (the least recently used first); a file
        that is open or mapped stays readable, and `open` copes with an eviction.

        Raises:
            DataError: a local shard is missing, or the store has no file that fits the manifest.
            StoreError: the store did not give it, after all tries.
            UsageError, SetupError: the cache cannot be written, or its disk is full.
        """

    def locate_shard(self, shard: Shard) -> Path:
        """Return the local path of a shard, whether it is there or not."""

    def open(self, shard: Shard) -> BinaryIO:
        """Open a shard for reading (unbuffered reads and `mmap` are up to the caller).

        Raises:
            As `fetch_shard`.
        """

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """Download the shards that are needed next in the background, in this order.

        Returns at once. The shards are not evicted before the next call, which also drops
        downloads that have not begun. A download that fails raises nothing here: `fetch_shard`
        tries again and raises.
        """

    def recheck(self, shard: Shard) -> bool:
        """Check a shard again of which a sample failed its CRC-32; replace a damaged local copy.

        Returns:
            True if there is a better file now than `fetch_shard` last returned: call it again and
            read again. False if there is none: a local data set, a file that matches its manifest,
            or damage that the store itself holds.

        Raises:
            As `fetch_shard`: the local copy is damaged, and the store does not give another.
        """

    def fetch_table(self, name: str, digest: str) -> None:
        """Bring a further table into `folder`: it is needed by few readers.

        Args:
            name: of the file.
            digest: its SHA-256, as the manifest lists it.

        Raises:
            As `fetch_shard`.
        """

    def close(self) -> None:
        """End all downloads, within seconds; no other method may be called afterwards."""


class LocalDataset:
    """A data set in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        """Open nothing; `folder` is that of a data set, or of one of its versions."""
        self.folder, self.root = folder, find_root(folder)

    def list_versions(self) -> Iterator[SealedVersion]:
        """See `Dataset`."""
        number = Manifest.load(self.folder).number
        found = list_versions(read_local(self.root), str(self.root))
        return (one for one in found if one.number <= number)

    def list_withdrawn(self) -> Withdrawn:
        """See `Dataset`."""
        return load_withdrawn(self.root, Manifest.load(self.root))

    def fetch_shard(self, shard: Shard) -> Path:
        """See `Dataset`."""
        path = self.locate_shard(shard)
        with FileAccess(path):
            is_there = path.is_file()
        if not is_there:
            raise DataError(f"shard {path} is missing; restore it, or {REBUILD}")
        return path

    def locate_shard(self, shard: Shard) -> Path:
        """See `Dataset`."""
        return self.root / shard.name

    def open(self, shard: Shard) -> BinaryIO:
        """See `Dataset`."""
        path = self.fetch_shard(shard)
        with FileAccess(path):
            return path.open("rb")

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """Do nothing: all shards are local."""

    def recheck(self, shard: Shard) -> bool:
        """Return False: there is no other copy."""
        return False

    def fetch_table(self, name: str, digest: str) -> None:
        """Do nothing: all tables are local."""

    def close(self) -> None:
        """Do nothing."""
