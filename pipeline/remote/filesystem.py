"""Everything that a request to a store needs: address, file system, retries, timeouts, error text.

A store is any address that fsspec knows: `https://`, `s3://`, `gs://`, `hf://`, and so on.
Credentials and endpoints are what fsspec and its packages read from the environment: `AWS_PROFILE`,
`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, `FSSPEC_S3_ANON=true`,
`HF_TOKEN`, and the files in `~/.config/fsspec`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote, unquote, urlsplit

from pipeline.remote import hub
from pipeline.tools.errors import DataError, DuetError, SetupError, UsageError, summarize_error
from pipeline.tools.files import explain_full_disk
from pipeline.tools.packages import suggest_extra
from pipeline.tools.text import first_line, hide_credentials

OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")
"""Schemes of stores where a file appears only when all of it has been uploaded."""
EXTRAS = {
    "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http", "hf": "hf",
}  # fmt: skip
"""Extra of this package that installs what a scheme needs."""
SLOWEST_TRANSFER = 100_000
"""Bytes per second: a transfer without progress reports may take as long as this rate needs."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(://|::)")
_LINK = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.-]+(?:://|::))")
"""The sign between the schemes of a chain, not the one in `[::1]` or in the name of a file."""
_PERMANENT = (
    *(FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError),
    *(ImportError, NotImplementedError, TypeError, ValueError),
)
# Jitter comes from a generator of its own: no seed is touched, and forks do not wait in step.
_jitter = random.SystemRandom()

for _name in ("gcsfs", "s3fs"):
    # They log what they retry; without a handler Python would print that on stderr.
    logging.getLogger(_name).addHandler(logging.NullHandler())

T = TypeVar("T")


class StoreError(DuetError):
    """A store did not give or take a file, after all tries; exit code 1."""


class Unreachable(StoreError, OSError):
    """The `StoreError` of a file that is read like a local one, whose readers expect `OSError`."""


class Stopped(DuetError):
    """The data set was closed while a file was being downloaded."""


class Mismatch(Exception):
    """A file arrived whole, and its bytes are not the expected ones; the message says why."""


class TransferError(Exception):
    """A request was given up: it is stuck, or gives more bytes than it may."""


@dataclass(frozen=True)
class RetryPolicy:
    """Tries and timeouts of a request.

    By default there are six tries with 31 s of pauses between them; a small request may take 120 s
    each time, so that a store that never answers is given up after twelve and a half minutes.
    """

    attempts: int = 6
    first_delay: float = 1.0
    """Seconds before the second try; doubled before each further one, and varied by a quarter."""
    stall: float = 30.0
    """Seconds without progress after which a download is given up; see `request_timeout`."""

    @property
    def lock_timeout(self) -> float:
        """Seconds without a sign of life after which another downloading process is stuck."""
        return 4 * self.stall + 2 * self.delay(self.attempts)

    def delay(self, attempt: int) -> float:
        """Seconds to wait after try number `attempt` (1..), before jitter."""
        return float(self.first_delay * 2 ** (attempt - 1))

    def request_timeout(self, size: int = 0) -> float:
        """Seconds that one request may take which transfers `size` bytes."""
        return 4 * (self.stall + size / SLOWEST_TRANSFER)


def is_remote(address: str) -> bool:
    """Return whether `address` is one of a store (`s3://...`), not a folder or `file://...`."""
    return _ADDRESS.match(address) is not None and not address.lower().startswith("file://")


def local_path(address: str) -> Path:
    """Return the path that `folder` or `file:///folder` names."""
    is_url = address.lower().startswith("file://")
    return Path(unquote(urlsplit(address).path) if is_url else address)


def is_web(address: str) -> bool:
    """Return whether `address` is one of a web server, which has no list of its files."""
    return address.startswith(("http://", "https://"))


def join_name(folder: str, name: str) -> str:
    """Return the path of a file below a folder, as file systems have it; the folder's if empty."""
    # In a web address `%20`, `#` and `?` of a name would mean something else.
    return f"{folder.rstrip('/')}/{quote(name) if is_web(folder) else name}".rstrip("/")


def split_chain(address: str) -> list[str]:
    """Return the links of a chain of schemes (`simplecache::s3://...`); of others, the address."""
    return _LINK.split(address)


def check_address(address: str, what: str, *, chain: bool = True) -> None:
    """Check that this program can talk to the store of an address; nothing is sent.

    Args:
        address: any; a chain of schemes (`simplecache::s3://...`) is checked link by link.
        what: the thing at the address ("data set", "source"), for messages.
        chain: whether such a chain is allowed.

    Raises:
        UsageError: an unknown scheme, a chain that is not allowed, or an address with a query.
        SetupError: the package for the scheme is not installed.
    """
    import fsspec  # here: what reads no store waits no tenth of a second for it

    named = f"{what} {hide_credentials(address).partition('?')[0]}"
    links = split_chain(address)
    if len(links) > 1 and not chain:
        raise UsageError(f"{named}: lists with '::' are not read; name one set at a time")
    if len(links) > 1 and any("::" in link for link in links):
        raise UsageError(
            f"{named}: fsspec takes '::' of a host or a name for a chain; use no chain"
        )
    for link in links:
        scheme = link.partition("://")[0]
        try:
            fsspec.get_filesystem_class(scheme)
            if scheme == hub.SCHEME:
                fsspec.get_filesystem_class("https")
        except ValueError as error:
            raise UsageError(
                f"{named}: unknown scheme {scheme!r}; give a folder, or an address such as "
                "https://host/folder, s3://bucket/folder, hf://datasets/OWNER/NAME"
            ) from error
        except ImportError as error:
            extra = EXTRAS.get(scheme)
            way = suggest_extra(extra) if extra else str(error).splitlines()[0]
            raise SetupError(f"{named}: no package for {scheme}:// is installed; {way}") from error
        try:
            _ = urlsplit(link).port if is_web(link) else 0
        except ValueError as error:
            raise UsageError(
                f"{named}: {summarize_error(error)}; give an address such as https://host/folder, "
                "https://host:8080/folder, http://[::1]:8080/folder"
            ) from error
    if hub.is_hub(links[-1]):
        hub.check_hub_address(links[-1], named)
    if "?" in address and is_web(links[-1]):
        raise UsageError(
            f"{named}: an address with a query has no files below it, and would stand in the "
            "manifest; give the address of the folder without one, or download the files"
        )


def open_filesystem(
    address: str,
    policy: RetryPolicy | None = None,
    *,
    reports_bytes: bool = False,
    lists: bool = False,
) -> tuple[Any, str]:
    """Return the fsspec file system of an address that `check_address` accepts, and its path there.

    Args:
        address: a file or a folder.
        policy: timeouts.
        reports_bytes: whether each block of a download must be reported as it comes, to a callback
            in a thread that does not last.
        lists: whether folders are to be listed. Without, files of the hub are those of a web
            server, which has no list of them.
    """
    import fsspec
    from fsspec.core import url_to_fs

    policy, own = policy or RetryPolicy(), dict[str, Any]()
    if hub.is_hub(address) and lists:
        hub.silence_library()
    elif hub.is_hub(address):
        address, headers = hub.locate_on_web(address)
        own = hub.client_options(address, headers)
    links = split_chain(address)
    schemes = [link.partition("://")[0] for link in links]
    options = {name: _client_options(name, policy, reports_bytes) for name in schemes}
    if own:
        options[schemes[0]]["client_kwargs"] |= own
    kind = fsspec.get_filesystem_class(schemes[0])
    if reports_bytes and not getattr(kind, "async_impl", True):
        options[schemes[0]]["skip_instance_cache"] = True  # else an instance for each thread
    if "::" in address and len(links) == 1:
        # fsspec would take this `::`, of a host or a name, for a chain.
        options = kind._get_kwargs_from_urls(address) | options[schemes[0]]
        return fsspec.filesystem(schemes[0], **options), kind._strip_protocol(address)
    system, path = url_to_fs(address, **options)
    return system, path


def _client_options(scheme: str, policy: RetryPolicy, reports_bytes: bool) -> dict[str, Any]:
    """Return the options of a file system; the user's own of fsspec's configuration win."""
    if is_web(f"{scheme}://"):
        import aiohttp

        # By default aiohttp ends any transfer after five minutes, however well it goes. A download
        # watches its bytes itself: there these timeouts only clean up behind it.
        stall = 2 * policy.stall if reports_bytes else policy.stall
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall, sock_read=stall)
        # As curl: heed http_proxy, no_proxy and .netrc, and leave a redirect's signature alone.
        own = {"timeout": timeout, "trust_env": True, "requote_redirect_url": False}
        return {"client_kwargs": own | _read_settings(("http", "https"), "client_kwargs")}
    if scheme in ("gs", "gcs"):
        own = {"trust_env": True}
        return {"session_kwargs": own | _read_settings(("gs", "gcs"), "session_kwargs")}
    if reports_bytes and scheme in ("s3", "s3a"):
        return {"max_concurrency": 1}  # in parts, the first report comes after 500 MB
    return {}


def _read_settings(schemes: Iterable[str], name: str) -> dict[str, Any]:
    """Return the user's settings of this name for a file system, which ours would replace."""
    import fsspec

    found: dict[str, Any] = {}
    for scheme in schemes:
        one = fsspec.config.conf.get(scheme, {}).get(name)
        found |= one if isinstance(one, Mapping) else {}
    return found


def retry(
    action: Callable[[], T],
    address: str,
    policy: RetryPolicy,
    *,
    done: str = "read",
    size: int = 0,
    watched: bool = True,
    stop: threading.Event | None = None,
    error: type[DuetError] = StoreError,
) -> T:
    """Return what `action` returns, tried again with growing pauses while a store fails.

    A `DuetError` of `action` is raised at once. A file that is not there or may not be read is
    tried twice.

    Args:
        action: makes one request.
        address: of the file or folder, for messages.
        policy: tries and timeouts.
        done: what the request does with the file ("read", "written"), for messages.
        size: bytes that the request transfers.
        watched: whether a request that exceeds the policy's timeout is abandoned; False where
            `action` watches itself, or must not outlive this call.
        stop: ends the pauses when set.
        error: class of the error that is raised after all tries.

    Raises:
        StoreError: the store failed at each try.
        DataError: it answered, and the last answer was a `Mismatch`.
        Stopped: `stop` was set.
    """
    began, timeout = time.monotonic(), policy.request_timeout(size)
    for attempt in range(1, policy.attempts + 1):
        try:
            return BackgroundCall(action).result(timeout) if watched else action()
        except DuetError:
            raise
        except Exception as caught:
            failure = caught
        if attempt == policy.attempts or (attempt >= 2 and is_permanent(failure)):
            break
        asked = min(read_retry_after(failure), policy.request_timeout())
        pause = max(asked, policy.delay(attempt) * _jitter.uniform(0.75, 1.25))
        if stop is None:
            time.sleep(pause)
        elif stop.wait(pause):
            raise Stopped(hide_credentials(f"{address} was not {done}: the data set was closed"))
    times = "once" if attempt == 1 else f"{attempt} times in {time.monotonic() - began:.0f} s"
    what = f"{address} could not be {done}, tried {times}: {describe_error(failure)}"
    asked = read_retry_after(failure)
    way = f"try again in {asked:.0f} s, as it asks" if asked else "try again later"
    if is_permanent(failure):
        way = explain_refusal(failure) or "check the address and the credentials"
    if isinstance(failure, Mismatch):
        error, way = DataError, "repair the data set in the store"
    raise error(f"{hide_credentials(what)}; {way}") from failure


class BackgroundCall(Generic[T]):
    """A call in a daemon thread of its own, which is abandoned when nobody waits for it."""

    def __init__(self, action: Callable[[], T]) -> None:
        self._future = Future[T]()
        threading.Thread(
            target=self._run, args=(action,), name="request to a store", daemon=True
        ).start()

    def wait(self, seconds: float | None) -> bool:
        """Wait for the end of the call, at most so many seconds; return whether it has ended."""
        return bool(futures.wait([self._future], seconds).done)

    def result(self, seconds: float | None = None) -> T:
        """Return or raise what the call returned or raised.

        Raises:
            TransferError: it has not ended after `seconds`.
        """
        if not self.wait(seconds):
            raise TransferError(f"no answer for {seconds:g} s")
        return self._future.result()

    def _run(self, action: Callable[[], T]) -> None:
        try:
            self._future.set_result(action())
        except BaseException as error:  # handed to the waiting thread
            self._future.set_exception(error)


def is_permanent(error: BaseException) -> bool:
    """Return whether another try is of no use: not there, not allowed, not an address."""
    status = _http_status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(error, _PERMANENT) or "Credential" in type(error).__name__


def is_missing(error: BaseException | None) -> bool:
    """Return whether a store answered that there is no such file."""
    return isinstance(error, FileNotFoundError) or (
        error is not None and _http_status(error) in (404, 410)
    )


def describe_error(error: BaseException) -> str:
    """Return in one line what a store answered."""
    status = _http_status(error)
    answer = f" (HTTP {status})" if status else ""
    # The whole first line: of an `OSError`, the system's words alone would lack the host.
    words = first_line(str(error)) or "no reason given"
    if isinstance(error, FileNotFoundError):
        return f"it is not there{answer}"
    if isinstance(error, PermissionError):
        return f"access denied{answer}: {words}"
    if isinstance(error, (Mismatch, TransferError)):
        return words
    return f"{type(error).__name__}{answer}: {words}"


def explain_refusal(error: BaseException) -> str:
    """Return the way out of a refusal if the store tells one by its answer; else ""."""
    return hub.advise(_read_headers(error))


def _http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of a store's package stands for."""
    for attribute in ("status", "code"):  # aiohttp, gcsfs
        found = str(getattr(error, attribute, ""))
        if found.isdigit():
            return int(found)
    for one in (error, error.__cause__):  # huggingface_hub, and over its error fsspec
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    answer = getattr(error.__cause__, "response", None)  # s3fs, over botocore's error
    if isinstance(answer, dict):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None
    return None


def read_retry_after(error: BaseException) -> float:
    """Return the seconds that a server asks to wait (`Retry-After`); 0 if it does not."""
    asked = _read_headers(error).get("retry-after", "")
    if asked.isdecimal():
        return float(asked)
    try:
        until = parsedate_to_datetime(asked)
    except (ValueError, TypeError, OverflowError):
        return 0.0
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())


def _read_headers(error: BaseException) -> dict[str, str]:
    """Return the headers of the answer that an error stands for, names in small letters."""
    headers = getattr(error, "headers", None)  # aiohttp's
    for one in (error, error.__cause__):
        answer = getattr(one, "response", None)
        if isinstance(answer, Mapping):  # botocore's
            headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders")
        elif answer is not None:  # huggingface_hub's
            headers = getattr(answer, "headers", None)
    if not isinstance(headers, Mapping):
        return {}
    return {str(name).lower(): str(value).strip() for name, value in headers.items()}


@dataclass(frozen=True)
class StoreFolder:
    """Files of a folder in an object store; every method raises `StoreError` without an answer."""

    url: str
    policy: RetryPolicy = field(default_factory=RetryPolicy)

    @property
    def address(self) -> str:
        """The URL for messages, credentials removed."""
        return hide_credentials(self.url)

    def read(self, name: str) -> bytes:
        """Return the content of a small file.

        Raises:
            FileNotFoundError: there is no such file.
        """
        data = self.request(name, none_if_missing(lambda fs, path: bytes(fs.cat_file(path))))
        if data is None:
            raise self.missing(name)
        return data

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; missing ones are ignored."""
        for name in names:
            self.request(name, none_if_missing(lambda fs, path: fs.rm_file(path)), "removed")

    def request(
        self, name: str, action: Callable[[Any, str], T], done: str = "read", size: int = 0
    ) -> T:
        """Return what `action(file system, path of the file)` returns, with retries.

        Args:
            name: the file, relative to the folder; the folder itself if empty.
            action: makes one request.
            done: what the request does with the file, for messages.
            size: bytes that the request transfers.

        Raises:
            StoreError: the store failed at each try.
        """
        system, root = open_filesystem(self.url, self.policy)
        path = join_name(root, name)

        def send() -> T:
            system.invalidate_cache()  # other processes write here, too
            return action(system, path)

        return retry(send, f"{self.url}/{name}".rstrip("/"), self.policy, done=done, size=size)

    def missing(self, name: str) -> FileNotFoundError:
        """Return the error for a file that is not there."""
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.address}/{name}")


def none_if_missing(action: Callable[[Any, str], T]) -> Callable[[Any, str], T | None]:
    """Return an action that returns None, without retries, for a file that is not there."""

    def wrapped(system: Any, path: str) -> T | None:
        with contextlib.suppress(FileNotFoundError):
            return action(system, path)
        return None

    return wrapped


def temporary_space(what: str) -> contextlib.AbstractContextManager[None]:
    """Turn a full temporary folder in the block into a `SetupError` of one line.

    Args:
        what: the files that are put there.
    """
    return explain_full_disk(
        f"no space left in {tempfile.gettempdir()} for {hide_credentials(what)}; free some, or "
        "name another folder with TMPDIR"
    )
