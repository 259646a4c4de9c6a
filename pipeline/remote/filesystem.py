"""Asks a store for something: watched, tried again, never a hang.

A store is any address that fsspec knows; credentials and endpoints are what fsspec and its
packages read from the environment, as `pipeline.remote.download` says.

What went wrong between a store and the local disk: which kind it is, and how to say it.
"""

from __future__ import annotations

import errno
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import fsspec
from fsspec.core import url_to_fs

from pipeline.tools.errors import DuetError, SetupError, UsageError


@dataclass(frozen=True)
class RetryPolicy:
    """How long to insist: with the defaults, about half a minute of waiting between the tries."""

    attempts: int = 6
    first_delay: float = 1.0
    """Seconds before the second try; doubled before each further one, and varied by a quarter."""
    stall: float = 30.0
    """Seconds in which at least `SLOWEST` bytes a second must come, or a try is given up."""

    @property
    def patience(self) -> float:
        """Seconds without a sign of life after which another fetching process is stuck."""
        return 4 * self.stall + 2 * self.delay(self.attempts)

    def delay(self, attempt: int) -> float:
        """Seconds to wait after try number `attempt` (1..), before jitter."""
        return float(self.first_delay * 2 ** (attempt - 1))


EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
"""Which extra of this package brings what a scheme needs."""


_LOCAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_PERMANENT = (
    *(FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError),
    *(ImportError, NotImplementedError, TypeError, ValueError),
)


class StoreError(DuetError):
    """A store did not give a file, after all tries; exit code 1."""


class Stopped(DuetError):
    """The data set was closed while a file was being fetched."""


class Mismatch(Exception):
    """A file arrived whole, and is not what was asked for; the message says what differs."""


class TransferError(Exception):
    """A transfer that was given up: stuck, or longer than it may be."""


def raise_if_local(error: Exception, folder: Path) -> None:
    """Raise the one-line error for a disk that is full or cannot be written, if `error` is that.

    Raises:
        UsageError: `folder` is read-only or gone.
        SetupError: its disk is full.
    """
    if not isinstance(error, OSError):
        return
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise SetupError(
            f"cache {folder}: no space left on its disk; free some, give a smaller --cache-size, "
            "or another folder with --cache"
        ) from error
    ours = str(error.filename or "").startswith(f"{folder}/")
    if error.errno in _LOCAL_ERRNOS or ours:
        raise UsageError(
            f"cache {folder} cannot be written ({error.strerror}); name another folder with --cache"
        ) from error


@contextmanager
def local_errors(folder: Path) -> Iterator[None]:
    """Turn an error of the disk in the block into one line, as `raise_if_local` does."""
    try:
        yield
    except OSError as error:
        raise_if_local(error, folder)
        raise


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of the answer that an error of aiohttp, gcsfs or s3fs stands for."""
    for attribute in ("status", "code"):  # aiohttp, gcsfs
        found = str(getattr(error, attribute, ""))
        if found.isdigit():
            return int(found)
    answer = getattr(error.__cause__, "response", None)  # s3fs, over botocore's error
    if isinstance(answer, dict):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None
    return None


def is_permanent(error: BaseException) -> bool:
    """Say whether trying again is of no use: not there, not allowed, not an address."""
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(error, _PERMANENT) or "Credential" in type(error).__name__


def describe_error(error: BaseException) -> str:
    """Say in a few words of one line what a store answered."""
    status = _status(error)
    answer = f" (HTTP {status})" if status else ""
    if isinstance(error, FileNotFoundError):
        return f"it is not there{answer}"
    if isinstance(error, PermissionError):
        return f"access denied{answer}: {_first_line(error)}"
    if isinstance(error, (Mismatch, TransferError)):
        return _first_line(error)
    return f"{type(error).__name__}{answer}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no reason given"])[0]


def hide_credentials(text: str) -> str:
    """Return `text` with `user:password@` of any address in it replaced by stars."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)


_jitter = random.SystemRandom()

T = TypeVar("T")


class Unreachable(StoreError, OSError):
    """A store did not give (a part of) a file, after all tries; exit code 1."""


def open_filesystem(address: str, policy: RetryPolicy | None = None) -> tuple[Any, str]:
    """Return the fsspec file system that an address names, and the path in there.

    Raises:
        UsageError: an unknown scheme, a chain of them, or an address with a query.
        SetupError: the package for the scheme is not installed.
    """
    policy, safe = policy or RetryPolicy(), hide_credentials(address)
    scheme = address.partition("://")[0]
    if "::" in address:
        raise UsageError(f"source {safe}: lists with '::' are not read; name one set at a time")
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        raise UsageError(
            f"source {safe}: unknown scheme {scheme!r}; give a path, or an address such as "
            "https://host/folder/train.tar, s3://bucket/folder, gs://bucket/folder"
        ) from error
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        way = f"pip install 'duet[{extra}]'" if extra else str(error).splitlines()[0]
        raise SetupError(f"source {safe}: nothing here speaks {scheme}://; {way}") from error
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        if "?" in address:
            raise UsageError(
                f"source {safe.partition('?')[0]}: an address with a query would stand in the "
                "manifest; give one without, or download the file"
            )
        import aiohttp

        # By default aiohttp ends any transfer after five minutes, however well it goes.
        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(
                total=None, sock_connect=policy.stall, sock_read=policy.stall
            )
        }
    system, path = url_to_fs(address, **options)
    return system, path


def retry(
    action: Callable[[], T],
    address: str,
    policy: RetryPolicy,
    *,
    watched: bool = True,
    done: str = "read",
) -> T:
    """Return what `action` returns, tried again with growing pauses while a store fails.

    Args:
        action: asks the store once.
        address: of what, for messages.
        policy: how long to insist.
        watched: whether four times `policy.stall` is too long for one answer.
        done: what could not be done, for messages.

    Raises:
        Unreachable: after all tries; a file that is not there or may not be read is tried twice.
    """
    began = time.monotonic()
    for attempt in range(1, policy.attempts + 1):
        try:
            return BackgroundCall(action).result(4 * policy.stall) if watched else action()
        except DuetError:
            raise
        except Exception as error:
            failure = error
        if attempt == policy.attempts or (attempt >= 2 and is_permanent(failure)):
            break
        time.sleep(policy.delay(attempt) * _jitter.uniform(0.75, 1.25))
    _give_up(f"{address} could not be {done}", failure, attempt, time.monotonic() - began)


def _give_up(what: str, failure: Exception, attempts: int, seconds: float) -> NoReturn:
    check = "check the address and the credentials"
    way = check if is_permanent(failure) else "try again later"
    times = f"tried {attempts} times in {seconds:.0f} s"
    raise Unreachable(
        hide_credentials(f"{what}, {times}: {describe_error(failure)}; {way}")
    ) from failure


class BackgroundCall(Generic[T]):
    """Something that runs in a thread of its own, left behind when nobody waits for it."""

    def __init__(self, action: Callable[[], T]) -> None:
        self._action = action
        self._result: list[T] = []
        self._failure: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, name="read from a store", daemon=True).start()

    def result(self, seconds: float | None = None) -> T:
        """Wait for it, and return or raise what it did.

        Raises:
            TransferError: `seconds` went by before it had ended.
        """
        if not self._done.wait(seconds):
            raise TransferError(f"no answer for {seconds:g} s")
        if self._failure is not None:
            raise self._failure
        return self._result[0]

    def _run(self) -> None:
        try:
            self._result.append(self._action())
        except BaseException as error:  # handed to the waiting thread
            self._failure = error
        finally:
            self._done.set()
