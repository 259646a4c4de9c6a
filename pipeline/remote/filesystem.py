"""Everything that a request to a store needs: address, file system, retries, timeouts.

A store is any address that fsspec knows: `https://`, `s3://`, `gs://`, `hf://`, and so on.
Credentials and endpoints are what fsspec and its packages read from the environment: `AWS_PROFILE`,
`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, `FSSPEC_S3_ANON=true`,
`HF_TOKEN`, and the files in `~/.config/fsspec`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from pipeline.remote import hub
from pipeline.remote.answers import (
    Mismatch,
    describe_error,
    explain_refusal,
    is_expired,
    is_permanent,
    is_refused,
    read_retry_after,
)
from pipeline.tools.errors import DataError, DuetError, SetupError, UsageError, summarize_error
from pipeline.tools.files import explain_full_disk
from pipeline.tools.packages import suggest_extra
from pipeline.tools.text import hide_credentials
from pipeline.tools.watchdog import BackgroundCall

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
# Jitter comes from a generator of its own: no seed is touched, and forks do not wait in step.
_jitter = random.SystemRandom()
_opened: set[Any] = set()
"""Classes of the file systems that this process has opened."""
_renewals = itertools.count(1)
_generation = 0
"""Times that credentials were renewed; a `Client` of an earlier generation opens anew."""

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
    kinds = [fsspec.get_filesystem_class(name) for name in schemes]
    _opened.update(kinds)
    kind = kinds[0]
    if reports_bytes and not getattr(kind, "async_impl", True):
        options[schemes[0]]["skip_instance_cache"] = True  # else an instance for each thread
    if "::" in address and len(links) == 1:
        # fsspec would take this `::`, of a host or a name, for a chain.
        options = kind._get_kwargs_from_urls(address) | options[schemes[0]]
        return fsspec.filesystem(schemes[0], **options), kind._strip_protocol(address)
    system, path = url_to_fs(address, **options)
    return system, path


class Client:
    """The file system of an address, opened anew whenever credentials were renewed."""

    def __init__(
        self, address: str, policy: RetryPolicy | None = None, *, lists: bool = False
    ) -> None:
        """Open it; nothing is sent. Args: as `open_filesystem`."""
        self._open = partial(open_filesystem, address, policy, lists=lists)
        self._generation = _generation
        self._system, self.path = self._open()
        """Path of the address in the file system."""

    @property
    def system(self) -> Any:
        """The fsspec file system; each try of a request asks for it anew."""
        if self._generation != _generation:
            self._generation = _generation
            self._system, self.path = self._open()
        return self._system


def renew_credentials() -> None:
    """Have every further try read credentials anew from where they come.

    fsspec keeps its file systems, and those what they once read from the environment, files and
    metadata of the instance: all are forgotten. fsspec's own configuration is read again, too.
    """
    global _generation
    from fsspec import config

    with contextlib.suppress(OSError, ValueError):  # a file that is being written
        config.set_conf_files(config.conf_dir, config.conf)
    for kind in tuple(_opened):
        kind.clear_instance_cache()
    _generation = next(_renewals)


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
    tried twice. After a refusal the next try has fresh credentials (`renew_credentials`): an
    `action` that keeps its file system takes it from a `Client`.

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
        if is_refused(failure):
            renew_credentials()
        asked = min(read_retry_after(failure), policy.request_timeout())
        pause = max(asked, policy.delay(attempt) * _jitter.uniform(0.75, 1.25))
        if stop is None:
            time.sleep(pause)
        elif stop.wait(pause):
            raise Stopped(hide_credentials(f"{address} was not {done}: the data set was closed"))
    times = "once" if attempt == 1 else f"{attempt} times in {time.monotonic() - began:.0f} s"
    what = f"{address} could not be {done}, tried {times}: {describe_error(failure)}"
    if isinstance(failure, Mismatch):
        error = DataError
    raise error(f"{hide_credentials(what)}; {_suggest_way(failure)}") from failure


def _suggest_way(failure: Exception) -> str:
    """Return a way out of the failure of the last try."""
    if isinstance(failure, Mismatch):
        return "repair the data set in the store"
    if is_expired(failure):
        return "renew the credentials where they are kept, which was read again for each try"
    if is_permanent(failure):
        return explain_refusal(failure) or "check the address and the credentials"
    asked = read_retry_after(failure)
    return f"try again in {asked:.0f} s, as it asks" if asked else "try again later"


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
        client = Client(self.url, self.policy)

        def send() -> T:
            system = client.system
            system.invalidate_cache()  # other processes write here, too
            return action(system, join_name(client.path, name))

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
