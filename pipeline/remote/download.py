"""Downloads one file of a data set to a local path: watched, retried, checked."""

from __future__ import annotations

import contextlib
import errno
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.dataset.manifest import Shard
from pipeline.remote.answers import Mismatch, TransferError
from pipeline.remote.filesystem import (
    RetryPolicy,
    Stopped,
    check_address,
    join_name,
    open_filesystem,
    retry,
)
from pipeline.tools.errors import UsageError
from pipeline.tools.files import PARTIAL, explain_full_disk, sha256
from pipeline.tools.text import hide_credentials
from pipeline.tools.watchdog import BackgroundCall

SLOWEST_DOWNLOAD = 1024
"""Bytes per second: a download that is slower than this over `RetryPolicy.stall` is given up."""


class HashCheck:
    """Compares a downloaded shard with the manifest; recognizes damage that the store itself has.

    Attributes:
        as_stored: SHA-256 (hexadecimal) of a file that the store itself holds damaged; None if it
            matches the manifest.
    """

    def __init__(self, shard: Shard) -> None:
        self.as_stored: str | None = None
        self._shard = shard
        self._last = ""

    def __call__(self, path: Path) -> None:
        """Accept the file at `path`.

        Raises:
            Mismatch: its bytes are not the expected ones, for the first time.
        """
        size, digest = path.stat().st_size, sha256(path)
        if size == self._shard.bytes and digest == self._shard.sha256:
            return
        if size > 0 and digest == self._last:
            # The same wrong bytes twice did not go wrong on the way. The CRC-32 of each sample
            # tells which of them are usable.
            self.as_stored = digest
            return
        self._last = digest
        if size != self._shard.bytes:
            raise Mismatch(f"it has {size} bytes, not the {self._shard.bytes} of the manifest")
        raise Mismatch("its bytes are not those of the manifest (SHA-256 differs)")


class Store:
    """A folder of files at a remote address."""

    def __init__(self, address: str, policy: RetryPolicy | None = None) -> None:
        """Check the address; nothing is sent yet.

        Raises:
            UsageError, SetupError: as `check_address`.
        """
        check_address(address, "data set")
        self._address = address.rstrip("/")
        self.policy = policy or RetryPolicy()

    def __str__(self) -> str:
        return hide_credentials(self._address)

    def fetch(
        self,
        name: str,
        folder: Path,
        check: Callable[[Path], None],
        *,
        limit: int,
        stop: threading.Event,
        attempts: int | None = None,
        local: str = "",
    ) -> Path:
        """Download file `name` into `folder` under a name of its own that ends with `.partial`.

        A connection that fails or is stuck, an error of the server, a body that is too short and
        bytes that fail the check are retried; see `retry`.

        Args:
            name: the file, relative to the address of the store.
            folder: where to write.
            check: called with the path of the downloaded file; raises `Mismatch` if it is wrong.
            limit: largest number of bytes that are accepted.
            stop: ends the tries and the pauses when set.
            attempts: number of tries, in place of the policy's.
            local: beginning of the local name; by default `name`.

        Returns:
            The path of the file that passed the check. The caller renames or removes it.

        Raises:
            StoreError: the store did not give the file.
            DataError: it gave a file each time, but never one that passed the check.
            UsageError, SetupError: `folder` cannot be written, or its disk is full.
            Stopped: `stop` was set.
        """

        def download() -> Path:
            path = folder / f"{local or name}.{secrets.token_hex(4)}{PARTIAL}"
            try:
                with translate_disk_errors(folder):
                    self._transfer(name, path, limit, stop)
                    check(path)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            return path

        policy = replace(self.policy, attempts=attempts or self.policy.attempts)
        return retry(download, name, policy, done=f"fetched from {self}", watched=False, stop=stop)

    def _transfer(self, name: str, path: Path, limit: int, stop: threading.Event) -> None:
        """Copy once, in a thread that is abandoned when it is stuck."""
        progress, stall = _make_byte_counter(limit), self.policy.stall

        def copy() -> None:
            system, root = open_filesystem(self._address, self.policy, reports_bytes=True)
            system.get_file(join_name(root, name), str(path), callback=progress)

        call = BackgroundCall(copy)
        try:
            mark, since = 0, time.monotonic()
            while not call.wait(min(0.25, stall / 4)):
                now = time.monotonic()
                if stop.is_set():
                    raise Stopped(f"fetching {name} from {self} was stopped")
                if progress.received >= mark + SLOWEST_DOWNLOAD * stall:
                    mark, since = progress.received, now
                elif now - since > stall:
                    raise TransferError(f"no bytes for {stall:g} s, after {progress.received}")
        finally:
            progress.stopped = True
        call.result()


def _make_byte_counter(limit: int) -> Any:
    """Return what counts the bytes of a download of at most `limit` bytes, for fsspec."""
    from fsspec.callbacks import Callback

    class ByteCounter(Callback):  # type: ignore[misc]
        """Counts downloaded bytes; ends a transfer that nobody waits for or that is too long."""

        def __init__(self) -> None:
            super().__init__()
            self.received = 0
            self.stopped = False

        def set_size(self, size: int | None) -> None:
            # File systems call this before they open the local file: a transfer that was given up
            # by then must not create it again.
            self._check()

        def relative_update(self, inc: int = 1) -> None:
            self.absolute_update(self.received + inc)

        def absolute_update(self, value: int) -> None:
            self.received = value
            self._check()

        def _check(self) -> None:
            if self.stopped:
                raise TransferError("given up")
            if self.received > limit:
                raise TransferError(f"more bytes than the {limit} that belong there")

    return ByteCounter()


@contextlib.contextmanager
def translate_disk_errors(folder: Path) -> Iterator[None]:
    """Turn an error of the cache's disk in the block into one line.

    Raises:
        UsageError: `folder` is read-only or gone.
        SetupError: its disk is full.
        OSError: any other, as it is.
    """
    full = (
        f"cache {folder}: no space left on its disk; free some, give a smaller --cache-size, or "
        "another folder with --cache"
    )
    try:
        with explain_full_disk(full):
            yield
    except OSError as error:
        is_inside = str(error.filename or "").startswith(f"{folder}/")
        if error.errno in (errno.EROFS, errno.EFBIG) or is_inside:
            raise UsageError(
                f"cache {folder} cannot be written ({error.strerror}); name another folder with "
                "--cache"
            ) from error
        raise
