"""A line of the doctor's result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "FAIL"]
GB = 10**9


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and how to mend it."""

    name: str
    status: Status
    value: str
    mend: str = ""
    """A command or a setting; empty if nothing has to be mended."""


def ok(name: str, value: str) -> Finding:
    """All is well."""
    return Finding(name, "ok", value)


def warn(name: str, value: str, mend: str) -> Finding:
    """It works, but not as well as it might."""
    return Finding(name, "warn", value, mend)


def fail(name: str, value: str, mend: str) -> Finding:
    """Training would fail, or not begin."""
    return Finding(name, "FAIL", value, mend)


def first_line(error: BaseException) -> str:
    """What an error says, cut to a line; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
