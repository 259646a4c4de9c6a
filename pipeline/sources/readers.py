"""Readers of image bytes: from folders, tars and parquet files, on a disk or in a store."""

from __future__ import annotations

import itertools
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.dataset.tar import ENCODING, escape
from pipeline.remote.answers import is_missing
from pipeline.remote.filesystem import (
    Client,
    RetryPolicy,
    Unreachable,
    is_remote,
    is_web,
    join_name,
    retry,
)
from pipeline.sources.listing import (
    MOST_IMAGE_BYTES,
    WHOLE_FILE,
    Container,
    SourceReader,
    Unreadable,
    refuse_if_too_large,
)
from pipeline.sources.names import member_name
from pipeline.sources.parquet import (
    DAMAGE,
    encode_value,
    find_image_column,
    find_member_columns,
    open_parquet,
    refuse_other_errors,
)
from pipeline.sources.paths import open_file
from pipeline.tools.errors import MEDIUM_ERRORS, SYSTEM_ERRORS, summarize_error
from pipeline.tools.processes import limit_memory
from pipeline.tools.text import hide_credentials
from pipeline.tools.watchdog import BackgroundCall, FileAccess

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_BYTES = 4 << 20
MOST_ROWS = 256
"""Most rows in memory; fewer if they would take more than `BATCH_BYTES` (mean of a row group)."""


SPARE_MEMORY, UNPACKED_TIMES = 1 << 30, 8
"""Bytes that reading a batch may take: so many, and so many times the size of the file."""


class ParquetReader:
    """Rows of a parquet file.

    Only the columns of images and of the fields are read, and of them only the pages that lie
    between the beginning of a row group and the row wanted. Going back begins the row group anew.
    In memory are a batch and a few pages; a page holds at most 1,024 rows as pyarrow writes them,
    or the row group.
    """

    def __init__(
        self, address: str, policy: RetryPolicy | None = None, fields: Sequence[str] = ()
    ) -> None:
        """Read the footer of the file; `fields` are the other members that will be read.

        Raises:
            OSError: the file is missing, or no parquet file.
            UsageError: it has no images, or no column of a field.
        """
        import pyarrow as pa

        self._address = address
        try:
            self._file, size = open_parquet(address, policy)
        except (pa.ArrowException, *DAMAGE) as error:
            if isinstance(error, OSError):
                raise
            what = summarize_error(error)[:200]
            raise OSError(f"{address} is no whole parquet file ({what})") from error
        self._image = find_image_column(self._file, address)
        self._fields = find_member_columns(self._file, address, fields)
        self._memory = SPARE_MEMORY + UNPACKED_TIMES * size
        meta = self._file.metadata
        rows = (meta.row_group(group).num_rows for group in range(meta.num_row_groups))
        self._starts = np.array([0, *itertools.accumulate(rows)], np.int64)
        """First row of each row group, and the number of all rows."""
        self._group = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._first, self._rows = 0, 0
        self._batch: pa.RecordBatch | None = None
        """Rows `_first` to `_first + _rows`."""
        self._damage: str | None = None
        """Reason why the rest of the row group cannot be read."""

    def read(self, name: str, place: int, size: int) -> bytes:
        """Return the bytes of the image in row `place`; see `SourceReader`."""
        column = self._find_values(self._image.name, self._image.in_struct, place)
        value = column[place - self._first]
        if not value.is_valid or not (found := value.as_buffer()) or not found.size:
            raise Unreadable("empty row: its bytes are null, as where only a path is stored")
        refuse_if_too_large(found.size)
        data: bytes = found.to_pybytes()
        return data

    def read_member(self, field: str, name: str, place: int, size: int) -> bytes:
        """Return the value of a field in row `place`, as `encode_value` has it."""
        column = self._fields[field]
        values = self._find_values(column.name, column.in_struct, place)
        return encode_value(values[place - self._first].as_py())

    def _find_values(self, column: str, in_struct: bool, place: int) -> Any:
        """Return a column of the batch that has row `place`."""
        if place >= self._starts[-1]:
            raise OSError(f"{self._address} has {self._starts[-1]} rows, not row {place}")
        group = int(np.searchsorted(self._starts, place, side="right")) - 1
        if group != self._group or place < self._first:
            self._begin(group)
        while place >= self._first + self._rows:
            self._next()
        assert self._batch is not None
        values = self._batch.column(self._batch.schema.get_field_index(column))
        # `flatten` knows that a null struct has no bytes, its child does not.
        return values.flatten()[0] if in_struct else values

    def close(self) -> None:
        """Close the file."""
        self._batches, self._batch = iter(()), None
        self._file.close(force=True)

    def _begin(self, group: int) -> None:
        # Metadata of the columns would say more, but damaged ones make Arrow end the process.
        meta = self._file.metadata.row_group(group)
        mean = max(1, meta.total_byte_size // max(1, meta.num_rows))
        self._group, self._first, self._rows = group, int(self._starts[group]), 0
        self._damage, self._batch = None, None
        columns = dict.fromkeys((self._image, *self._fields.values()))
        self._batches = self._file.iter_batches(
            batch_size=max(1, min(MOST_ROWS, BATCH_BYTES // mean)),
            row_groups=[group],
            columns=[f"{one.name}.bytes" if one.in_struct else one.name for one in columns],
            use_threads=False,
        )

    def _next(self) -> None:
        import pyarrow as pa

        self._batch = None  # before the next rows are read: one batch in memory, not two
        if self._damage is None:
            try:
                with limit_memory(self._memory):  # pages may be larger than the footer says
                    batch = next(self._batches, None)
                if batch is not None:
                    self._first += self._rows
                    self._rows, self._batch = batch.num_rows, batch
                    return
                self._damage = "its row group ends before it"
            except (pa.ArrowException, *DAMAGE) as error:
                # Bytes that cannot be unpacked are an OSError to Arrow, but one without a number.
                if isinstance(error, OSError) and error.errno not in (None, *MEDIUM_ERRORS):
                    raise
                refuse_other_errors(error)
                self._damage = summarize_error(error)[:200]
        raise Unreadable(f"cannot be read from its row group: {self._damage}")


def open_reader(
    container: Container,
    policy: RetryPolicy | None = None,
    fields: Sequence[str] = (),
    wanted: Iterable[tuple[str, int]] = (),
) -> SourceReader:
    """Open a container of images.

    Args:
        container: container of a `Listing`.
        policy: tries and timeouts if it is in a store.
        fields: other members of the samples that will be read.
        wanted: name and size of the images that will be read, in this order; of a folder in a
            store, the next ones are fetched while one is used.

    Raises:
        OSError: the container is missing, or of another kind than it was.
    """
    if container.kind == "parquet":
        return ParquetReader(container.address, policy, fields)
    if container.kind == "folder" and is_remote(container.address):
        return StoreFolderReader(container.address, policy, fields, wanted)
    if container.kind == "folder":
        return FolderReader(container.address)
    return TarReader(container.address, policy)


class FolderReader:
    """Files of a folder; links are followed."""

    def __init__(self, folder: str) -> None:
        """Check that the folder is there.

        Raises:
            OSError: it is missing.
        """
        os.scandir(folder).close()
        self._folder = folder

    def read(self, name: str, place: int, size: int) -> bytes:
        """Return the bytes of file `name`; see `SourceReader`."""
        path = os.path.join(self._folder.encode(*ENCODING), name.encode(*ENCODING))
        try:
            with FileAccess(f"{self._folder}/{name}"):
                # Without O_NONBLOCK, a pipe named as an image would be waited for.
                file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    return _read_all(file)
                finally:
                    os.close(file)
        except OSError as error:
            if error.errno in SYSTEM_ERRORS:
                raise
            os.scandir(self._folder).close()  # raises if the whole folder went away
            raise Unreadable(f"cannot be read: {error.strerror}") from error
        except ValueError as error:  # a zero byte in a name
            raise Unreadable(f"cannot be read: {error}") from error

    def read_member(self, field: str, name: str, place: int, size: int) -> bytes:
        """Return the file beside image `name` that has its name and the ending `field`."""
        return self.read(member_name(name, field), place, size)

    def close(self) -> None:
        """Do nothing: no file is open."""


def _read_all(file: int) -> bytes:
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable("not a file but a folder, a pipe or a device")
    refuse_if_too_large(found.st_size)
    data = os.read(file, found.st_size + 1)
    if len(data) == found.st_size:
        return data
    parts = [data]  # the file grows, or its file system knows no sizes
    while more := os.read(file, 1 << 20):
        parts.append(more)
        refuse_if_too_large(sum(map(len, parts)))
    return b"".join(parts)


PREFETCHED, PREFETCHED_BYTES = 16, 32 << 20
"""Most files of a store that a process prefetches at a time, and most bytes of them."""
UNKNOWN_BYTES = 1 << 20
"""Bytes that a file counts for whose size is not listed."""


class StoreFolderReader:
    """Files of a folder in a store; those that are wanted next are prefetched."""

    def __init__(
        self,
        address: str,
        policy: RetryPolicy | None = None,
        fields: Sequence[str] = (),
        wanted: Iterable[tuple[str, int]] = (),
    ) -> None:
        """Request nothing yet; see `open_reader`."""
        self._address, self._policy = address, policy or RetryPolicy()
        self._client = Client(address, self._policy)
        self._wanted = deque(
            one
            for name, size in wanted
            for one in ((name, size), *((member_name(name, field), WHOLE_FILE) for field in fields))
        )
        self._running: deque[tuple[str, int, BackgroundCall[bytes]]] = deque()
        """Name, size and request of each file that is prefetched."""

    def read(self, name: str, place: int, size: int) -> bytes:
        """Return the bytes of file `name`; see `SourceReader`."""
        refuse_if_too_large(size)
        data = self._take(name) if size else b""  # of no bytes there is no range to ask for
        if data is None:
            try:
                data = retry(
                    partial(self._request, name),
                    join_name(self._address, name),
                    self._policy,
                    size=max(size, 0),
                    error=Unreachable,
                )
            except Unreachable as error:
                if is_missing(error.__cause__):
                    self._require_folder()
                    raise Unreadable("cannot be read: it is not there any more") from error
                raise
        refuse_if_too_large(len(data))
        if size >= 0 and len(data) != size:
            raise Unreadable(f"has {len(data):,} bytes, where {size:,} were listed")
        return data

    def read_member(self, field: str, name: str, place: int, size: int) -> bytes:
        """Return the file beside image `name` that has its name and the ending `field`."""
        return self.read(member_name(name, field), place, WHOLE_FILE)

    def close(self) -> None:
        """Forget what is prefetched; requests under way end by themselves."""
        self._wanted.clear()
        self._running.clear()

    def _take(self, name: str) -> bytes | None:
        """Return the bytes of a file that was prefetched; None if it was not, or failed."""
        call = None
        while call is None and (self._running or self._wanted):
            self._prefetch()
            if self._running:  # else none was left but some that are too large
                found, _, request = self._running.popleft()
                call = request if found == name else None
        self._prefetch()
        with suppress(Exception):  # it is read again, with retries
            return None if call is None else call.result(self._policy.request_timeout())
        return None

    def _prefetch(self) -> None:
        """Request the next files, one at least."""
        taken = sum(size for _, size, _ in self._running)
        while self._wanted and len(self._running) < PREFETCHED:
            name, size = self._wanted[0]
            size = size if size >= 0 else UNKNOWN_BYTES
            if self._running and taken + size > PREFETCHED_BYTES:
                return
            self._wanted.popleft()
            if 0 < size <= MOST_IMAGE_BYTES:
                call = BackgroundCall(partial(self._request, name))
                self._running.append((name, size, call))
                taken += size

    def _require_folder(self) -> None:
        """Raise OSError if the whole folder went away."""
        client = Client(self._address, self._policy, lists=True)

        def ask() -> bool:
            system = client.system
            system.invalidate_cache()
            return bool(system.exists(client.path))

        # A web server need not show a folder to have files in it.
        if not is_web(client.path) and not retry(
            ask, self._address, self._policy, error=Unreachable
        ):
            raise OSError(f"{hide_credentials(self._address)} is not there any more")

    def _request(self, name: str) -> bytes:
        # From a place on, as s3fs asks for the size of a whole file first, in a request of its own.
        start = None if is_web(self._client.path) else 0
        return bytes(self._client.system.cat_file(join_name(self._client.path, name), start=start))


class TarReader:
    """Byte ranges of a tar; of one in a store, fetched in large blocks ahead of need."""

    def __init__(self, address: str, policy: RetryPolicy | None = None) -> None:
        """Open the tar.

        Raises:
            OSError: it cannot be opened; of a store, `Unreachable`.
        """
        self._address = address
        # A store's requests are watched where they are made.
        self._watch: Callable[[], AbstractContextManager[None]] = (
            nullcontext if is_remote(address) else partial(FileAccess, address)
        )
        with self._watch():
            self._file = open_file(address, policy)

    def read(self, name: str, place: int, size: int) -> bytes:
        """Return `size` bytes at `place`; see `SourceReader`."""
        refuse_if_too_large(size)
        try:
            with self._watch():
                self._file.seek(place)
                data = self._file.read(size)
        except OSError as error:
            if error.errno not in MEDIUM_ERRORS:
                raise
            raise Unreadable(f"cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise OSError(f"{self._address} ends inside {escape(name)}")
        return data

    def read_member(self, field: str, name: str, place: int, size: int) -> bytes:
        """Return `size` bytes at `place`."""
        return self.read(name, place, size)

    def close(self) -> None:
        """Close the tar."""
        self._file.close()
