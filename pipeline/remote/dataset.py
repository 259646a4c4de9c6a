"""Where a data set is: a folder, or an address whose files come through a cache on this node."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from pipeline.dataset.manifest import Manifest, Shard
from pipeline.tools.errors import REBUILD, DataError, UsageError

CACHE_SIZE = 100 * 10**9
"""Bytes that a cache may have unless told otherwise."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(://|::)")
_SIZE = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<prefix>[kmgtp]?)(?P<binary>i?)b?\s*", re.I)


class DataSet(Protocol):
    """The files of one data set. Threads may share it."""

    folder: Path
    """A local folder with `manifest.json`, `stats.npz` and `SPLIT.index.npy`: what the functions
    that take a data folder read. Shards are in it when `shard` or `open` has returned."""

    def shard(self, shard: Shard) -> Path:
        """Return the local path of a shard, all of it there; it counts as used now.

        For a remote set this waits until it is fetched and checked against the manifest. Other
        processes may remove the file again to make room, though the least recently used first;
        `open` is safe from that, and what is open or mapped stays readable.

        Raises:
            DataError: a local shard is missing, or the store has no file that fits the manifest.
            StoreError: the store did not give it, after all tries.
            UsageError, SetupError: the cache cannot be written, or its disk is full.
        """

    def open(self, shard: Shard) -> BinaryIO:
        """Open a shard for reading (unbuffered reads and `mmap` are up to the caller).

        Raises:
            As `shard`.
        """

    def ahead(self, shards: Sequence[Shard]) -> None:
        """Say what will be needed soon, in this order; returns at once.

        It is fetched in the background and stays until other shards are wished for. Wishes of an
        earlier call that nobody has begun to fetch are dropped. Nothing is raised for what cannot
        be fetched: `shard` tries again and raises.
        """

    def recheck(self, shard: Shard) -> bool:
        """Look again at a shard of which a sample failed its CRC-32.

        Returns:
            True if another, better file is there now than `shard` last returned: call `shard`
            again and read again. False if there is none: a local set, a file that is as its
            manifest says, or damage that the store itself holds.

        Raises:
            As `shard`: the local copy is damaged, and the store does not give another.
        """

    def close(self) -> None:
        """End all fetching, within seconds; nothing else may be called then."""


class LocalSet:
    """A data set in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        """Take the folder; `Manifest.load` says what is wrong with it."""
        self.folder = folder

    def shard(self, shard: Shard) -> Path:
        """Return the path of a shard."""
        path = self.folder / shard.name
        if not path.is_file():
            raise DataError(f"shard {path} is missing; restore it, or {REBUILD}")
        return path

    def open(self, shard: Shard) -> BinaryIO:
        """Open a shard for reading."""
        return self.shard(shard).open("rb")

    def ahead(self, shards: Sequence[Shard]) -> None:
        """Do nothing: it is all here."""

    def recheck(self, shard: Shard) -> bool:
        """Return False: there is no other copy."""
        return False

    def close(self) -> None:
        """Do nothing."""


def is_remote(data: str) -> bool:
    """Say whether `data` is an address (`s3://...`), rather than a folder or `file://...`."""
    return _ADDRESS.match(data) is not None and not data.lower().startswith("file://")


def open_dataset(
    data: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    cache_size: int = CACHE_SIZE,
) -> DataSet:
    """Open the data set at a folder or an address.

    An address is anything that fsspec knows: `https://host/folder`, `s3://bucket/folder`,
    `gs://bucket/folder`; the last two need `duet[s3]` and `duet[gs]`. Credentials and endpoints
    come from the environment, as `stores.fetch` says.

    Args:
        data: folder or address.
        cache: folder for what is fetched, shared by all processes of a node and any number of
            sets; default `$XDG_CACHE_HOME/duet`, or `~/.cache/duet`.
        cache_size: most bytes in it. It should hold the shards that a process reads at a time,
            and those it fetches ahead, of every process on the node.

    Raises:
        UsageError: no data set in this folder, an unknown scheme, a cache that cannot be written or
            is too small for one shard.
        SetupError: the package for the scheme is missing, or the cache's disk is full.
        StoreError: the store did not answer, after all tries.
        DataError: what it holds is no data set.
    """
    where = os.fspath(data)
    if not is_remote(where):
        local = unquote(urlsplit(where).path) if where.lower().startswith("file://") else where
        Manifest.load(Path(local))
        return LocalSet(Path(local))
    from pipeline.remote.cache import Cache  # these bring fsspec, which a local set does without
    from pipeline.remote.download import Store
    from pipeline.stores.remote import RemoteSet

    store = Store(where)
    folder = default_cache() if cache is None else Path(cache)
    return RemoteSet(store, Cache(folder.absolute(), cache_size, store.policy.patience))


def metadata(
    data: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    cache_size: int = CACHE_SIZE,
) -> Path:
    """Return the local folder of a set's manifest, statistics and index; see `open_dataset`."""
    dataset = open_dataset(data, cache=cache, cache_size=cache_size)
    dataset.close()
    return dataset.folder


def default_cache() -> Path:
    """Return `$XDG_CACHE_HOME/duet`, or `~/.cache/duet` where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duet"


def parse_size(text: str) -> int:
    """Return the bytes that `100GB`, `1.5TiB`, `500 MB` or `1000000` mean.

    Raises:
        UsageError: it is none of these, or nothing.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match["binary"] and not match["prefix"]):
        raise UsageError(f"size {text!r} cannot be read; give one such as 500MB, 100GB or 1.5TiB")
    base = 1024 if match["binary"] else 1000
    power = " kmgtp".index(match["prefix"].lower() or " ")
    size = int(float(match["number"]) * base**power)
    if size < 1:
        raise UsageError(f"size {text!r} is no room at all; give one such as 500MB or 100GB")
    return size
