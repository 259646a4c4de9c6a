"""A line of the doctor's result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "FAIL"]
GB = 10**9


@dataclass(frozen=True)
class Finding:
    """Result of one check: subject, status, facts, and the way to mend it."""

    name: str
    status: Status
    value: str
    mend: str = ""
    """A command or a setting; empty if nothing has to be mended."""


def ok(name: str, value: str) -> Finding:
    """A finding with nothing to mend."""
    return Finding(name, "ok", value)


def warn(name: str, value: str, mend: str) -> Finding:
    """A finding with which training runs, but slower or with risk."""
    return Finding(name, "warn", value, mend)


def fail(name: str, value: str, mend: str) -> Finding:
    """A finding with which training fails, or does not start."""
    return Finding(name, "FAIL", value, mend)
