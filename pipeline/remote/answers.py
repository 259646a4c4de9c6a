"""Answers of stores: whether another try is of use, when, and what was said, in a line."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from pipeline.remote import hub
from pipeline.tools.text import first_line
from pipeline.tools.watchdog import NoAnswer

_PERMANENT = (
    *(FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError),
    *(ImportError, NotImplementedError, TypeError, ValueError),
)
_EXPIRED = frozenset(
    {
        *("ExpiredToken", "ExpiredTokenException", "RequestExpired"),  # S3 and what speaks it
        *("InvalidToken", "TokenRefreshRequired", "400"),  # the last to a `HEAD`: it has no code
        *("AuthenticationFailed", "ExpiredAuthenticationToken"),  # Azure
        "InvalidAuthenticationInfo",
    }
)
"""Codes of stores for credentials that are valid no more."""
_REFUSED = (400, 401, 403)
"""HTTP statuses with which stores refuse credentials, and other requests."""


class Mismatch(Exception):
    """A file arrived whole, and its bytes are not the expected ones; the message says why."""


class TransferError(Exception):
    """A transfer was given up: it is stuck, or gives other bytes than it may."""


def is_permanent(error: BaseException) -> bool:
    """Return whether another try is of no use: not there, not allowed, not an address."""
    if is_expired(error) or _find_lost_answer(error):
        return False
    status = _http_status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(error, _PERMANENT) or "Credential" in type(error).__name__


def is_refused(error: BaseException) -> bool:
    """Return whether a store refused a request, as it does for the lack of good credentials."""
    return is_expired(error) or _http_status(error) in _REFUSED


def is_missing(error: BaseException | None) -> bool:
    """Return whether a store answered that there is no such file."""
    if error is None or _find_lost_answer(error):
        return False
    return isinstance(error, FileNotFoundError) or _http_status(error) in (404, 410)


def is_expired(error: BaseException) -> bool:
    """Return whether a store says that the credentials were valid once and are no more."""
    answer = getattr(error.__cause__, "response", None)  # botocore's
    code = answer.get("Error", {}).get("Code") if isinstance(answer, Mapping) else None
    return (code or getattr(error, "error_code", None)) in _EXPIRED  # the latter: Azure's


def describe_error(error: BaseException) -> str:
    """Return in one line what a store answered."""
    error = _find_lost_answer(error) or error
    status = _http_status(error)
    answer = f" (HTTP {status})" if status else ""
    # The whole first line: of an `OSError`, the system's words alone would lack the host.
    words = first_line(str(error)) or "no reason given"
    if isinstance(error, FileNotFoundError):
        return f"it is not there{answer}"
    if isinstance(error, PermissionError):
        return f"access denied{answer}: {words}"
    if isinstance(error, (Mismatch, NoAnswer, TransferError)):
        return words
    return f"{type(error).__name__}{answer}: {words}"


def explain_refusal(error: BaseException) -> str:
    """Return the way out of a refusal if the store tells one by its answer; else ""."""
    return hub.advise(_read_headers(error))


def _find_lost_answer(error: BaseException) -> BaseException | None:
    """Return the timeout or broken connection for which fsspec says that a file is not there."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, TimeoutError | ConnectionError):
        return cause
    return None


def _http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of a store's package stands for."""
    for attribute in ("status", "code", "status_code"):  # aiohttp, gcsfs, Azure
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
