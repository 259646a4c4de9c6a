"""One file from a store to a local path: watched, tried again, never a hang.

A store is any address that fsspec knows: `http(s)://`, `s3://`, `gs://`, and so on. Credentials
and endpoints are what fsspec and its packages read from the environment: `AWS_PROFILE`,
`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, `FSSPEC_S3_ANON=true`,
and the files in `~/.config/fsspec`. Nothing here knows what the bytes mean.

Whether what arrived is the shard of the manifest, and whose fault it is if not.
"""

from __future__ import annotations

import logging
import random
import re
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import fsspec
from fsspec.callbacks import Callback
from fsspec.core import url_to_fs

from pipeline.dataset.manifest import Shard
from pipeline.remote.filesystem import (
    EXTRAS,
    Mismatch,
    RetryPolicy,
    Stopped,
    StoreError,
    TransferError,
    describe_error,
    hide_credentials,
    is_permanent,
    raise_if_local,
)
from pipeline.tools.errors import DataError, DuetError, SetupError, UsageError
from pipeline.tools.files import PARTIAL, sha256


class HashCheck:
    """Compares what arrived with the manifest, and knows the store's own damage when it sees it."""

    def __init__(self, shard: Shard) -> None:
        """Know nothing yet; `as_stored` is the hash of what was accepted although it is damaged."""
        self.as_stored: str | None = None
        self._shard = shard
        self._last = ""

    def __call__(self, arrived: Path) -> None:
        """Accept the file at `arrived`, or raise `Mismatch`."""
        size, found = arrived.stat().st_size, sha256(arrived)
        if size == self._shard.bytes and found == self._shard.sha256:
            return
        if size > 0 and found == self._last:
            # The same wrong bytes twice did not go wrong on the way. The CRC-32 of each sample
            # tells which of them are usable.
            self.as_stored = found
            return
        self._last = found
        if size != self._shard.bytes:
            raise Mismatch(f"it has {size} bytes, not the {self._shard.bytes} of the manifest")
        raise Mismatch("its bytes are not those of the manifest (SHA-256 differs)")


SLOWEST = 1024
"""A transfer of fewer bytes a second than this over `RetryPolicy.stall` is stuck."""


# Jitter from a generator of our own: nobody's seed is touched, and forks do not wait in step.
_jitter = random.SystemRandom()

for _name in ("gcsfs", "s3fs"):
    # They log what they retry; without a handler Python would print that on stderr.
    logging.getLogger(_name).addHandler(logging.NullHandler())


class Store:
    """A folder of files at a remote address."""

    def __init__(self, address: str, policy: RetryPolicy | None = None) -> None:
        """Check that the address can be spoken to; nothing is sent yet.

        Raises:
            UsageError: an unknown scheme, or an address with a query.
            SetupError: the package for the scheme is not installed.
        """
        self._address = address.rstrip("/")
        self.policy = policy or RetryPolicy()
        for part in address.split("::"):
            _check_scheme(part.partition("://")[0], hide_credentials(address))
        if "?" in address and address.startswith("http"):
            raise UsageError(
                f"data set {hide_credentials(address)}: an address with a query has no files below "
                "it; give the address of the folder"
            )

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
    ) -> Path:
        """Bring file `name` into `folder` under a name of its own that ends with `.partial`.

        A connection that fails or is stuck, an error of the server, a body that is too short and
        bytes that fail the check are tried again with growing pauses; a file that is not there or
        may not be read only once more.

        Args:
            name: the file, below the address of the store.
            folder: where to write.
            check: called with the path of what arrived; raises `Mismatch` if it is not right.
            limit: most bytes that are taken.
            stop: ends the tries and the pauses early when set.
            attempts: how often to try, in place of the policy's number.

        Returns:
            The path of the file that passed the check. The caller renames or removes it.

        Raises:
            StoreError: the store did not give the file.
            DataError: it gave a file each time, but never one that passed the check.
            UsageError, SetupError: `folder` cannot be written, or its disk is full.
            Stopped: `stop` was set.
        """
        began, attempts = time.monotonic(), attempts or self.policy.attempts
        for attempt in range(1, attempts + 1):
            path = folder / f"{name}.{secrets.token_hex(4)}{PARTIAL}"
            kept = False
            try:
                self._transfer(name, path, limit, stop)
                check(path)
                kept = True
                return path
            except DuetError:
                raise
            except Exception as error:
                raise_if_local(error, folder)
                failure = error
            finally:
                if not kept:
                    path.unlink(missing_ok=True)
            if attempt == attempts or (attempt >= 2 and is_permanent(failure)):
                self._give_up(name, failure, attempt, time.monotonic() - began)
            if stop.wait(self.policy.delay(attempt) * _jitter.uniform(0.75, 1.25)):
                raise Stopped(f"fetching {name} from {self} was stopped")
        raise AssertionError("the loop ends by return or raise")

    def _transfer(self, name: str, path: Path, limit: int, stop: threading.Event) -> None:
        """Copy once, in a thread that is left behind when it is stuck."""
        progress = _Progress(limit)
        failures: list[BaseException] = []
        done = threading.Event()

        def copy() -> None:
            try:
                system, root = url_to_fs(self._address, **_options(self._address, self.policy))
                system.get_file(f"{root.rstrip('/')}/{name}", str(path), callback=progress)
            except BaseException as error:  # handed to the waiting thread
                failures.append(error)
            finally:
                done.set()

        threading.Thread(target=copy, name=f"fetch {name}", daemon=True).start()
        try:
            mark, since = 0, time.monotonic()
            while not done.wait(min(0.25, self.policy.stall / 4)):
                now = time.monotonic()
                if stop.is_set():
                    raise Stopped(f"fetching {name} from {self} was stopped")
                if progress.received >= mark + SLOWEST * self.policy.stall:
                    mark, since = progress.received, now
                elif now - since > self.policy.stall:
                    raise TransferError(
                        f"no bytes for {self.policy.stall:g} s, after {progress.received}"
                    )
        finally:
            progress.stopped = True
        if failures:
            raise failures[0]

    def _give_up(self, name: str, failure: Exception, attempts: int, seconds: float) -> NoReturn:
        times = "once" if attempts == 1 else f"{attempts} times in {seconds:.0f} s"
        what = hide_credentials(f"{name} could not be fetched from {self}, tried {times}")
        why = hide_credentials(describe_error(failure))
        if isinstance(failure, Mismatch):
            raise DataError(f"{what}: {why}; repair the data set in the store") from failure
        check = "check the address and the credentials"
        way = check if is_permanent(failure) else "try again later"
        raise StoreError(f"{what}: {why}; {way}") from failure


class _Progress(Callback):  # type: ignore[misc]
    """Counts what has come, and ends a transfer that nobody waits for or that is too long."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.received = 0
        self.stopped = False
        self._limit = limit

    def set_size(self, size: int | None) -> None:
        # File systems call this before they open the local file: one that comes too late to be
        # waited for must not create it again.
        self._check()

    def relative_update(self, inc: int = 1) -> None:
        self.absolute_update(self.received + inc)

    def absolute_update(self, value: int) -> None:
        self.received = value
        self._check()

    def _check(self) -> None:
        if self.stopped:
            raise TransferError("given up")
        if self.received > self._limit:
            raise TransferError(f"more bytes than the {self._limit} that belong there")


def _check_scheme(scheme: str, address: str) -> None:
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        raise UsageError(
            f"data set {address}: unknown scheme {scheme!r}; give a folder, or an address such as "
            "https://host/folder, s3://bucket/folder, gs://bucket/folder"
        ) from error
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        way = f"pip install 'duet[{extra}]'" if extra else str(error).splitlines()[0]
        raise SetupError(f"data set {address}: nothing here speaks {scheme}://; {way}") from error


def _options(address: str, policy: RetryPolicy) -> dict[str, Any]:
    """What a file system is told beyond its own environment, so that the watch sees its bytes."""
    scheme = address.partition("://")[0]
    if scheme in ("http", "https"):
        import aiohttp

        # By default aiohttp ends any transfer after five minutes, however well it goes. These
        # only clean up behind the watch in `_transfer`.
        late = 2 * policy.stall
        return {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=late, sock_read=late)}
    if scheme in ("s3", "s3a"):
        return {"max_concurrency": 1}  # in parts, no byte would be seen before 500 MB of them
    if not getattr(fsspec.get_filesystem_class(re.split("::|://", address)[0]), "async_impl", True):
        return {"skip_instance_cache": True}  # it would keep one for each of our threads
    return {}
