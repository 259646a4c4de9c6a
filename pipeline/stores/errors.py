"""What went wrong between a store and the local disk: which kind it is, and how to say it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.tools.errors import DuetError, SetupError, UsageError

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


def describe(error: BaseException) -> str:
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


def without_secrets(text: str) -> str:
    """Return `text` with `user:password@` of any address in it replaced by stars."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)
