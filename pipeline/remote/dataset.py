"""Data sets that are read: `open_dataset`, and those in a store through the node's shard cache.

Threads of a process share one `RemoteDataset`; processes open their own and share the cache. After
a fork the child's data set works, without the downloads of the parent's threads.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.dataset.image_stats import NAME as STATS
from pipeline.dataset.index import index_name
from pipeline.dataset.manifest import (
    LARGEST,
    NAME,
    Manifest,
    Shard,
    check_seal,
    find_root,
    identity,
)
from pipeline.dataset.record import RECORD, read_address, read_versions
from pipeline.dataset.segments import Segments
from pipeline.dataset.versions import (
    WITHDRAWN,
    SealedVersion,
    Version,
    Withdrawn,
    find_version,
    list_versions,
    load_withdrawn,
    locate_version,
    parse_version,
    read_newest,
)
from pipeline.remote.answers import Mismatch
from pipeline.remote.cache import AS_STORED, LOCKS, Cache
from pipeline.remote.download import HashCheck, Store, translate_disk_errors
from pipeline.remote.filesystem import StoreError, is_remote, local_path
from pipeline.remote.local import Dataset, LocalDataset
from pipeline.remote.prefetch import FetchOutcome, ShardPrefetcher
from pipeline.tools.errors import DamagedFile, DataError, DuetError, UsageError
from pipeline.tools.files import sha256
from pipeline.tools.jsonl import parse_json
from pipeline.tools.progress import announce
from pipeline.tools.text import HIDDEN, hide_credentials
from pipeline.tools.units import CACHE_SIZE
from pipeline.tools.watchdog import FileAccess

THREADS = 4
"""Shards that one process prefetches at a time."""
PREFETCH_ATTEMPTS = 3
"""Tries of a shard that is not needed yet; whoever needs it tries again."""


def open_dataset(
    data: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    cache_size: int = CACHE_SIZE,
    version: Version = None,
) -> Dataset:
    """Open the data set in a folder or at an address.

    Shards of a set in a folder may lie at an address, too: its manifest says so.

    An address is anything that fsspec knows: `https://host/folder`, `s3://bucket/folder`,
    `gs://bucket/folder`; the last two need the extras `s3` and `gs`. Credentials and endpoints
    come from the environment; see `pipeline.remote.filesystem`.

    Args:
        data: folder or address.
        cache: folder for downloaded files, shared by all processes of a node and any number of
            data sets; default `$XDG_CACHE_HOME/duet`, or `~/.cache/duet`.
        cache_size: size limit of the cache in bytes. It should hold the shards that are read and
            prefetched at a time by all processes of the node.
        version: number or identity of a version of the data set; None: the newest.

    Raises:
        UsageError: no data set in this folder, no such version, an unknown scheme, a cache that
            cannot be written or is too small for one shard.
        SetupError: the package for the scheme is missing, or the cache's disk is full.
        StoreError: the store did not answer, after all tries.
        DataError: the address holds no data set.
    """
    address = os.fspath(data)
    if not is_remote(address):
        place = locate_version(local_path(address), version)
        if Manifest.load(place).shards_at is None:
            return LocalDataset(place)
        address, version = f"file://{find_root(place).absolute()}", identity(place)
    store = Store(address)
    folder = (default_cache() if cache is None else Path(cache)).absolute()
    with announce(f"opening {hide_credentials(address)}"):
        kept = Cache(folder, cache_size, store.policy.lock_timeout)
        return RemoteDataset(store, kept, version=version)


def is_streamed(data: str) -> bool:
    """Return whether shards of a data set are read from a store; False for what is none."""
    if is_remote(data):
        return True
    with suppress(DuetError):
        return Manifest.load(local_path(data)).shards_at is not None
    return False


def fetch_metadata(
    data: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    cache_size: int = CACHE_SIZE,
    version: Version = None,
) -> Path:
    """Return a local folder with manifest, statistics and indices; see `open_dataset`.

    It is the data set's own folder (or that of a version in it), or that in the cache; shards may
    be missing.
    """
    dataset = open_dataset(data, cache=cache, cache_size=cache_size, version=version)
    dataset.close()
    return dataset.folder


def format_address(data: str) -> str:
    """Return the address of a data set as a run records it: absolute, credentials hidden."""
    return hide_credentials(data) if is_remote(data) else str(local_path(data).resolve())


def locate_dataset(
    run: Path,
    given: str = "",
    *,
    flag: str = "--data",
    record: Path | None = None,
    version: str = "",
    **cached: Any,
) -> tuple[str, Path]:
    """Find the data set of a run: the one that is given, else the one that the run recorded.

    Args:
        run: folder of the run.
        given: folder or address that the user gave; "": none.
        flag: argument that names another, for messages.
        record: folder that has the run's config.toml; None: `run` itself.
        version: version that the user gave; "": the one that the run reads, of a set that has it,
            else the newest.
        cached: cache arguments of `open_dataset`.

    Returns:
        Its folder or address, and a local folder with its metadata (see `fetch_metadata`).

    Raises:
        UsageError: the run recorded none, or without the credentials that it takes, or it is not
            there any more; also the errors of `open_dataset`.
    """
    own = read_versions(record or run)
    own = own[-1].version if isinstance(own, tuple) else own
    if given:
        return given, _fetch_version(given, version, own, **cached)
    address = read_address(record or run)
    if not address:
        why = "older runs do not" if (run / RECORD).is_file() else f"it has no {RECORD}"
        raise UsageError(f"{run} does not say where its data set is ({why}); give {flag}")
    where = f"the data set of {run} was at {address}"
    if is_remote(address) and HIDDEN in address:
        raise UsageError(f"{where}, whose credentials are not kept; give its address by {flag}")
    if not is_remote(address) and not (local_path(address) / NAME).is_file():
        raise UsageError(f"{where} and is not there on this machine; give its new place by {flag}")
    try:
        return address, _fetch_version(address, version, own, **cached)
    except StoreError as error:
        raise StoreError(f"{error}; {where}; if it has moved, give {flag}") from error


def _fetch_version(data: str, given: str, own: str | None, **cached: Any) -> Path:
    """Return the metadata of the version that a user gave, or of a run's own, or of the newest."""
    if given:
        wanted = parse_version(given, "--data-version")
        return fetch_metadata(data, version=wanted, **cached)
    newest = fetch_metadata(data, **cached)
    if own is None or identity(newest) == own or Manifest.load(newest).number == 1:
        return newest
    with suppress(UsageError):
        return fetch_metadata(data, version=own, **cached)
    return newest


def choose_versions(run: Path, folder: Path) -> str | Segments:
    """Return the version in a folder that `locate_dataset` found, with a run's segments before it.

    A stream of the segments normalizes images as the run did.
    """
    found, own = identity(folder), read_versions(run)
    versions = [segment.version for segment in own] if isinstance(own, tuple) else []
    number = versions.index(found) if found in versions else 0
    return own[: number + 1] if isinstance(own, tuple) and number else found


def default_cache() -> Path:
    """Return `$XDG_CACHE_HOME/duet`, or `~/.cache/duet` where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duet"


class RemoteDataset:
    """A data set at an address, read through the cache."""

    def __init__(
        self, store: Store, cache: Cache, threads: int = THREADS, version: Version = None
    ) -> None:
        """Download the manifest, and the statistics and indices unless they are in the cache.

        Args:
            store: the address.
            cache: of this node.
            threads: shards that are prefetched at a time.
            version: number or identity of the version; None: the newest.

        Raises:
            StoreError: the store does not give them.
            DataError: the address holds no data set, or files that its manifest does not describe.
            UsageError: the cache cannot be written, or is too small for one shard.
            SetupError: its disk is full.
        """
        self._store = self._shards = store
        self._cache = cache
        self._stop = threading.Event()
        with translate_disk_errors(cache.folder):
            found, self._newest = self._find_version(version)
            self._identity, self._manifest = found.identity, found.manifest
            if found.manifest.shards_at is not None:
                self._shards = Store(found.manifest.shards_at, store.policy)
            self.folder = self.root = cache.create_folder(found.identity, found.text)
            self._check_sizes(found.manifest)
            self._fetch_small(STATS, found.manifest.stats_sha256)
            for name, split in found.manifest.splits.items():
                self._fetch_small(index_name(name), split.index_sha256)
        self._returned: dict[str, tuple[int, int]] = {}
        """File identity (see `_file_id`) of the copy that `fetch_shard` last returned, by name."""
        self._prefetcher = ShardPrefetcher(self._prefetch, threads, self._stop)
        _open_sets.add(self)

    def list_versions(self) -> Iterator[SealedVersion]:
        """See `Dataset`."""
        with _manifest_errors():
            for one in list_versions(self._download_manifest, str(self._store)):
                if one.number <= self._manifest.number:
                    yield one

    def list_withdrawn(self) -> Withdrawn:
        """See `Dataset`."""
        if (digest := self._newest.withdrawn_sha256) is not None:
            with translate_disk_errors(self._cache.folder):
                self._fetch_small(WITHDRAWN, digest, self._newest)
        return load_withdrawn(self.folder, self._newest)

    def fetch_shard(self, shard: Shard) -> Path:
        """See `Dataset`."""
        with translate_disk_errors(self._cache.folder):
            while True:
                if not self._is_here(shard):
                    self._fetch(shard, wait=True)
                path = self.locate_shard(shard)
                found = _file_id(path)
                # None: evicted between two steps, by another process.
                if found is not None and self._cache.touch(path):
                    self._returned[shard.name] = found
                    return path

    def locate_shard(self, shard: Shard) -> Path:
        """See `Dataset`; a copy that the store itself holds damaged is of this set alone."""
        path, own = self._cache.locate(self._expect(shard).sha256), self.folder / shard.name
        return own if not path.is_file() and self._as_stored(own) is not None else path

    def open(self, shard: Shard) -> BinaryIO:
        """See `Dataset`."""
        while True:
            path = self.fetch_shard(shard)
            with suppress(FileNotFoundError), FileAccess(path):  # evicted between the two
                return path.open("rb")

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """See `Dataset`."""
        self._prefetcher.request(shards)

    def recheck(self, shard: Shard) -> bool:
        """See `Dataset`."""
        path, given = self.locate_shard(shard), self._returned.get(shard.name)
        if given is None or _file_id(path) is None:
            return True  # not returned yet, or evicted: `fetch_shard` downloads it
        with translate_disk_errors(self._cache.folder):
            found = sha256(path)
            if found in (self._expect(shard).sha256, self._as_stored(path)):
                return _file_id(path) != given
            self._fetch(shard, wait=True, replace=_file_id(path))
            return self._as_stored(self.locate_shard(shard)) != found

    def fetch_table(self, name: str, digest: str) -> None:
        """See `Dataset`."""
        with translate_disk_errors(self._cache.folder):
            self._fetch_small(name, digest)

    def close(self) -> None:
        """See `Dataset`; returns within about two seconds."""
        self._stop.set()
        self._prefetcher.join(2.0)

    def reset_after_fork(self) -> None:
        """Start without the parent's threads, which may have held locks of this object."""
        self._stop = threading.Event()
        self._prefetcher = ShardPrefetcher(self._prefetch, self._prefetcher.limit, self._stop)

    def _find_version(self, version: Version) -> tuple[SealedVersion, Manifest]:
        """Return a version, and the manifest of the newest, both as the store has them now."""
        with _manifest_errors():
            newest = read_newest(self._download_manifest, str(self._store))
            known = {NAME: newest.text}

            def read(name: str) -> bytes:
                return known.get(name) or self._download_manifest(name)

            return find_version(read, version, str(self._store)), newest.manifest

    def _download_manifest(self, name: str = NAME) -> bytes:
        """Return a manifest that is in the store now."""
        with tempfile.TemporaryDirectory(prefix="duet-") as folder:
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            path = self._store.fetch(
                name, Path(folder), _check_manifest, limit=LARGEST, stop=self._stop
            )
            return path.read_bytes()

    def _check_sizes(self, manifest: Manifest) -> None:
        largest = max(_list_shards(manifest), key=lambda shard: shard.bytes, default=None)
        if largest is not None and largest.bytes > self._cache.limit:
            raise UsageError(
                f"shard {largest.name} of {self._store} has {largest.bytes} bytes, the cache may "
                f"have {self._cache.limit}; give a larger --cache-size"
            )

    def _fetch_small(self, name: str, digest: str, manifest: Manifest | None = None) -> None:
        """Download a file beside the shards, unless it is there; it is never evicted."""
        name = f"{(manifest or self._manifest).tables_in}/{name}".lstrip("/")
        path = self.folder / name
        (path.parent / LOCKS).mkdir(parents=True, exist_ok=True)

        def is_here() -> bool:
            return path.is_file() and sha256(path) == digest

        def check(downloaded: Path) -> None:
            if sha256(downloaded) != digest:
                raise Mismatch("its bytes are not those of the manifest (SHA-256 differs)")

        if is_here():
            return
        with self._cache.lock_file(path, wait=True, until=is_here, stop=self._stop) as is_mine:
            if is_mine and not is_here():
                downloaded = self._store.fetch(
                    name, self.folder, check, limit=self._cache.limit, stop=self._stop
                )
                self._cache.install(downloaded, path)

    def _expect(self, shard: Shard) -> Shard:
        """Return a shard with the SHA-256 that it has since withdrawn samples were purged."""
        return replace(shard, sha256=self._newest.purged.get(shard.name, shard.sha256))

    def _is_here(self, shard: Shard) -> bool:
        path = self.locate_shard(shard)
        try:
            return path.stat().st_size == shard.bytes or self._as_stored(path) is not None
        except FileNotFoundError:
            return False

    def _as_stored(self, path: Path) -> str | None:
        """Return the SHA-256 of a file that the store itself holds damaged; None if it is sound."""
        try:
            return path.with_name(path.name + AS_STORED).read_text()
        except FileNotFoundError:
            return None

    def _prefetch(self, shard: Shard, wanted: Sequence[Shard]) -> FetchOutcome:
        """Download in the background, without waiting for another process or for room."""
        if self._is_here(shard) and self._cache.touch(self.locate_shard(shard)):
            # Nobody evicts it now.
            return FetchOutcome.HERE
        # Free space goes to the shards that are needed first, whichever thread is faster.
        sooner = itertools.takewhile(lambda other: other != shard, wanted)
        beside = sum(other.bytes for other in sooner if not self._is_here(other))
        spare = set(map(self.locate_shard, wanted))
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
            shard: the shard.
            wait: wait for another process that downloads it, and for room; the result is `HERE`.
            spare: files that are not evicted for this one (evicted last, if `wait`).
            beside: bytes of shards that are needed sooner and are not in the cache yet.
            replace: identity of a local copy that is damaged; see `_file_id`.
        """
        expected, cache = self._expect(shard), self._cache
        path, name = cache.locate(expected.sha256), f"shard {shard.name} of {self._store}"

        def is_here() -> bool:
            is_new = replace is None or _file_id(self.locate_shard(shard)) not in (None, replace)
            return is_new and self._is_here(shard)

        if spare is None:
            spare = set(map(self.locate_shard, self._prefetcher.wanted))
        check = HashCheck(expected)
        with cache.lock_file(path, wait=wait, until=is_here, stop=self._stop) as is_mine:
            if is_here():
                return FetchOutcome.HERE
            if not is_mine:
                return FetchOutcome.BUSY
            with cache.reserve_room(
                path, shard.bytes, name=name, beside=beside, spare=spare, wait=wait, stop=self._stop
            ) as has_room:
                if has_room:
                    downloaded = self._shards.fetch(
                        shard.name,
                        path.parent,
                        check,
                        limit=shard.bytes,
                        stop=self._stop,
                        attempts=None if wait else PREFETCH_ATTEMPTS,
                        local=path.name,
                    )
                    if check.as_stored is not None:
                        self._refuse_rebuilt_set()
                        path.unlink(missing_ok=True)
                        path = self.folder / shard.name
                    cache.install(downloaded, path, check.as_stored)
                return FetchOutcome.HERE if has_room else FetchOutcome.NO_ROOM

    def _refuse_rebuilt_set(self) -> None:
        """Raise if the store has another data set by now: its shards are new, and not damaged.

        A later version of this one is none: of its shards some may have been purged.
        """
        try:
            self._find_version(self._identity)
        except UsageError as error:
            raise DataError(
                f"data set {self._store} was replaced by another while it was read; start again"
            ) from error


@contextmanager
def _manifest_errors() -> Iterator[None]:
    """Name the manifest of a store that cannot be read in the block.

    Raises:
        DataError: one line.
    """
    try:
        yield
    except DamagedFile as error:
        raise DataError(
            f"{error.path} cannot be read ({error.reason}); give the address of a data set"
        ) from error


_open_sets: weakref.WeakSet[RemoteDataset] = weakref.WeakSet()


def _reset_open_sets() -> None:
    for dataset in _open_sets:
        dataset.reset_after_fork()


os.register_at_fork(after_in_child=_reset_open_sets)


def _check_manifest(downloaded: Path) -> None:
    """Find what a transfer may have damaged, and another may mend."""
    try:
        table = parse_json(downloaded.read_bytes())
    except ValueError as error:
        raise Mismatch("it is not a manifest (no JSON)") from error
    if isinstance(table, dict):
        try:
            check_seal(table)
        except ValueError as error:
            raise Mismatch(f"it is not a whole manifest ({error})") from error


def _list_shards(manifest: Manifest) -> list[Shard]:
    return [shard for split in manifest.splits.values() for shard in split.shards]


def _file_id(path: Path) -> tuple[int, int] | None:
    """Return device and inode of a file; None if it is not there.

    They tell files of one name apart: the number of one that is open or mapped is not used again.
    """
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino
