"""Asks a store for something: watched, tried again, never a hang.

A store is any address that fsspec knows; credentials and endpoints are what fsspec and its
packages read from the environment, as `pipeline.remote.download` says.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

import fsspec
from fsspec.core import url_to_fs

from pipeline.remote.download import EXTRAS, Policy
from pipeline.stores.errors import (
    StoreError,
    TransferError,
    describe,
    is_permanent,
    without_secrets,
)
from pipeline.tools.errors import DuetError, SetupError, UsageError

_jitter = random.SystemRandom()

T = TypeVar("T")


class Unreachable(StoreError, OSError):
    """A store did not give (a part of) a file, after all tries; exit code 1."""


def file_system(address: str, policy: Policy | None = None) -> tuple[Any, str]:
    """Return the fsspec file system that an address names, and the path in there.

    Raises:
        UsageError: an unknown scheme, a chain of them, or an address with a query.
        SetupError: the package for the scheme is not installed.
    """
    policy, safe = policy or Policy(), without_secrets(address)
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


def insist(
    action: Callable[[], T],
    address: str,
    policy: Policy,
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
            return Call(action).result(4 * policy.stall) if watched else action()
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
    raise Unreachable(without_secrets(f"{what}, {times}: {describe(failure)}; {way}")) from failure


class Call(Generic[T]):
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
