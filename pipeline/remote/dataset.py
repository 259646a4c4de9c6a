"""Where a data set is: a folder, or an address whose files come through a cache on this node.

A data set in a store, read through the cache of this node: fetched once, checked, ahead of need.

Threads of a process share one `RemoteSet`; processes open their own and meet in the cache. After a
fork it goes on in the child without what the parent's threads were fetching.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from pipeline.dataset.image_stats import NAME as STATS
from pipeline.dataset.index import index_name
from pipeline.dataset.manifest import NAME, Manifest, Shard
from pipeline.remote.cache import AS_STORED, Cache
from pipeline.remote.download import HashCheck, Store
from pipeline.remote.filesystem import Mismatch, local_errors
from pipeline.remote.prefetch import FetchOutcome, Prefetcher
from pipeline.tools.errors import REBUILD, DataError, UsageError
from pipeline.tools.files import sha256

THREADS = 4
"""Shards that one process fetches at a time, ahead of need."""

AHEAD_ATTEMPTS = 3
"""Tries of a shard that is not needed yet; who needs it tries again."""

LARGEST_MANIFEST = 256 * 2**20
"""More bytes than this are no manifest (a million shards have about 200 MB of it)."""


class RemoteDataset:
    """A `dataset.DataSet` behind an address."""

    def __init__(self, store: Store, cache: Cache, threads: int = THREADS) -> None:
        """Fetch the manifest, and the statistics and indices that it names unless they are there.

        Raises:
            StoreError: the store does not give them.
            DataError: what it gives is not a data set, or not what its manifest says.
            UsageError: the cache cannot be written, or is too small for one shard.
            SetupError: its disk is full.
        """
        self._store = store
        self._cache = cache
        self._stop = threading.Event()
        with local_errors(cache.folder):
            text = self._read_manifest()
            self._digest, manifest = self._parsed(text)
            self.folder = cache.set_folder(self._digest, text)
            self._check_sizes(manifest)
            self._fetch_small(STATS, manifest.stats_sha256)
            for name, split in manifest.splits.items():
                # `shards.index_name`, without the packing that comes with an import of it
                self._fetch_small(index_name(name), split.index_sha256)
        self._given: dict[str, tuple[int, int]] = {}
        self._ahead = Prefetcher(self._fetch_ahead, threads, self._stop)
        _open_sets.add(self)

    def fetch_shard(self, shard: Shard) -> Path:
        """Return the local path of a whole shard, fetching it first if need be; see `DataSet`."""
        path = self.folder / shard.name
        with local_errors(self._cache.folder):
            while True:
                if not self._is_here(shard):
                    self._fetch(shard, wait=True)
                found = _which(path)
                # None: removed between two steps, by a process that needed room.
                if found is not None and self._cache.touch(path):
                    self._given[shard.name] = found
                    return path

    def open(self, shard: Shard) -> BinaryIO:
        """Open a shard for reading, whatever is removed from the cache meanwhile."""
        while True:
            try:
                return self.fetch_shard(shard).open("rb")
            except FileNotFoundError:
                continue

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """Fetch these in the background, in this order; see `DataSet`."""
        self._ahead.wish(shards)

    def recheck(self, shard: Shard) -> bool:
        """Say whether a better copy than the one last given is there now; see `DataSet`."""
        path, given = self.folder / shard.name, self._given.get(shard.name)
        if given is None or _which(path) is None:
            return True  # not given yet, or removed to make room: `shard` brings it
        with local_errors(self._cache.folder):
            found = sha256(path)
            if found in (shard.sha256, self._as_stored(path)):
                return _which(path) != given
            self._fetch(shard, wait=True, replace=_which(path))
            return self._as_stored(path) != found

    def close(self) -> None:
        """End what is being fetched; returns within a second or two."""
        self._stop.set()
        self._ahead.join(2.0)

    def _after_fork(self) -> None:
        self._stop = threading.Event()
        self._ahead = Prefetcher(self._fetch_ahead, self._ahead.limit, self._stop)

    def _read_manifest(self) -> bytes:
        """Fetch the manifest as it is in the store now."""
        with tempfile.TemporaryDirectory(prefix="duet-") as folder:
            path = self._store.fetch(
                NAME, Path(folder), _check_json, limit=LARGEST_MANIFEST, stop=self._stop
            )
            return path.read_bytes()

    def _parsed(self, text: bytes) -> tuple[str, Manifest]:
        """Return the identity of a manifest, and what it says."""
        with tempfile.TemporaryDirectory(prefix="duet-") as folder:
            (Path(folder) / NAME).write_bytes(text)
            try:
                manifest = Manifest.load(Path(folder))
            except DataError as error:
                why = str(error).removeprefix(f"{folder}/{NAME} ").partition(";")[0]
                raise DataError(
                    f"{self._store}/{NAME} {why}; give the address of a data set"
                ) from error
        for name in (*manifest.splits, *(shard.name for shard in _shards(manifest))):
            if Path(name).name != name or name.startswith("."):  # it would leave our folder
                raise DataError(f"{self._store}/{NAME} names a file {name!r}; no data set has that")
        return hashlib.sha256(text).hexdigest(), manifest

    def _check_sizes(self, manifest: Manifest) -> None:
        largest = max(_shards(manifest), key=lambda shard: shard.bytes, default=None)
        if largest is not None and largest.bytes > self._cache.limit:
            raise UsageError(
                f"shard {largest.name} of {self._store} has {largest.bytes} bytes, the cache may "
                f"have {self._cache.limit}; give a larger --cache-size"
            )

    def _fetch_small(self, name: str, digest: str) -> None:
        """Bring a file that the folder needs to be read as a data set; it stays in the cache."""
        path = self.folder / name

        def here() -> bool:
            return path.is_file() and sha256(path) == digest

        def check(arrived: Path) -> None:
            if sha256(arrived) != digest:
                raise Mismatch("its bytes are not those of the manifest (SHA-256 differs)")

        if here():
            return
        with self._cache.fetching(path, wait=True, until=here, stop=self._stop) as mine:
            if mine and not here():
                limit = self._cache.limit
                self._install(
                    self._store.fetch(name, self.folder, check, limit=limit, stop=self._stop), path
                )

    def _is_here(self, shard: Shard) -> bool:
        path = self.folder / shard.name
        try:
            return path.stat().st_size == shard.bytes or self._as_stored(path) is not None
        except FileNotFoundError:
            return False

    def _as_stored(self, path: Path) -> str | None:
        """Return the hash of the damaged file that the store itself holds, if that was found."""
        try:
            return path.with_name(path.name + AS_STORED).read_text()
        except FileNotFoundError:
            return None

    def _fetch_ahead(self, shard: Shard, wishes: Sequence[Shard]) -> FetchOutcome:
        """Fetch in the background, without waiting for anybody."""
        path = self.folder / shard.name
        if self._is_here(shard) and self._cache.touch(path):  # others shall not remove it now
            return FetchOutcome.HERE
        # Room goes to what is needed first, whichever thread is faster.
        sooner = itertools.takewhile(lambda wish: wish != shard, wishes)
        beside = sum(wish.bytes for wish in sooner if not self._is_here(wish))
        spare = {self.folder / wish.name for wish in wishes}
        return self._fetch(shard, wait=False, spare=spare, beside=beside)

    def _fetch(
        self,
        shard: Shard,
        *,
        wait: bool,
        spare: set[Path] | None = None,
        beside: int = 0,
        replace: tuple[int, int] | None = None,
    ) -> FetchOutcome:
        """Bring a shard into the cache, unless it is there.

        Args:
            shard: which.
            wait: for another process that fetches it, and for room; always `HERE` then.
            spare: shards that are not removed for this one (removed last, if `wait`).
            beside: bytes of what is needed sooner, and not here yet.
            replace: the file that is not good enough, if it is there.
        """
        path, cache = self.folder / shard.name, self._cache

        def here() -> bool:
            return self._is_here(shard) and (replace is None or _which(path) not in (None, replace))

        spare = {self.folder / wish.name for wish in self._ahead.wishes} if spare is None else spare
        attempts = None if wait else AHEAD_ATTEMPTS
        check = HashCheck(shard)
        with cache.fetching(path, wait=wait, until=here, stop=self._stop) as mine:
            if here():
                return FetchOutcome.HERE
            if not mine:
                return FetchOutcome.BUSY
            with cache.room(
                path, shard.bytes, beside=beside, spare=spare, wait=wait, stop=self._stop
            ) as there:
                if there:
                    arrived = self._store.fetch(
                        shard.name,
                        self.folder,
                        check,
                        limit=shard.bytes,
                        stop=self._stop,
                        attempts=attempts,
                    )
                    if check.as_stored is not None:
                        self._refuse_another_set()
                    self._install(arrived, path, check.as_stored)
                return FetchOutcome.HERE if there else FetchOutcome.NO_ROOM

    def _install(self, arrived: Path, path: Path, as_stored: str | None = None) -> None:
        try:
            self._cache.install(arrived, path, as_stored)
        finally:
            arrived.unlink(missing_ok=True)

    def _refuse_another_set(self) -> None:
        """A shard of a set that was built anew under our feet is not a damaged one."""
        if self._parsed(self._read_manifest())[0] != self._digest:
            raise DataError(
                f"data set {self._store} was replaced by another while it was read; start again"
            )


_open_sets: weakref.WeakSet[RemoteDataset] = weakref.WeakSet()


def _begin_anew() -> None:
    """In a forked child: the parent's threads are gone, and may have held the locks of these."""
    for remote in _open_sets:
        remote._after_fork()


os.register_at_fork(after_in_child=_begin_anew)


def _check_json(arrived: Path) -> None:
    try:
        json.loads(arrived.read_bytes())
    except ValueError as error:
        raise Mismatch("it is not a manifest (no JSON)") from error


def _shards(manifest: Manifest) -> list[Shard]:
    return [shard for split in manifest.splits.values() for shard in split.shards]


def _which(path: Path) -> tuple[int, int] | None:
    """Tell files of one name apart; the number of one that is open or mapped is not used again."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino


CACHE_SIZE = 100 * 10**9
"""Bytes that a cache may have unless told otherwise."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(://|::)")
_SIZE = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<prefix>[kmgtp]?)(?P<binary>i?)b?\s*", re.I)


class Dataset(Protocol):
    """The files of one data set. Threads may share it."""

    folder: Path
    """A local folder with `manifest.json`, `stats.npz` and `SPLIT.index.npy`: what the functions
    that take a data folder read. Shards are in it when `shard` or `open` has returned."""

    def fetch_shard(self, shard: Shard) -> Path:
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

    def prefetch(self, shards: Sequence[Shard]) -> None:
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


class LocalDataset:
    """A data set in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        """Take the folder; `Manifest.load` says what is wrong with it."""
        self.folder = folder

    def fetch_shard(self, shard: Shard) -> Path:
        """Return the path of a shard."""
        path = self.folder / shard.name
        if not path.is_file():
            raise DataError(f"shard {path} is missing; restore it, or {REBUILD}")
        return path

    def open(self, shard: Shard) -> BinaryIO:
        """Open a shard for reading."""
        return self.fetch_shard(shard).open("rb")

    def prefetch(self, shards: Sequence[Shard]) -> None:
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
) -> Dataset:
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
        return LocalDataset(Path(local))
    from pipeline.remote.cache import Cache  # these bring fsspec, which a local set does without
    from pipeline.remote.download import Store

    store = Store(where)
    folder = default_cache() if cache is None else Path(cache)
    return RemoteDataset(store, Cache(folder.absolute(), cache_size, store.policy.patience))


def fetch_metadata(
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
